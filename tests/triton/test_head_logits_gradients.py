"""Gradients of head_logits in Triton against float64, with frozen leaves and rows in several groups."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_head_gradients, head_gradients, head_inputs
from loopmdm_kernels.triton import head_gradients as module
from loopmdm_kernels.types import Head

BF16, FLOAT, HALF = torch.bfloat16, torch.float32, torch.float16
SIZES = [(1, 1, 1, 1), (2, 5, 18, 71), (3, 11, 33, 131), (1, 70, 40, 128)]


def head_logits(*args, **options):
    with lk.use_backend("triton"):
        return lk.head_logits(*args, **options)


def case(device, size, dtype=FLOAT, *, per_sequence=True):
    hidden, head = head_inputs(*size, per_sequence_modulation=per_sequence)
    return hidden.float().to(device), Head(*(t.to(device, dtype) for t in head[:4]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "compute_dtype"), [(FLOAT, None), (BF16, None), (HALF, None), (FLOAT, BF16)]
)
def test_gradients(device, size, dtype, compute_dtype):
    assert_head_gradients(head_logits, *case(device, size, dtype), compute_dtype=compute_dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_one_modulation(device, dtype):
    assert_head_gradients(head_logits, *case(device, (3, 7, 40, 70), dtype, per_sequence=False))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3)])
def test_frozen_leaves(device, wanted):
    inputs = case(device, (2, 5, 18, 71))
    everything, some = (head_gradients(head_logits, *inputs, wanted=each) for each in (range(5), wanted))
    for index, (one, other) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (one is not None) == (index in wanted)
        assert one is None or torch.equal(one, other)


def test_rows_in_groups(device, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_ELEMENTS", 1)
    assert module.rows_at_once(71, 300) == 128
    assert_head_gradients(head_logits, *case(device, (2, 150, 18, 71)))


def test_the_operator_takes_it(device):
    inputs = case(device, (2, 5, 18, 71))
    expected = head_gradients(head_logits, *inputs)
    with lk.use_backend("triton"):
        compiled = torch.compile(lk.head_logits, fullgraph=True, backend="aot_eager")
        out = head_gradients(compiled, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
