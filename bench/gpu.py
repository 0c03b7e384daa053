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
from bench import gpu_cases as cases
from bench.gpu_cases import REAL, TINY, Calls, Sizes
from bench.gpu_sampling import launch_overhead, sampling_calls, step_times
from bench.report import write
from loopmdm_kernels import reference
from loopmdm_kernels.testing import assert_matches_oracle, interleaved_medians

RESULTS = Path(__file__).parent / "results"
BF16 = torch.bfloat16
# At least so many times the speed of the best peer, by case; at most so much memory.
TARGETS = {
    "looped_blocks forward T128": 1.5,
    "looped_blocks forward T1024": 1.2,
    "looped_blocks forward T16384": 1.05,
    "looped_blocks forward and backward T16384": 1.15,
    "masked_cross_entropy forward and backward T16384": 2.5,
    "sample_rows R64": 5.0,
    "sample_rows R1024": 5.0,
    "sampling": 3.0,
}
MEMORY_TARGET = 1.3  # peak of 12 loops over that of one, with gradients


def compiled(function: Callable[..., Any], *, dry: bool) -> Callable[..., Any]:
    """What a user can get from torch; CUDA graphs are captured around it, as around our kernels."""
    if dry:
        return torch.compile(function, backend="eager", dynamic=False)
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def captured(call: Callable[[], Any], *, dry: bool) -> Callable[[], Any]:
    """The call as one CUDA graph."""
    if dry:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def check_values(device: torch.device, sizes: Sizes) -> dict[str, str]:
    """Name -> "right", or what was wrong."""
    batch, length = sizes.checked
    checks: dict[str, str] = {}

    def compare(name: str, run: Callable[[Callable[..., Any], torch.dtype], list[Tensor]], op: str) -> None:
        ours = run(getattr(lk, op), BF16)
        baseline, oracle = (run(getattr(reference, op), kind) for kind in (BF16, torch.float64))
        for index, tensors in enumerate(zip(ours, baseline, oracle, strict=True)):
            try:
                assert_matches_oracle(*tensors)
                checks[f"{name} {index}"] = "right"
            except AssertionError as error:
                checks[f"{name} {index}"] = str(error)

    def looped(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = cases.looped_on(device, sizes, batch, length, dtype, grad=True)
        out = cases.apply_loops(op, inputs, 2)
        grad = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, list(inputs.leaves().values()), grad)]

    def cross_entropy(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        hidden, head = cases.head_on(device, sizes, batch, length, dtype, grad=True)
        total, nll = op(hidden, head, *cases.rows_on(device, sizes, batch, length))
        return [nll.detach(), *torch.autograd.grad(total, [hidden, *head[:4]])]

    def statistics(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        hidden, head = cases.head_on(device, sizes, batch, length, dtype)
        rows = torch.arange(min(64, batch * length), device=device)
        out = op(hidden, head, rows, cases.names_on(device, rows.shape[0]), temperature=0.0)
        return [out.log_prob, out.top1_prob, out.top2_prob, out.entropy]

    def looped_in_fp8(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        inputs = cases.looped_on(device, sizes, batch, length, dtype)
        _, head = cases.head_on(device, sizes, batch, length, dtype)
        inputs = inputs._replace(blocks=cases.in_fp8(inputs, head)[0])
        return [cases.apply_loops(op, inputs, 2, compute_dtype=dtype)]

    def statistics_in_fp8(op: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        hidden, head = cases.head_on(device, sizes, batch, length, dtype)
        narrow = cases.in_fp8(cases.looped_on(device, sizes, batch, length, dtype), head)[1]
        rows = torch.arange(min(64, batch * length), device=device)
        names = cases.names_on(device, rows.shape[0])
        out = op(hidden, narrow, rows, names, temperature=0.0, compute_dtype=dtype)
        return [out.log_prob, out.top1_prob, out.top2_prob, out.entropy]

    with lk.use_backend("triton"):
        compare("looped_blocks, fp8 weights", looped_in_fp8, "looped_blocks")
        compare("sample_rows, fp8 weights", statistics_in_fp8, "sample_rows")
        compare("looped_blocks", looped, "looped_blocks")
        compare("masked_cross_entropy", cross_entropy, "masked_cross_entropy")
        compare("sample_rows", statistics, "sample_rows")
        hidden, head = cases.head_on(device, sizes, batch, length, torch.float32)
        rows = torch.arange(min(64, batch * length), device=device)
        draws = [
            op(hidden, head, rows, cases.names_on(device, rows.shape[0])).token
            for op in (lk.sample_rows, reference.sample_rows)
        ]
    same = torch.equal(*draws)
    checks["draws of the reference"] = "right" if same else f"{int((draws[0] != draws[1]).sum())} differ"
    return checks


def sanitize(*, dry: bool) -> str:
    """What compute-sanitizer says of the small cases; they run without it where it is not installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    command = [sys.executable, "-m", "bench.gpu_small"]
    if tool is not None and not dry:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "1", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stdout + done.stderr)[-2000:]
    return "clean" if len(command) > 3 else "the small cases ran, without compute-sanitizer"


def timed(name: str, calls: Calls, sizes: Sizes, *, graphs: bool, dry: bool) -> dict[str, Any]:
    """Interleaved medians in ms, and how ours compares with the best of the others."""
    with lk.use_backend("triton"):
        ready = {key: captured(call, dry=dry) if graphs else call for key, call in calls.items()}
        medians = interleaved_medians(ready, repeats=sizes.repeats, warmup=0 if dry else 2)
    ours = min(value for key, value in medians.items() if key.startswith("ours"))
    peer = min((value, key) for key, value in medians.items() if not key.startswith("ours"))
    target = TARGETS.get(name)
    figures: dict[str, Any] = {
        "ms": {key: round(1000 * value, 4) for key, value in medians.items()},
        "best peer": peer[1],
        "speedup": round(peer[0] / ours, 3),
    }
    if target is not None:
        figures |= {"target": target, "met": peer[0] / ours >= target}
    print(f"{name}: {json.dumps(figures)}", flush=True)
    return figures


def peak_memory(device: torch.device, sizes: Sizes) -> float:
    """Peak memory of forward and backward with recomputation: all loops over one loop."""
    inputs = cases.looped_on(device, sizes, *sizes.training, BF16, grad=True)
    leaves = list(inputs.leaves().values())

    def peak(num_loops: int) -> int:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        out = cases.apply_loops(lk.looped_blocks, inputs, num_loops, recompute=True)
        torch.autograd.grad(out.sum(), leaves)
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1

    with lk.use_backend("triton"):
        peak(1)
        return peak(sizes.loops) / peak(1)


def measure(device: torch.device, sizes: Sizes, *, dry: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    fast = partial(compiled, dry=dry)
    with torch.no_grad():
        for batch, length in sizes.forward:
            inputs = cases.looped_on(device, sizes, batch, length, BF16)
            name = f"looped_blocks forward T{batch * length}"
            calls = cases.forward_calls(inputs, sizes.loops, fast)
            figures[name] = timed(name, calls, sizes, graphs=True, dry=dry)
            figures[f"{name}, no graphs"] = timed(f"{name}, no graphs", calls, sizes, graphs=False, dry=dry)
            name = f"attention B{batch} L{length}"
            calls = cases.attention_calls(device, sizes, batch, length, BF16)
            figures[name] = timed(name, calls, sizes, graphs=True, dry=dry)
            hidden, head = cases.head_on(device, sizes, batch, length, BF16)
            rows = min(64, batch * length)
            for op, calls in cases.fp8_calls(inputs, sizes.loops, hidden, head, rows).items():
                name = f"{op} fp8 weights T{batch * length}"
                figures[name] = timed(name, calls, sizes, graphs=True, dry=dry)
        for num_rows in sizes.sampled_rows:
            hidden, head = cases.head_on(device, sizes, 1, max(num_rows, 2), BF16)
            name = f"sample_rows R{num_rows}"
            calls = cases.sample_calls(hidden, head, num_rows, fast)
            figures[name] = timed(name, calls, sizes, graphs=True, dry=dry)
    batch, length = sizes.training
    inputs = cases.looped_on(device, sizes, batch, length, BF16, grad=True)
    name = f"looped_blocks forward and backward T{batch * length}"
    calls = cases.training_calls(inputs, sizes.training_loops, fast)
    figures[name] = timed(name, calls, sizes, graphs=False, dry=dry)
    hidden, head = cases.head_on(device, sizes, batch, length, BF16, grad=True)
    name = f"masked_cross_entropy forward and backward T{batch * length}"
    calls = cases.cross_entropy_calls(hidden, head, cases.rows_on(device, sizes, batch, length), fast)
    figures[name] = timed(name, calls, sizes, graphs=False, dry=dry)
    memory = peak_memory(device, sizes)
    figures["peak memory, all loops over one"] = {
        "ratio": round(memory, 3),
        "target": MEMORY_TARGET,
        "met": memory <= MEMORY_TARGET,
    }
    once = sizes._replace(repeats=1 if dry else 2)
    figures["sampling"] = timed(
        "sampling", sampling_calls(device, sizes, dry=dry), once, graphs=False, dry=dry
    )
    for name, measured in (("launch overhead", launch_overhead), ("denoising step", step_times)):
        figures[name] = measured(device, sizes, dry=dry)
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors on the CPU, interpreted")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/DATE-gpu.json")
    args = parser.parse_args()
    dry, start = args.dry_run, time.perf_counter()
    if dry and not os.environ.get("TRITON_INTERPRET"):
        sys.exit("bench.gpu: --dry-run needs TRITON_INTERPRET=1")
    if not dry and not torch.cuda.is_available():
        sys.exit("bench.gpu: torch finds no GPU on this machine; --dry-run runs the script without one")
    device, sizes = torch.device("cpu" if dry else "cuda"), TINY if dry else REAL
    checks = check_values(device, sizes)
    checks["sanitizer"] = sanitize(dry=dry)
    print(json.dumps(checks, indent=1), flush=True)
    figures = measure(device, sizes, dry=dry)
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
