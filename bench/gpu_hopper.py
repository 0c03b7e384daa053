"""The Hopper kernels on a GPU: the facts of bench/probes, then the kernels beside their peers and limits.

    python -m bench.gpu_hopper              on an H100 or H200: writes bench/results/DATE-gpu-hopper.json
    python -m bench.gpu_hopper --dry-run    without one: every path of this script that a CPU can take

The result file is written anew after every phase. A phase that would not end within --minutes is skipped,
which the file says: those at 256 and 4096 tokens come last. The ceilings that were found go to
loopmdm_kernels/schedule/measured.json, from where the op takes them when it chooses tiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from bench import looped_blocks, masked_cross_entropy, model, sample_rows
from bench.gpu import RESULTS, ROOT, sanitizer, under_sanitizer
from bench.probes import hopper_facts
from bench.probes.hopper_facts import SMALL, Run
from bench.report import write
from bench.run import REAL, TINY, Call, Calls, Figure, Figures
from bench.targets import DRAM_RATIO, HOPPER_TARGETS, LIMIT_SHARES, SUDOKU_SECONDS
from loopmdm_kernels.cuda import driver, targets
from loopmdm_kernels.cuda import looped_blocks as blocks
from loopmdm_kernels.schedule import Device, choose, measured

LOOPS = 12
TOKENS = (32, 128, 256, 512, 1024, 4096)
TOOLS = ("memcheck", "racecheck", "synccheck")


def with_heads_of_64(run: Run, *, hidden: int | None = None) -> Run:
    """The widths of the small model, or those given; kernels take no heads of 8."""
    hidden = hidden or (64 if run.dry else SMALL.hidden)
    return run._replace(other_sizes=run.sizes._replace(hidden=hidden, heads=hidden // 64))


def forced(run: Run, backend: str, call: Call) -> Call:
    def on_backend() -> Any:
        with lk.use_backend("reference" if run.dry else backend):
            return call()

    return on_backend


def on_backends(run: Run, calls: Calls, ours: str = "ours") -> dict[str, Call]:
    """The peers, and ours by CUDA and by Triton."""
    peers = {name: call for name, call in calls.items() if not name.startswith("ours")}
    return {**{name: forced(run, name, calls[ours]) for name in ("cuda", "triton")}, **peers}


def beside_peers(tokens: int, run: Run) -> Figures:
    """Seconds of 12 loops in a CUDA graph: ours, with and without a window of L2; Triton; torch.compile.

    torch.compile compiles one loop, which the graph repeats: S of them would take it minutes.
    """
    inputs = with_heads_of_64(run).looped(1, 4 if run.dry else tokens)
    calls = on_backends(run, looped_blocks.forward_calls(inputs, LOOPS, run.compiled))

    def without_window() -> Call:
        kept, driver.l2_window = driver.l2_window, lambda *_: None  # type: ignore[assignment]
        try:
            return run.captured(calls["cuda"])
        finally:
            driver.l2_window = kept

    makers = {
        "cuda": partial(run.captured, calls["cuda"]),
        "cuda without window": without_window,
        "triton": partial(run.captured, calls["triton"]),
        "torch.compile": partial(run.captured, calls["compiled"]),
    }
    with torch.no_grad():
        graphs, failed = run.made(makers)
        return {**failed, **run.seconds(graphs)}


def training(run: Run) -> Figures:
    """Seconds forward and backward through 4 loops of 8 sequences of 1024 tokens, without a graph."""
    batch, length = (2, 4) if run.dry else (8, 1024)
    inputs = with_heads_of_64(run).looped(batch, length, grad=True)
    calls = on_backends(run, looped_blocks.training_calls(inputs, 4, run.compiled), "ours, recomputed")
    calls["torch.compile"] = calls.pop("compiled")
    return run.seconds(calls)


def sampled_rows(num_rows: int, run: Run) -> Figures:
    """Seconds of a draw for each row, in CUDA graphs. Few rows read the weight; many multiply by it."""
    with torch.no_grad():
        calls = on_backends(run, sample_rows.gpu_calls(run, min(num_rows, max(run.sizes.sampled_rows))))
        return run.seconds({name: run.captured(call) for name, call in calls.items()})


def cross_entropy(run: Run) -> Figures:
    """Seconds of the loss of every second of 16384 tokens and all its gradients."""
    return run.seconds(on_backends(run, masked_cross_entropy.gpu_calls(run)))


def dram_bytes(run: Run) -> Figures:
    """Bytes read from DRAM by one call with S = 1 and S = 24, as Nsight Compute counts them."""
    figures: Figures = {}
    for loops in (1, 24):
        if run.dry:
            figures[f"S{loops}"] = None
        elif shutil.which("ncu") is None:
            figures[f"S{loops}"] = "ncu is not installed, and nothing else here counts DRAM bytes"
        else:
            command = [
                "ncu", "--metrics", "dram__bytes_read.sum", "--csv", "--print-units", "base",
                "--kernel-name", "looped_blocks_sm90",
                sys.executable, "-m", "bench.gpu_hopper", "--once", str(loops),
            ]  # fmt: skip
            figures[f"S{loops}"] = counted(
                subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
            )
    return figures


def counted(done: subprocess.CompletedProcess[str]) -> Figure:
    """The last number of the profiler's CSV, or what it says instead, such as that it has no permission."""
    lines = done.stdout.strip().splitlines()
    try:
        return float(lines[-1].split('","')[-1].strip('"').replace(",", ""))
    except (IndexError, ValueError):
        said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        return said[-1] if said else f"ncu ended with {done.returncode} and no figure"


