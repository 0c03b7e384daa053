"""The ops on a GPU beside their peers and limits, and the facts of bench/probes about the Hopper kernels.

    python -m bench.gpu_hopper              on an H100 or H200: these phases of `python -m bench.gpu` alone
    python -m bench.gpu_hopper --dry-run    without one: every path that a CPU can take

The ceilings that were found go to loopmdm_kernels/schedule/measured.json, from where the op takes them when
it chooses tiles.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import looped_blocks, masked_cross_entropy, model, sample_rows
from bench.gpu_checks import environment, needs_hopper, run_of, why_no_gpu
from bench.gpu_times import clock_and_power
from bench.phases import ROOT, Findings, Phase, Result, Script, main
from bench.probes import hopper_facts, hopper_phases
from bench.probes.hopper_facts import SMALL, SUDOKU, Run
from bench.run import REAL, Call, Calls, Figure, Figures
from bench.targets import DRAM_RATIO, HOPPER_TARGETS, LIMIT_SHARES, SUDOKU_SECONDS, TRITON_TARGETS
from loopmdm_kernels.cuda import driver
from loopmdm_kernels.schedule import Device, choose, choose_rows, measured

CASES = (128, 1024, 512, 4096)  # whose times the cost model is held to
TOKENS = {**{length: (1, length) for length in (32, 128, 256, 512, 1024, 4096)}, 16384: (16, 1024)}
OURS = ("cuda", "triton")


def beside_peers(tokens: int, run: Run) -> Iterator[Figures]:
    """12 loops in a CUDA graph: by CUDA with and without a window of L2, by Triton, eager, by torch.compile.

    torch.compile compiles one loop, which the graph repeats: S of them would take it minutes.
    """
    inputs = run.looped(*(run.sizes.forward[0] if run.dry else TOKENS[tokens]))
    calls = looped_blocks.forward_calls(inputs, run.sizes.loops, run.compiled)
    ours = run.on_backends(calls["ours"])

    def without_window() -> Call:
        kept, driver.l2_window = driver.l2_window, lambda *_: None  # type: ignore[assignment]
        try:
            return run.captured(ours["cuda"])
        finally:
            driver.l2_window = kept

    makers = {name: partial(run.captured, call) for name, call in ours.items()}
    with torch.no_grad():
        graphs, failed = run.made({**makers, "cuda without window": without_window})
        yield {**failed, **run.times(graphs)}
        peers = {"eager": calls["eager"], "torch.compile": calls["compiled"]}
        more, failed = run.made({name: partial(run.captured, call) for name, call in peers.items()})
        yield {**failed, **run.times({**graphs, **more})}


def training(run: Run) -> Iterator[Figures]:
    """Forward and backward through 6 loops of 16 sequences of 1024 tokens, without a graph."""
    inputs = run.looped(*run.sizes.training, grad=True)
    calls = looped_blocks.training_calls(inputs, run.sizes.training_loops, run.compiled)
    ours = run.on_backends(calls["ours, recomputed"])
    ours["triton, nothing recomputed"] = run.on_backends(calls["ours"])["triton"]
    yield run.times(ours)
    yield run.times({**ours, "torch.compile": calls["compiled"]})


def sampled_rows(num_rows: int, run: Run) -> Iterator[Figures]:
    """A draw for each row, in CUDA graphs. Few rows read the weight; many multiply by it."""
    with torch.no_grad():
        yield from in_graphs(sample_rows.gpu_calls(run, min(num_rows, max(run.sizes.sampled_rows))), run)


def in_graphs(calls: Calls, run: Run) -> Iterator[Figures]:
    ours = {name: partial(run.captured, call) for name, call in run.on_backends(calls["ours"]).items()}
    graphs, failed = run.made(ours)
    yield {**failed, **run.times(graphs)}
    peers, failed = run.made({n: partial(run.captured, call) for n, call in calls.items() if n != "ours"})
    yield {**failed, **run.times({**graphs, **peers})}


def cross_entropy(run: Run) -> Iterator[Figures]:
    """The loss of every second of 16384 tokens and all its gradients."""
    calls = dict(masked_cross_entropy.gpu_calls(run))
    ours = run.on_backends(calls.pop("ours"))
    yield run.times(ours)
    yield run.times({**ours, **calls})


def fact(found: Callable[[Run], Figures], run: Run) -> Figures:
    """Figures of a probe, with clock and power right behind it."""
    needs_hopper(run)
    return {**found(run), "now": None if run.dry else dict(clock_and_power())}


def dram_bytes(run: Run) -> Figures:
    """Bytes read from DRAM by one call with S = 1 and S = 24, as Nsight Compute counts them."""
    needs_hopper(run)
    figures: Figures = {}
    for loops in (1, 24):
        if run.dry:
            figures[f"S{loops}"] = None
        elif shutil.which("ncu") is None:
            figures[f"S{loops}"] = "ncu is not installed, and nothing else here counts DRAM bytes"
        else:
            command = [
                "ncu", "--clock-control", "none", "--metrics", "dram__bytes_read.sum", "--csv",
                "--print-units", "base", "--kernel-name", "looped_blocks_sm90",
                sys.executable, "-m", "bench.gpu_small", "once", str(loops),
            ]  # fmt: skip
            figures[f"S{loops}"] = counted(
                subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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


def at(tokens: int) -> dict[str, Phase]:
    first = tokens == 128
    phase = Phase(partial(beside_peers, tokens), 60, quick=tokens in CASES, dry=first)
    return {f"T{tokens}": phase}


# Of the vocabulary head.
HEAD_PHASES = {
    **{
        f"sample_rows_R{rows}": Phase(partial(sampled_rows, rows), 60, dry=rows == REAL.sampled_rows[0])
        for rows in REAL.sampled_rows
    },
    "masked_cross_entropy": Phase(cross_entropy, 90),
}
# What the cost model assumes comes first.
ASSUMED = (
    "barriers", "l2_reads", "loads", "products", "gaps", "multicast", "attention_peers", "narrow_blocks",
)  # fmt: skip
FACTS = {
    name: Phase(partial(fact, getattr(hopper_facts, name)), 25, quick=name in ASSUMED)
    for name in (*ASSUMED, "clusters")
}
# The kernel's phases one by one, which say where a loop differs from the model.
ONE_BY_ONE = {
    "heads": Phase(partial(fact, hopper_phases.heads), 60, quick=True),
    **{
        f"phases_{tokens}": Phase(
            partial(fact, partial(hopper_phases.phases, tokens)), 60, quick=True, dry=tokens == 128
        )
        for tokens in hopper_phases.TOKENS
    },
}
PHASES = {
    "environment": Phase(environment, 30, quick=True),
    **at(128), **at(1024), **{name: FACTS[name] for name in ASSUMED}, **ONE_BY_ONE, **at(512),
    "sudoku": Phase(partial(fact, model.sudoku_on_gpu), 60, quick=True),
    "training": Phase(training, 90, quick=True),
    **at(4096), **FACTS, **at(32), **HEAD_PHASES, **at(16384), **at(256),
    "dram_bytes": Phase(dram_bytes, 60),
}  # fmt: skip


def ceilings(figures: Mapping[str, Findings]) -> dict[str, float]:
    """Those of the cost model's ceilings that the facts have a figure for."""
    batch, heads, length, head_dim = hopper_facts.ATTENTION
    attention = 4 * batch * heads * length * length * head_dim
    flops = {name: 2 * SMALL.length * inner * width for name, (inner, width) in hopper_facts.PRODUCTS.items()}

    def best(phase: str, work: Callable[[str, float], float]) -> float | None:
        known = figures.get(phase, {}).items()
        return max((work(name, value) for name, value in known if isinstance(value, float)), default=None)

    def seconds(phase: str, name: str) -> float:
        """NaN where there is no figure."""
        value = figures.get(phase, {}).get(name)
        return 1e-6 * value if isinstance(value, float) else math.nan

    sm_bytes = figures.get("l2_reads", {}).get("one SM")
    step, plan = seconds("narrow_blocks", "step"), choose_rows(SUDOKU)
    assert plan is not None
    sent = plan.handed_over_bytes(SUDOKU) / sm_bytes if isinstance(sm_bytes, float) else math.nan
    found = {
        "product_flops": best("products", lambda name, seconds: flops[name] / seconds),
        "attention_flops": best("attention_peers", lambda _, seconds: attention / seconds),
        "l2_bytes": best("l2_reads", lambda name, value: value if name != "one SM" else 0.0),
        "sm_bytes": sm_bytes,
        # The probe signals and polls; what then is loaded comes behind.
        "wait_seconds": seconds("barriers", "row counters") + seconds("narrow_blocks", "box"),
        "load_seconds": seconds("loads", "load"),
        "head_alone": 2 * seconds("heads", "one head") / seconds("heads", "two heads"),
        "cluster_wait_seconds": seconds("narrow_blocks", "hand-over") - step - sent,
        "shared_read_bytes": figures.get("narrow_blocks", {}).get("bytes of products"),
        "meet_seconds": step,
        "node_seconds": seconds("gaps", "in order"),
    }
    alone, pairs = (figures.get("multicast", {}).get(name) for name in ("alone", "pairs"))
    if isinstance(alone, float) and isinstance(pairs, float):  # bytes that reach all SMs, in a second
        found["multicast_cost"] = min(max(2 * alone / pairs, 1.0), 2.0)
    return {name: value for name, value in found.items() if isinstance(value, float) and value > 0}


