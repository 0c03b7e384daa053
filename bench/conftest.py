"""What every benchmark records: how it compares in one interleaved run, and the limits of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from bench.compare import OURS, figures, measure
from bench.roofline import limits, measure_peaks

Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: Any) -> Compare:
    """compare(ours, peers, flops=..., dtype=..., bytes_read=None, **more): time all in turn, report."""

    def run(
        ours: Callable[[], Any],
        peers: Mapping[str, Callable[[], Any]],
        *,
        flops: float,
        dtype: torch.dtype,
        bytes_read: float | None = None,
        **more: Any,
    ) -> None:
        measure_peaks()
        medians = measure({OURS: ours, **peers})
        report = figures(medians, flops=flops, dtype=dtype, bytes_read=bytes_read)
        benchmark.extra_info.update(report, **more)
        benchmark.pedantic(ours, rounds=1, iterations=1)

    return run


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compiled code is kept per function; beyond a number of variants torch would silently run it eagerly."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["limits"] = limits()
