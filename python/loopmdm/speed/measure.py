"""Times, rates, memory and errors, each beside plain PyTorch in the same turns."""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import loopmdm_kernels as lk
from loopmdm.speed import peers
from loopmdm.speed.cases import BLOCKS, Case, Sizes, looped_blocks, on_backend
from loopmdm.speed.intervals import Interval, of_median, ratios
from loopmdm_kernels.backends import kernel
from loopmdm_kernels.cpu.looped_blocks import release_spare_memory
from loopmdm_kernels.testing import error_over_loops, interleaved_times, looped_inputs

REFERENCE = "reference"
_PEAK_MS = 15.0
_READ_BYTES = 2**29
_DIGITS = 5
# Of the series: loops; shares of the length, and of a batch at half the length.
LOOPS = (1, 2, 4, 8, 12)
MEMORY_LOOPS = (1, 4, 12)
LENGTHS = (0.25, 0.5, 1, 2, 4)
BATCHES = (1, 2, 4, 8)
_ERROR_LOOPS = (1, 2, 4, 8, 12, 16, 24)

Call = Callable[[], Any]
Say = Callable[[str], object]


def figure(
    case: Case, backend: str, repeats: int, others: Mapping[str, Call] | None = None
) -> dict[str, Any]:
    """Medians in ms, intervals, spreads and rates of the backend, of plain PyTorch and of other peers.

    `speedup` is that over plain PyTorch turn by turn, `ratio` that of the medians; `speedups` has all peers.
    """
    variants = {which: on_backend(which, case.call) for which in (backend, REFERENCE)} | dict(others or {})
    with FlopCounterMode(display=False) as counter:
        variants[backend]()
    flops = counter.get_total_flops()
    times = interleaved_times(variants, repeats=repeats, warmup=1)
    intervals = {which: of_median(values) for which, values in times.items()}
    medians = {which: interval.median for which, interval in intervals.items()}
    over = {
        which: of_median(ratios(values, times[backend])).rounded(_DIGITS)
        for which, values in times.items()
        if which != backend
    }
    return {
        "ms": {which: round(1000 * value, 3) for which, value in medians.items()},
        "spread": {which: round((max(v) - min(v)) / medians[which], 3) for which, v in times.items()},
        "ratio": round(medians[REFERENCE] / medians[backend], 2),
        "flops": flops,
        "gflops": {which: float(f"{flops / value / 1e9:.5g}") for which, value in medians.items()},
        "interval_ms": {which: _milliseconds(interval) for which, interval in intervals.items()},
        "speedup": over[REFERENCE],
        "speedups": over,
        "traffic": case.traffic,
    }


def _milliseconds(interval: Interval) -> list[float]:
    return Interval(*(1000 * value for value in interval)).rounded(_DIGITS)