def sanitizers(run: Run) -> Figures:
    """Exit status of small cases of all kernels under each tool of compute-sanitizer: 0 is clean."""
    arguments = ("bench.gpu_hopper", "--once", "2", "--small")
    program = sanitizer()
    if run.dry:  # what the tools would watch
        under_sanitizer([], *arguments, "--dry-run").check_returncode()
        return dict.fromkeys(TOOLS)
    if program is None:
        return dict.fromkeys(TOOLS, "compute-sanitizer is not installed")
    figures: Figures = {}
    for tool in TOOLS:
        try:
            done = under_sanitizer([program, tool], *arguments, timeout=100)
            figures[tool] = float(done.returncode)
            if done.returncode:
                say((done.stdout + done.stderr)[-3000:])
        except subprocess.TimeoutExpired:
            figures[tool] = "not done after 100 s"
    return figures


def once(loops: int, run: Run, *, small: bool) -> None:
    """For a profiler, one call at 128 tokens; for a sanitizer, small ones of all kernels."""
    inputs = with_heads_of_64(run, hidden=128 if small else SMALL.hidden).looped(1, 70 if small else 128)
    with torch.no_grad(), lk.use_backend("reference" if run.dry else "cuda"):
        for target in (targets.SM90, targets.SM80._replace(architecture="sm_90"))[: 1 + small]:
            blocks.target_of = lambda capability, target=target: target  # type: ignore[assignment]
            looped_blocks.applied(lk.looped_blocks, inputs, loops)
            run.synchronize()
    if small:
        small_heads(run._replace(other_sizes=TINY._replace(hidden=72, vocab_size=700)))


def small_heads(run: Run) -> None:
    """Blocks of 64 rows and pairs of 128, chunks that are not whole."""
    for length in (40, 200):
        hidden, head = run.head(2, length, grad=True)
        chosen = run.rows(2, length)
        with lk.use_backend("reference" if run.dry else "cuda"):
            total, _ = lk.masked_cross_entropy(hidden, head, *chosen)
            torch.autograd.grad(total, [hidden, *head[:4]])
            with torch.no_grad():
                lk.head_logits(hidden, head)
                lk.sample_rows(hidden, head, chosen[1], run.names(chosen[1].shape[0]))
    run.synchronize()


# Of the vocabulary head.
HEAD_PHASES: dict[str, Callable[[Run], Figures]] = {
    **{f"sample_rows_R{rows}": partial(sampled_rows, rows) for rows in REAL.sampled_rows},
    "masked_cross_entropy": cross_entropy,
}
PHASES: dict[str, Callable[[Run], Figures]] = {
    "barriers": hopper_facts.barriers,
    "clusters": hopper_facts.clusters,
    "l2_reads": hopper_facts.l2_reads,
    "multicast": hopper_facts.multicast,
    "attention_peers": hopper_facts.attention_peers,
    "products": hopper_facts.products,
    "gaps": hopper_facts.gaps,
    **{f"T{tokens}": partial(beside_peers, tokens) for tokens in (128, 1024, 32, 512)},
    "sudoku": model.sudoku_on_gpu,
    **HEAD_PHASES,
    "dram_bytes": dram_bytes,
    "sanitizers": sanitizers,
    "training": training,
    **{f"T{tokens}": partial(beside_peers, tokens) for tokens in (256, 4096)},
}

# Seconds of a phase that starts cold, estimated from what it compiles and repeats: a kernel of the op 3 to 6,
# one of Triton 1 to 2, one loop by torch.compile with autotuning 20 to 30, a process under a tool 15 to 25.
EXPECTED = {
    **{f"T{tokens}": 45.0 for tokens in TOKENS},
    "sudoku": 30.0,
    "dram_bytes": 30.0,
    "sanitizers": 75.0,
    "training": 45.0,
    **{f"sample_rows_R{rows}": 25.0 for rows in REAL.sampled_rows},
    "masked_cross_entropy": 40.0,
}
SHORT = 5.0  # every other


