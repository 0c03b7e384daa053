"""`make gpu`: checks the Triton kernels on a GPU, times them beside their peers, and writes a result file.

    python -m bench.gpu              on a GPU: writes bench/results/DATE-gpu.json, status 1 if a check fails
    python -m bench.gpu --dry-run    without one: every path of this script, interpreted, on tiny tensors

Values and gradients against float64 at real sizes, compute-sanitizer on small ones, then interleaved medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench import attention, looped_blocks, masked_cross_entropy, sample_rows, sampling
from bench.looped_blocks import applied
from bench.report import write
from bench.run import BF16, TINY, Calls, Run, head_in_fp8, in_fp8
from bench.targets import GPU_TARGETS, MEMORY_TARGET
from loopmdm_kernels.testing import assert_matches_oracle, interleaved_medians, reference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def check_values(run: Run) -> dict[str, str]:
    """Name -> "right", or what was wrong."""
    batch, length = run.sizes.checked
    rows = torch.arange(min(64, batch * length), device=run.device)
    names = run.names(rows.shape[0])
    checks: dict[str, str] = {}

    def compare(
        name: str, results: Callable[[Callable[..., Any], torch.dtype], list[Tensor]], op: str
    ) -> None:
        ours = results(getattr(lk, op), BF16)
        baseline, oracle = (results(getattr(reference, op), kind) for kind in (BF16, torch.float64))
        for index, tensors in enumerate(zip(ours, baseline, oracle, strict=True)):
            try:
                assert_matches_oracle(*tensors)
                checks[f"{name} {index}"] = "right"
            except AssertionError as error:
                checks[f"{name} {index}"] = str(error)

    def looped(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = run.looped(batch, length, dtype, grad=True)
        out = applied(op, inputs, 2)
        grad = torch.linspace(-1, 1, out.numel(), device=run.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, list(inputs.leaves().values()), grad)]

    def looped_in_fp8(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        return [applied(op, in_fp8(run.looped(batch, length, dtype)), 2, compute_dtype=dtype)]

    def cross_entropy(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        hidden, head = run.head(batch, length, dtype, grad=True)
        total, nll = op(hidden, head, *run.rows(batch, length))
        return [nll.detach(), *torch.autograd.grad(total, [hidden, *head[:4]])]

    def statistics_of(op: Callable[..., Any], dtype: torch.dtype, *, fp8: bool = False) -> list[Tensor]:
        hidden, exact = run.head(batch, length, dtype)
        head = head_in_fp8(exact) if fp8 else exact
        out = op(hidden, head, rows, names, temperature=0.0, compute_dtype=dtype)
        return [out.log_prob, out.top1_prob, out.top2_prob, out.entropy]

    with lk.use_backend("triton"):
        compare("looped_blocks, fp8 weights", looped_in_fp8, "looped_blocks")
        compare("sample_rows, fp8 weights", partial(statistics_of, fp8=True), "sample_rows")
        compare("looped_blocks", looped, "looped_blocks")
        compare("masked_cross_entropy", cross_entropy, "masked_cross_entropy")
        compare("sample_rows", statistics_of, "sample_rows")
        hidden, head = run.head(batch, length, torch.float32)
        draws = [op(hidden, head, rows, names).token for op in (lk.sample_rows, reference.sample_rows)]
    same = torch.equal(*draws)
    checks["draws of the reference"] = "right" if same else f"{int((draws[0] != draws[1]).sum())} differ"
    return checks


def small_cases() -> None:
    """Every Triton kernel once, on small tensors of odd sizes: what compute-sanitizer looks at."""
    run = Run(dry=not torch.cuda.is_available(), other_sizes=TINY)
    batch, length = 2, 5
    with lk.use_backend("triton"):
        inputs = run.looped(batch, length, grad=True)
        applied(lk.looped_blocks, inputs, 2, recompute=True).sum().backward()
        applied(lk.looped_blocks, inputs, 1, dropout=0.1).sum().backward()
        with torch.no_grad():
            applied(lk.looped_blocks, inputs, 2, exit_threshold=0.5)
        hidden, head = run.head(batch, length, grad=True)
        targets, rows, weights = run.rows(batch, length)
        lk.masked_cross_entropy(hidden, head, targets, rows, weights)[0].backward()
        with torch.no_grad():
            lk.sample_rows(hidden, head, rows, run.names(rows.shape[0]))
            lk.sample_rows(hidden, head, rows, run.names(rows.shape[0]), top_k=3)
            lk.head_logits(hidden, head)
            applied(lk.looped_blocks, in_fp8(inputs), 2, compute_dtype=BF16)
            lk.head_logits(hidden, head_in_fp8(head), compute_dtype=BF16)
        mask = torch.ones(batch, length, dtype=torch.bool, device=run.device)
        mask[0, 1] = False
        q = torch.randn(batch, 2, length, 24, device=run.device, requires_grad=True)
        lk.attention(q, q, q, key_mask=mask).sum().backward()
    run.synchronize()
    print("every kernel ran")


def sanitizer() -> str | None:
    """compute-sanitizer, where it is installed."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def under_sanitizer(tool: list[str], module: str, *arguments: str, timeout: float | None = None) -> Any:
    """What a module did as a process of its own, under compute-sanitizer if `tool` is its path and tool."""
    watched = [tool[0], "--tool", tool[1], "--error-exitcode", "1"] if tool else []
    return subprocess.run(
        [*watched, sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def sanitize(run: Run) -> str:
    """What compute-sanitizer says of the small cases; they run without it where it is not installed."""
    program = None if run.dry else sanitizer()
    done = under_sanitizer([program, "memcheck"] if program else [], "bench.gpu", "--small")
    if done.returncode:
        return str(done.stdout + done.stderr)[-2000:]
    return "clean" if program else "the small cases ran, without compute-sanitizer"


def timed(name: str, calls: Calls, run: Run, *, graphs: bool, repeats: int | None = None) -> dict[str, Any]:
    """Interleaved medians in ms, and how ours compares with the best of the others."""
    with lk.use_backend("triton"):
        ready = {key: run.captured(call) if graphs else call for key, call in calls.items()}
        repeats = repeats or run.sizes.repeats
        medians = interleaved_medians(ready, repeats=repeats, warmup=0 if run.dry else 2)
    ours = min(value for key, value in medians.items() if key.startswith("ours"))
    peer = min((value, key) for key, value in medians.items() if not key.startswith("ours"))
    target = GPU_TARGETS.get(name)
    figures: dict[str, Any] = {
        "ms": {key: round(1000 * value, 4) for key, value in medians.items()},
        "best peer": peer[1],
        "speedup": round(peer[0] / ours, 3),
    }
    if target is not None:
        figures |= {"target": target, "met": peer[0] / ours >= target}
    print(f"{name}: {json.dumps(figures)}", flush=True)
    return figures


def peak_memory(run: Run) -> dict[str, Any]:
    """Peak memory of forward and backward with recomputation: all loops over one loop."""
    inputs = run.looped(*run.sizes.training, grad=True)
    leaves = list(inputs.leaves().values())

    def peak(num_loops: int) -> int:
        if not run.dry:
            torch.cuda.reset_peak_memory_stats(run.device)
        out = applied(lk.looped_blocks, inputs, num_loops, recompute=True)
        torch.autograd.grad(out.sum(), leaves)
        return 1 if run.dry else torch.cuda.max_memory_allocated(run.device)

    with lk.use_backend("triton"):
        peak(1)
        ratio = peak(run.sizes.loops) / peak(1)
    return {"ratio": round(ratio, 3), "target": MEMORY_TARGET, "met": ratio <= MEMORY_TARGET}


def launch_overhead(run: Run) -> dict[str, Any]:
    """What the host needs for a launch outside a graph: looped_blocks of few tokens, not waited for."""
    from loopmdm_kernels.triton.launch import processor, recording

    call = partial(applied, lk.looped_blocks, run.looped(*run.sizes.forward[0]), run.sizes.loops)
    times = []
    with torch.no_grad(), lk.use_backend("triton"):
        with recording(processor(run.device)) as launches:
            call()
        for _ in range(1 + run.sizes.repeats):
            run.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    run.synchronize()
    host = statistics.median(times[1:])
    return {"launches a call": len(launches), "us a launch": round(1e6 * host / len(launches), 2)}


def measure(run: Run) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def add(name: str, calls: Calls, *, graphs: bool, repeats: int | None = None) -> None:
        figures[name] = timed(name, calls, run, graphs=graphs, repeats=repeats)

    sizes = run.sizes
    with torch.no_grad():
        for batch, length in sizes.forward:
            inputs, tokens = run.looped(batch, length), batch * length
            calls = looped_blocks.forward_calls(inputs, sizes.loops, run.compiled)
            add(f"looped_blocks forward T{tokens}", calls, graphs=True)
            add(f"looped_blocks forward T{tokens}, no graphs", calls, graphs=False)
            add(f"attention B{batch} L{length}", attention.gpu_calls(run, batch, length), graphs=True)
            narrow = looped_blocks.fp8_calls(inputs, sizes.loops)
            add(f"looped_blocks fp8 weights T{tokens}", narrow, graphs=True)
            narrow = sample_rows.fp8_calls(run, batch, length)
            add(f"sample_rows fp8 weights T{tokens}", narrow, graphs=True)
        for num_rows in sizes.sampled_rows:
            add(f"sample_rows R{num_rows}", sample_rows.gpu_calls(run, num_rows), graphs=True)
    batch, length = sizes.training
    inputs = run.looped(batch, length, grad=True)
    calls = looped_blocks.training_calls(inputs, sizes.training_loops, run.compiled)
    add(f"looped_blocks forward and backward T{batch * length}", calls, graphs=False)
    calls = masked_cross_entropy.gpu_calls(run)
    add(f"masked_cross_entropy forward and backward T{batch * length}", calls, graphs=False)
    figures["peak memory, all loops over one"] = peak_memory(run)
    add("sampling", sampling.gpu_calls(run), graphs=False, repeats=1 if run.dry else 2)
    for name, measured in (("launch overhead", launch_overhead), ("denoising step", sampling.gpu_step_times)):
        figures[name] = measured(run)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors on the CPU, interpreted")
    parser.add_argument("--small", action="store_true", help="small cases of all kernels, for a sanitizer")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/DATE-gpu.json")
    args = parser.parse_args()
    dry, start = args.dry_run, time.perf_counter()
    if args.small:
        small_cases()
        return
    if dry and not os.environ.get("TRITON_INTERPRET"):
        sys.exit("bench.gpu: --dry-run needs TRITON_INTERPRET=1")
    if not dry and not torch.cuda.is_available():
        sys.exit("bench.gpu: torch finds no GPU on this machine; --dry-run runs the script without one")
    run = Run(dry)
    checks = check_values(run)
    checks["sanitizer"] = sanitize(run)
    print(json.dumps(checks, indent=1), flush=True)
    figures = measure(run)
    import triton

    result = {
        "date": datetime.date.today().isoformat(),
        "command": "make gpu" if not dry else "dry run: no figure here means anything",
        "machine": "interpreter" if dry else torch.cuda.get_device_name(),
        "versions": {
            "loopmdm_kernels": lk.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "seconds": round(time.perf_counter() - start, 1),
        "checks": checks,
        "figures": figures,
    }
    out = args.out or RESULTS / f"{result['date']}-gpu.json"
    write(result, out)
    good = ("right", "clean", "the small cases ran, without compute-sanitizer")
    wrong = [name for name, verdict in checks.items() if verdict not in good]
    print(f"{out}: {len(checks)} checks, {len(wrong)} failed; {result['seconds']} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
