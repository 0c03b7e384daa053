"""What every benchmark records: how it compares in one interleaved run, and how far it is from the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from bench.roofline import bound_seconds
from loopmdm_kernels.testing import interleaved_medians

Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: Any) -> Compare:
    """compare(ours, peers, flops=..., bytes_read=..., dtype=...): time all in turn, report the ratio."""

    def run(
        ours: Callable[[], Any],
        peers: Mapping[str, Callable[[], Any]],
        *,
        flops: float,
        bytes_read: float,
        dtype: torch.dtype,
        repeats: int = 15,
    ) -> None:
        medians = interleaved_medians({"ours": ours, **peers}, repeats=repeats)
        best = min(peers, key=lambda name: medians[name])
        benchmark.extra_info.update(
            {
                "milliseconds": {name: round(1e3 * value, 4) for name, value in medians.items()},
                "best_peer": best,
                "speedup_over_best_peer": round(medians[best] / medians["ours"], 3),
                "gflops": round(flops / medians["ours"] / 1e9, 1),
                "gigabytes_per_second": round(bytes_read / medians["ours"] / 1e9, 2),
                "share_of_limit": round(bound_seconds(flops, bytes_read, dtype) / medians["ours"], 3),
                "threads": torch.get_num_threads(),
            }
        )
        benchmark.pedantic(ours, rounds=3, iterations=1)

    return run
