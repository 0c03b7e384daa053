"""looped_blocks of the CPU kernels: what they cannot do, and memory that is not there."""

import gc
import sys

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.cpu.looped_blocks import _RecordMemory
from loopmdm_kernels.testing import looped_inputs
from tests.looped_blocks.cases import run


def test_what_the_kernels_cannot_do_is_said():
    inputs = looped_inputs(1, 9, 32, 2, 1)
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="x must be float32"):
        run(inputs.to(torch.float64), 1)
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="same number of loops"):
        run(inputs.to(torch.float32), 1, dropout=0.1, exit_threshold=0.1)


def test_no_memory_for_the_records(monkeypatch):
    """The error is the allocation's alone."""
    after = []
    monkeypatch.setattr(sys, "unraisablehook", after.append)
    with pytest.raises(RuntimeError, match="alloc"):
        _RecordMemory((1 << 60,))
    gc.collect()
    assert not after