def ceilings(figures: Mapping[str, Figures]) -> dict[str, float]:
    """Those of the cost model's ceilings that the facts have a figure for."""
    batch, heads, length, head_dim = hopper_facts.ATTENTION
    attention = 4 * batch * heads * length * length * head_dim
    flops = {name: 2 * SMALL.length * inner * width for name, (inner, width) in hopper_facts.PRODUCTS.items()}

    def best(phase: str, work: Callable[[str, float], float]) -> float | None:
        known = figures.get(phase, {}).items()
        return max((work(name, value) for name, value in known if isinstance(value, float)), default=None)

    found = {
        "product_flops": best("products", lambda name, seconds: flops[name] / seconds),
        "attention_flops": best("attention_peers", lambda _, seconds: attention / seconds),
        "l2_bytes": best("l2_reads", lambda name, value: value if name != "one SM" else 0.0),
        "sm_bytes": figures.get("l2_reads", {}).get("one SM"),
        "wait_seconds": hopper_facts.scaled(figures.get("barriers", {}).get("row counters"), 1e-6),
        "cluster_wait_seconds": hopper_facts.scaled(
            figures.get("barriers", {}).get(f"cluster of {Device().cluster}"), 1e-6
        ),
    }
    return {name: value for name, value in found.items() if isinstance(value, float)}


def verdicts(figures: Mapping[str, Figures]) -> dict[str, bool | None]:
    """Whether each target is met; None where a figure is missing."""
    device = Device()._replace(**ceilings(figures))

    def at_least(numerator: Figure, denominator: Figure, target: float) -> bool | None:
        if not isinstance(numerator, float) or not isinstance(denominator, float):
            return None
        return numerator / denominator >= target

    def fastest(phase: Figures) -> Figure:
        known = [value for value in phase.values() if isinstance(value, float)]
        return min(known, default=None)

    def seconds(tokens: int, name: str) -> Figure:
        return figures.get(f"T{tokens}", {}).get(name)

    result = {}
    for tokens, target in HOPPER_TARGETS.items():
        result[f"T{tokens}: {target} times torch.compile"] = at_least(
            seconds(tokens, "torch.compile"), seconds(tokens, "cuda"), target
        )
    for tokens in TOKENS:
        result[f"T{tokens}: no slower than Triton"] = at_least(
            seconds(tokens, "triton"), seconds(tokens, "cuda"), 1.0
        )
    for tokens, share in LIMIT_SHARES.items():
        limit = LOOPS * choose(SMALL._replace(length=tokens), device).limit_seconds
        result[f"T{tokens}: {share} of the limit"] = at_least(limit, seconds(tokens, "cuda"), share)
    call = figures.get("sudoku", {}).get("cuda")
    result[f"Sudoku: {1e6 * SUDOKU_SECONDS:.0f} us"] = at_least(SUDOKU_SECONDS, call, 1.0)
    for name in HEAD_PHASES:
        others = {**figures.get(name, {})}
        ours = others.pop("cuda", None)
        result[f"{name}: fastest"] = at_least(fastest(others), ours, 1.0)
    dram = figures.get("dram_bytes", {})
    result["DRAM bytes do not grow with S"] = at_least(dram.get("S1"), dram.get("S24"), 1 / DRAM_RATIO)
    for tool in TOOLS:
        status = figures.get("sanitizers", {}).get(tool)
        result[f"{tool} is clean"] = status == 0.0 if isinstance(status, float) else None
    return result


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(run: Run, minutes: float, target: Path | None) -> dict[str, Any]:
    """All phases; `target` is written after each. A phase that fails says why and ends nothing."""
    begin = time.perf_counter()
    if not run.dry:
        torch.cuda.synchronize()  # makes the context in which the probes are loaded
    figures: dict[str, Figures] = {}
    skipped: list[str] = []
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": "none: dry run" if run.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "figures": figures,
        "skipped": skipped,
        "ceilings": {},
        "targets": verdicts(figures),
    }
    total = sum(EXPECTED.get(name, SHORT) for name in PHASES)
    say(f"{len(PHASES)} phases, estimated at {total / 60:.1f} minutes; there are {minutes:.1f}")
    for name, phase in PHASES.items():
        elapsed = time.perf_counter() - begin
        expected = EXPECTED.get(name, SHORT)
        if elapsed + expected > 60 * minutes:
            skipped.append(name)
            say(f"{elapsed:6.1f} s  {name}: skipped, {expected:.0f} s would be too long")
            continue
        say(f"{elapsed:6.1f} s  {name}")
        try:
            figures[name] = phase(run)
        except Exception as error:
            if run.dry:
                raise
            figures[name] = {"failed": str(error).splitlines()[0]}
        result |= {
            "seconds": round(time.perf_counter() - begin, 1),
            "ceilings": ceilings(figures),
            "targets": verdicts(figures),
        }
        if target is not None:
            write(result, target)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what decides about the Hopper kernels.")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, time nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="a phase that would be longer is skipped")
    parser.add_argument("--once", type=int, metavar="S", help="one call with S loops, for a profiler")
    parser.add_argument("--small", action="store_true", help="with --once: small, and of all kernels")
    options = parser.parse_args()
    if options.once:
        once(options.once, Run(options.dry_run), small=options.small)
        return 0
    today = datetime.date.today().isoformat()
    target = None if options.dry_run else RESULTS / f"{today}-gpu-hopper.json"
    result = measure(Run(options.dry_run), options.minutes, target)
    if target is not None and result["ceilings"]:
        measured.record(result["machine"], result["ceilings"], f"bench/results/{target.name}")
    print(json.dumps(result, indent=2))
    return int(False in result["targets"].values())


if __name__ == "__main__":
    sys.exit(main())
