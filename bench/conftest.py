"""What every benchmark records: how it compares in one interleaved run, and the limits of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import loopmdm_kernels as lk
from bench.compare import OURS, figures, measure, without_crawling, without_failing
from bench.roofline import crawls, limits, measure_peaks, unequal_limits
from loopmdm_kernels.testing import interleaved_times

HERE = Path(__file__).parent
BENCHMARKS = (
    *("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows"),
    *("drop_in", "model", "plans", "sampling", "threads"),
)
Compare = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    if why := unequal_limits():
        raise pytest.UsageError(why)


def pytest_collect_file(file_path: Path, parent: Any) -> pytest.Module | None:
    """Benchmarks have the names of what they time. Those named on the command line pytest finds itself."""
    if file_path.parent != HERE or file_path.stem not in BENCHMARKS or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


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
        peers, failed = without_failing(peers)
        if failed:
            more["failed"] = failed
        variants, once = without_crawling({OURS: ours, **peers}, flops, crawls())
        medians = measure(variants)
        medians |= {name: times[0] for name, times in interleaved_times(once, repeats=1, warmup=0).items()}
        report = figures(medians, flops=flops, dtype=dtype, bytes_read=bytes_read)
        if left_out := sorted({*peers} - {*medians}):
            more["left_out"] = left_out
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
    machine_info["cores"] = os.cpu_count()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["backends"] = lk.available_backends()
    machine_info["versions"] = {
        "loopmdm_kernels": lk.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("zentorch", "openvino") if find_spec(name)},
        "python": platform.python_version(),
    }
