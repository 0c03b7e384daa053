"""DistributedDataParallel, FSDP2 and FSDP1 around the kernels: two processes learn what one does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKER = Path(__file__).parent / "parallel_worker.py"


def test_cpu_kernels() -> None:
    """With and without recomputation and a static graph, sharded as a whole and by blocks, and in bf16."""
    cases = {
        "ddp recompute=False static_graph=False",
        "ddp recompute=True static_graph=True",
        "fsdp each_block=False",
        "fsdp each_block=True",
        "fsdp each_block=False hooked",
        "fsdp each_block=True hooked",
        "fsdp in bf16 each_block=False",
        "fsdp in bf16 each_block=True",
        "fsdp1 each_block=False recompute=False",
        "fsdp1 each_block=True recompute=False",
        "fsdp1 each_block=True recompute=True",
        "refused",
    }
    for printed in run_ranks(WORKER, "cpu"):
        assert set(printed.splitlines()) == cases


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="it interprets the kernels on the CPU")
def test_triton_kernels() -> None:
    for printed in run_ranks("-W", "ignore", WORKER, "triton", TRITON_INTERPRET="1"):
        assert printed.splitlines() == ["ddp recompute=True static_graph=True", "fsdp each_block=True"]
