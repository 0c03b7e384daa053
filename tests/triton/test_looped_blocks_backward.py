"""Gradients of looped_blocks in Triton: of every input, kept or recomputed."""

import pytest
import torch

from loopmdm_kernels.testing import looped_inputs
from tests.triton.looped_cases import check_gradients, gradients, on, triton

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("dtype", "blocks"), [(FLOAT, 1), (BF16, 2), (HALF, 1)])
def test_values(device, dtype, blocks):
    inputs = looped_inputs(2, 9, 48, 3, blocks, 2, per_sequence_modulation=True, key_mask=True)
    check_gradients(on(inputs, device), 2, dtype, recompute=True)


@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads"), [(1, 1, 24, 1), (2, 33, 20, 2), (1, 40, 68, 1)]
)
def test_sizes(device, batch, length, hidden, heads):
    check_gradients(on(looped_inputs(batch, length, hidden, heads, 1, 2), device), 2, BF16)


def test_dropout(device):
    inputs = on(looped_inputs(2, 5, 32, 2, 1, 1, rotary=False), device)
    check_gradients(inputs, 2, FLOAT, dropout=0.25, dropout_seed=7)


def test_sequences_that_stop_early(device):
    inputs = on(looped_inputs(3, 5, 32, 2, 1, 2), device)
    check_gradients(inputs, torch.tensor([1, 3, 2], device=device), FLOAT, recompute=True)
    wide = inputs.to(FLOAT)
    _, used = triton(wide.x, wide.blocks, wide.modulation, 4, num_heads=2, exit_threshold=0.75)
    assert int(used.max()) < 4
    check_gradients(inputs, 4, BF16, exit_threshold=0.75, rotary=None)


def test_kept_and_recomputed_agree_to_the_bit(device):
    inputs = on(looped_inputs(1, 5, 32, 2, 2, 1), device).to(BF16)
    kept, again = (
        gradients(inputs, 2, recompute=recompute, dropout=0.1, dropout_seed=1) for recompute in (False, True)
    )
    for name, grad in kept.items():
        assert grad.dtype == (FLOAT if name == "x" else BF16)
        assert torch.equal(grad, again[name]), name


def test_sums_over_loops_are_in_fp32(device):
    """bf16 gradients are those of the same values in fp32, rounded once after the last of many loops."""
    inputs = on(looped_inputs(1, 5, 16, 1, 1), device).to(BF16)
    narrow = gradients(inputs, 4)
    for name, grad in gradients(inputs.to(FLOAT), 4, compute_dtype=BF16).items():
        assert torch.equal(narrow[name], grad.to(narrow[name].dtype)), name