def verdicts(figures: Mapping[str, Findings]) -> dict[str, bool | None]:
    """Whether each target is met; None where a figure is missing."""
    device = Device()._replace(**ceilings(figures))

    def milliseconds(phase: str, name: str) -> float | None:
        found = figures.get(phase, {}).get(name)
        return found["ms"] if isinstance(found, dict) else None

    def at_least(numerator: object, denominator: object, target: float) -> bool | None:
        if not isinstance(numerator, float) or not isinstance(denominator, float):
            return None
        return numerator / denominator >= target

    result = {}
    for tokens, target in HOPPER_TARGETS.items():
        times = (milliseconds(f"T{tokens}", name) for name in ("torch.compile", "cuda"))
        result[f"T{tokens}: {target} times torch.compile"] = at_least(*times, target)
    for tokens in TOKENS:
        times = (milliseconds(f"T{tokens}", name) for name in ("triton", "cuda"))
        result[f"T{tokens}: no slower than Triton"] = at_least(*times, 1.0)
    for tokens, share in LIMIT_SHARES.items():
        limit = 1000 * REAL.loops * choose(SMALL._replace(length=tokens), device).limit_seconds
        result[f"T{tokens}: {share} of the limit"] = at_least(
            limit, milliseconds(f"T{tokens}", "cuda"), share
        )
    call = milliseconds("sudoku", "cuda")
    result[f"Sudoku: {1e6 * SUDOKU_SECONDS:.0f} us"] = at_least(1000 * SUDOKU_SECONDS, call, 1.0)

    def best(phase: str, without: tuple[str, ...]) -> float | None:
        """Of the implementations whose names do not begin so."""
        names = [name for name in figures.get(phase, {}) if not name.startswith(without)]
        return min(filter(None, (milliseconds(phase, name) for name in names)), default=None)

    for phase in HEAD_PHASES:
        result[f"{phase}: fastest"] = at_least(best(phase, ("cuda",)), milliseconds(phase, "cuda"), 1.0)
    for phase, target in TRITON_TARGETS.items():
        times = best(phase, OURS), milliseconds(phase, "triton")
        result[f"{phase}, Triton: {target} times the best peer"] = at_least(*times, target)
    dram = figures.get("dram_bytes", {})
    result["DRAM bytes do not grow with S"] = at_least(dram.get("S1"), dram.get("S24"), 1 / DRAM_RATIO)
    return result


def conclude(figures: Mapping[str, Findings]) -> dict[str, Any]:
    found = ceilings(figures)
    device = Device()._replace(**found)
    beside = {
        f"{tokens} tokens": hopper_phases.beside_model(tokens, figures[f"phases_{tokens}"], device)
        for tokens in hopper_phases.TOKENS
        if f"phases_{tokens}" in figures
    }
    return {"ceilings": found, "targets": verdicts(figures), "beside the model": beside}


def keep(result: Result) -> None:
    """The ceilings of a result, for the cost model."""
    if result.get("ceilings"):
        name = result["phases"]["environment"]["figures"]["GPU"]
        measured.record(name, result["ceilings"], Path(result["file"]).name)


if __name__ == "__main__":
    sys.exit(main(Script("gpu-hopper", PHASES, run_of, why_no_gpu, conclude, keep), __doc__))
