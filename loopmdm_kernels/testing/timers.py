"""Timing of several variants side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved_times(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call; variants take turns, so that a slow spell of the machine hits all alike."""

    def timed(call: Callable[[], Any]) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(warmup):
        for call in variants.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            times[name].append(timed(call))
    return times


def interleaved_medians(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each variant, timed as in `interleaved_times`."""
    times = interleaved_times(variants, repeats=repeats, warmup=warmup)
    return {name: statistics.median(values) for name, values in times.items()}
