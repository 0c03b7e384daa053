"""Times on a GPU: by its own events, with warm and with flushed L2, clock and power read beside them.

Three trials of 50 calls; of calls longer than 10 ms as many as fit into half a second. Implementations take
turns from trial to trial. Before each, what a window keeps in L2 for ours is given back, so that it takes
nothing from its peers. Clocks are read, never set.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loopmdm_kernels.cuda import driver

TRIALS, CALLS = 3, 50
TRIAL_SECONDS = 0.5
WARM_SECONDS = 0.1  # before a trial: an idle GPU has a low clock
KEEP_L2 = ("cuda", "kept")  # the variants for whom a window keeps something in L2

Call = Callable[[], Any]


def measured(calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
    """For each: "ms", the median of its "trials", "cold ms", "calls" of a trial, "MHz" and "W" of each."""
    flush = torch.empty(4 * _l2_bytes(), dtype=torch.uint8, device="cuda")
    found: dict[str, dict[str, Any]] = {name: {"trials": [], "cold trials": []} for name in calls}
    for _ in range(TRIALS):
        for name, call in calls.items():
            release_l2()
            if name in KEEP_L2:
                driver.set_aside_l2(torch.cuda.current_device())
            record, count = found[name], calls_of_a_trial(call)
            milliseconds, beside = warm(call, count)
            record["trials"].append(milliseconds)
            for unit, value in beside.items():
                record.setdefault(unit, []).append(value)
            record["cold trials"].append(cold(call, count, flush))
            record["calls"] = count
    release_l2()
    return {
        name: {
            "ms": statistics.median(record["trials"]),
            "cold ms": statistics.median(record["cold trials"]),
            **record,
        }
        for name, record in found.items()
    }


def calls_of_a_trial(call: Call) -> int:
    begin, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < WARM_SECONDS or not done:
        call()
        torch.cuda.synchronize()
        done += 1
    return max(1, min(CALLS, int(TRIAL_SECONDS * done / elapsed)))


def warm(call: Call, count: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a call, one right behind the other; clock and power while the GPU is at it."""
    start, end = _events()
    start.record()
    for _ in range(count):
        call()
    end.record()
    beside = clock_and_power()
    end.synchronize()
    return start.elapsed_time(end) / count, beside


def cold(call: Call, count: int, flush: torch.Tensor) -> float:
    """The median of calls that find nothing of theirs in L2."""
    pairs = []
    for _ in range(count):
        release_l2()
        flush.zero_()
        pairs.append(_events())
        start, end = pairs[-1]
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def clock_and_power() -> dict[str, float]:
    """MHz of the multiprocessors and watts, by NVML or nvidia-smi; empty where neither answers."""
    try:
        return {"MHz": float(torch.cuda.clock_rate()), "W": round(torch.cuda.power_draw() / 1000)}
    except Exception:  # NVML has errors of its own, and its package need not be there
        pass
    card = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = ["nvidia-smi", "-i", card, "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        clock, power = (float(value) for value in said.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {"MHz": clock, "W": round(power)}


def release_l2() -> None:
    """Nothing is kept in L2 any more, for anybody; without the driver's bindings nothing ever is."""
    try:
        driver.release_l2(torch.cuda.current_device())
    except RuntimeError:
        if driver.why_unavailable(torch.cuda.get_device_capability()) is None:
            raise


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, end


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