class Peak:
    """The rate of the processor's instructions, the best of several short looks; None: it is not known."""

    def __init__(self, backend: str, device: torch.device, dtype: torch.dtype) -> None:
        self._known = backend == "cpu" and device.type == "cpu" and dtype != torch.float16
        self._narrow = dtype == torch.bfloat16
        self.gflops: float | None = None

    def measure(self) -> None:
        if self._known:
            extension: Any = importlib.import_module("loopmdm_kernels._C")
            rate = extension.cpu_peak_flops(self._narrow, torch.get_num_threads(), _PEAK_MS)
            self.gflops = max(self.gflops or 0.0, round(rate / 1e9, 1))


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading half a gigabyte once, the fastest of several times."""
    data = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=device)
    seconds = min(interleaved_times({"read": data.sum}, repeats=5, warmup=1)["read"])
    return float(f"{_READ_BYTES / seconds / 1e9:.4g}")


def peers_of(
    own: Sequence[Case], wide: Sequence[Case], say: Say
) -> tuple[dict[str, dict[str, Call]], dict[str, str]]:
    """Other ways to compute each case in plain PyTorch, and why some are not here: compiled, and in fp32.

    Compiling is done here, by a first call. wide: the cases in fp32, where `own` are of another dtype.
    "eager" is what is faster than the reference (`loopmdm.speed.peers`), where there is such.
    """
    found: dict[str, dict[str, Call]] = {case.name: {} for case in own}
    for case in own:
        if case.op in peers.OF:
            found[case.name]["eager"] = case.by(peers.OF[case.op])
    for case in wide:
        found[case.name]["eager fp32"] = case.by(_plain(case.op))
    missing: dict[str, str] = {}
    for case in own:
        say(f"  {case.name}: torch.compile ...")
        call = case.by(torch.compile(_plain(case.op), dynamic=False))
        try:
            call()
        except Exception as error:  # of the compilers that torch calls, in many types
            missing[case.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            found[case.name]["compiled"] = call
    return found, missing


def _plain(op: str) -> Callable[[Any], Any]:
    return peers.OF.get(op) or kernel(REFERENCE, op)


def series(sizes: Sizes, device: torch.device, backend: str, repeats: int, say: Say) -> dict[str, Any]:
    """Times of `looped_blocks` against S, the length and the batch, beside plain PyTorch."""
    half = sizes._replace(length=max(1, sizes.length // 2))
    lengths = sorted({max(1, round(share * sizes.length)) for share in LENGTHS})
    wanted = {
        "loops": [(s, sizes._replace(loops=s)) for s in LOOPS],
        "length": [(length, sizes._replace(length=length)) for length in lengths],
        "batch": [(batch, half._replace(batch=batch)) for batch in BATCHES],
    }
    found: dict[str, Any] = {}
    for name, points in wanted.items():
        say(f"  looped_blocks against the {name} ...")
        lines: dict[str, list[list[float]]] = {backend: [], REFERENCE: []}
        for _, at in points:
            call = looped_blocks(at, device).call
            variants = {which: on_backend(which, call) for which in lines}
            for which, values in interleaved_times(variants, repeats=repeats, warmup=1).items():
                lines[which].append(_milliseconds(of_median(values)))
        first = points[0][1]
        fixed = {"loops": first.loops, "length": first.length, "batch": first.batch}
        fixed.pop(name)
        found[name] = {"at": [value for value, _ in points], "fixed": fixed, "interval_ms": lines}
    return found


def memory(sizes: Sizes, device: torch.device, backend: str, say: Say) -> dict[str, Any]:
    """MiB that a forward and a backward pass of `looped_blocks` take at most, against S; {} where unknown."""
    say("  memory of the gradients of looped_blocks ...")
    variants = {
        backend: (backend, False),
        f"{backend}, recompute": (backend, True),
        REFERENCE: (REFERENCE, False),
    }
    lines: dict[str, list[float]] = {name: [] for name in variants}
    for loops in MEMORY_LOOPS:
        for name, (which, recompute) in variants.items():
            case = looped_blocks(sizes._replace(loops=loops), device, gradients=True, recompute=recompute)
            taken = peak_bytes(on_backend(which, case.call), device)
            if taken is None:
                return {}
            lines[name].append(round(taken / 2**20, 1))
    return {"at": list(MEMORY_LOOPS), "mib": lines}


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call takes beyond what is taken before it, or None where it cannot be known.

    On a GPU by the allocator. On a CPU by the process's pages, of which Linux keeps the maximum.
    """
    call()
    gc.collect()
    release_spare_memory()  # records of that call, which the next one would find in place
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls have left
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def errors(backend: str, device: torch.device, dtype: torch.dtype, say: Say) -> dict[str, Any]:
    """Largest errors of `looped_blocks` against float64, against S, at a small size."""
    say("  errors against float64 ...")
    inputs = looped_inputs(1, 64, 128, 4, BLOCKS).to(torch.float64, device=device)

    def ours(x: Any, *args: Any, **options: Any) -> Any:
        with lk.use_backend(backend):
            return lk.looped_blocks(x, *args, **options)

    curve = error_over_loops(ours, inputs, dtype, _ERROR_LOOPS)
    at, error, plain, step = (list(values) for values in zip(*curve, strict=True))
    return {
        "at": at,
        "shape": f"x [1, 64, 128], {BLOCKS} blocks",
        "error": {backend: error, REFERENCE: plain},
        "rounding_step": step,
    }
