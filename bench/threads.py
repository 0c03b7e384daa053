"""What a parallel region of the CPU kernels costs on torch's threads, and on threads of its own."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from loopmdm_kernels import _C

THREADS, REPEATS = 2, 201
CHOICES = {"ours": "", "own threads": "std"}  # of LOOPMDM_CPU_THREADS
ELEMENTS = 400_000  # of the torch operation: enough for it to use its threads


def region_seconds(rounds: int, after_torch: bool) -> float:
    """The median time of one region. A round is two barriers."""
    time.sleep(0.1)  # torch's threads of the last measurement have stopped spinning
    x = torch.zeros(ELEMENTS)
    times = []
    for _ in range(REPEATS):
        if after_torch:
            x.add_(1.0)
        start = time.perf_counter()
        _C.debug_parallel(THREADS, rounds)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("after_torch", [False, True], ids=["alone", "after a torch operation"])
@pytest.mark.parametrize("rounds", [0, 500], ids=["empty", "1000 barriers"])
def test_region(benchmark, monkeypatch, rounds, after_torch):
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    seconds = {}
    for name, choice in CHOICES.items():
        monkeypatch.setenv("LOOPMDM_CPU_THREADS", choice)
        seconds[name] = region_seconds(rounds, after_torch)
    torch.set_num_threads(before)
    benchmark.extra_info.update(
        {
            "milliseconds": {name: round(1e3 * value, 5) for name, value in seconds.items()},
            "best_peer": "own threads",
            "speedup": round(seconds["own threads"] / seconds["ours"], 3),
        }
    )
    monkeypatch.setenv("LOOPMDM_CPU_THREADS", "")
    benchmark.pedantic(_C.debug_parallel, (THREADS, rounds), rounds=3)
