"""`masked_cross_entropy` of the Hopper backend, its kernels emulated: values, gradients, edges."""

import math

import pytest
import torch

from loopmdm_kernels.cuda import masked_cross_entropy as module
from loopmdm_kernels.cuda.masked_cross_entropy import masked_cross_entropy
from loopmdm_kernels.testing import LEAVES, assert_cross_entropy, cross_entropy_inputs
from loopmdm_kernels.testing import cross_entropy_results as run
from loopmdm_kernels.types import Head

BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("gpu")


def case(width=72, vocab_size=301, num_rows=33, dtype=BF16, **options):
    """No tile is full."""
    return cross_entropy_inputs(width, vocab_size, num_rows, dtype, length=50, **options)


def assert_case(inputs, **options):
    # The reference keeps the gradients of the logits in fp32; as operands of WGMMA they are bf16.
    assert_cross_entropy(masked_cross_entropy, inputs, total_rtol=1e-6, gradient_factor=3.0, **options)


@pytest.mark.parametrize(
    ("width", "vocab_size", "num_rows", "sequences"),
    [(72, 601, 33, True), (200, 301, 140, False), (264, 257, 150, True), (8, 40, 1, False)],
)
def test_values_and_gradients(width, vocab_size, num_rows, sequences):
    """Tiles of 64 and of 128 rows, one and two tiles of D, a vocabulary less and more than a chunk."""
    assert_case(case(width, vocab_size, num_rows, sequences=sequences, excluded=sequences))


def test_weights_in_fp32_products_in_bf16():
    assert_case(case(dtype=torch.float32), compute_dtype=BF16)


def test_forward_keeps_no_logits(gpu):
    leaves, targets, rows, excluded = case(num_rows=140)
    hidden, *head, weights = leaves.values()
    with torch.no_grad():
        masked_cross_entropy(hidden, Head(*head, excluded), targets, rows, weights)
    names = [name for name, _ in gpu.launches]
    assert names == ["modulated_rows_sm90", "masked_cross_entropy_sm90", "masked_cross_entropy_combine_sm90"]


def test_groups_of_rows(gpu, monkeypatch):
    """Gradients of weight and bias are summed over groups, the last one smaller."""
    inputs = case(40, 300, num_rows=300, sequences=False)
    together = run(masked_cross_entropy, *inputs)
    gpu.launches.clear()
    monkeypatch.setattr(module, "_GROUP_ELEMENTS", 1)
    for name, value in run(masked_cross_entropy, *inputs).items():
        if name in ("weight", "bias"):
            torch.testing.assert_close(value, together[name], rtol=0.01, atol=0.01)
        else:
            assert torch.equal(value, together[name]), name
    assert [name for name, _ in gpu.launches].count("masked_cross_entropy_backward_sm90") == 2
    assert_case(inputs)


def test_large_logits():
    assert_case(case(spread=3000.0))


def test_no_rows():
    out = run(masked_cross_entropy, *case(num_rows=0))
    assert out["total"].item() == 0 and out["nll"].shape == (0,)
    assert all(bool((out[name] == 0).all()) for name in LEAVES)


def test_nan_stays_in_its_row():
    leaves, targets, rows, excluded = case()
    clean = run(masked_cross_entropy, leaves, targets, rows, excluded)
    leaves["hidden"].view(-1, 72)[rows[3], 5] = math.nan
    out = run(masked_cross_entropy, leaves, targets, rows, excluded)
    bad = rows == rows[3]
    assert bool(out["nll"][bad].isnan().all()) and bool(out["total"].isnan().all())
    assert torch.equal(out["nll"][~bad], clean["nll"][~bad])
    assert bool(out["weight"].isnan().any())


@pytest.mark.parametrize(
    "wanted", [("weight",), ("hidden", "norm"), ("row_weights",), ("bias", "modulation")]
)
def test_only_wanted_gradients(wanted):
    inputs = case(vocab_size=40)
    expected = run(masked_cross_entropy, *inputs)
    for name, value in run(masked_cross_entropy, *inputs, wanted=wanted).items():
        assert torch.equal(value, expected[name]), name


def test_a_row_does_not_depend_on_the_others_and_calls_repeat(gpu):
    leaves, targets, rows, excluded = case(vocab_size=600, num_rows=100)
    first = run(masked_cross_entropy, leaves, targets, rows, excluded)
    gpu.seed, gpu.multiprocessors = 4, 7
    for name, value in run(masked_cross_entropy, leaves, targets, rows, excluded).items():
        assert torch.equal(value, first[name]), name
    for part in (slice(0, 1), slice(3, 60)):
        leaves["row_weights"] = torch.ones(rows[part].shape[0])
        out = run(masked_cross_entropy, leaves, targets, rows[part], excluded)
        assert torch.equal(out["nll"], first["nll"][part])
