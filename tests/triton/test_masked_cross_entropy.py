"""masked_cross_entropy in Triton: values and gradients against float64, and edges."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import LEAVES, assert_cross_entropy, cross_entropy_inputs
from loopmdm_kernels.testing import cross_entropy_results as run
from loopmdm_kernels.triton import head_gradients as module

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(*args, **options):
    with lk.use_backend("triton"):
        return lk.masked_cross_entropy(*args, **options)


def case(device, dtype=FLOAT, width=36, vocab_size=301, num_rows=33, **options):
    """No tile is full."""
    return cross_entropy_inputs(width, vocab_size, num_rows, dtype, device=device, **options)


def assert_case(inputs, **options):
    assert_cross_entropy(triton, inputs, total_rtol=1e-6, **options)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_values_and_gradients(device, dtype):
    assert_case(case(device, dtype))


@pytest.mark.parametrize(("width", "vocab_size", "num_rows"), [(1, 70, 9), (7, 33, 3), (65, 129, 40)])
def test_sizes(device, width, vocab_size, num_rows):
    assert_case(case(device, BF16, width, vocab_size, num_rows, excluded=False, sequences=False))


def test_weights_in_fp32_products_in_bf16(device):
    assert_case(case(device), compute_dtype=BF16)


def test_groups_of_rows(device, monkeypatch):
    """Gradients of the weight are summed over groups, the last one smaller."""
    inputs = case(device, BF16, 6, 40, num_rows=130, sequences=False)
    together = run(triton, *inputs)
    monkeypatch.setattr(module, "_GROUP_ELEMENTS", 1)
    for name, value in run(triton, *inputs).items():
        if name in ("weight", "bias"):
            torch.testing.assert_close(value, together[name], rtol=0.02, atol=0.02)
        else:
            assert torch.equal(value, together[name]), name
    assert_case(inputs)


def test_small_gradients_in_fp16(device):
    """A loss divided by a million tokens: the gradients of the logits are below what fp16 can hold."""
    inputs = case(device, HALF)
    plain, small = (run(triton, *inputs, upstream=scale, wanted=("hidden",)) for scale in (1.0, 2.0**-20))
    assert torch.equal(small["hidden"] * 2.0**20, plain["hidden"])


def test_large_logits(device):
    assert_case(case(device, spread=3000.0))


def test_no_rows(device):
    out = run(triton, *case(device, num_rows=0))
    assert out["total"].item() == 0 and out["nll"].shape == (0,)
    assert all(bool((out[name] == 0).all()) for name in LEAVES)


def test_nan_stays_in_its_row(device):
    leaves, targets, rows, excluded = case(device)
    clean = run(triton, leaves, targets, rows, excluded)
    leaves["hidden"].view(-1, 36)[rows[3], 5] = math.nan
    out = run(triton, leaves, targets, rows, excluded)
    bad = rows == rows[3]
    assert bool(out["nll"][bad].isnan().all()) and bool(out["total"].isnan().all())
    assert torch.equal(out["nll"][~bad], clean["nll"][~bad])
    assert bool(out["weight"].isnan().any())


@pytest.mark.parametrize(
    "wanted", [("weight",), ("hidden", "norm"), ("row_weights",), ("bias", "modulation")]
)
def test_only_wanted_gradients(device, wanted):
    inputs = case(device, vocab_size=40)
    expected = run(triton, *inputs)
    for name, value in run(triton, *inputs, wanted=wanted).items():
        assert torch.equal(value, expected[name]), name


def test_a_row_does_not_depend_on_the_others(device):
    leaves, targets, rows, excluded = case(device, BF16, vocab_size=70)
    nll = run(triton, leaves, targets, rows, excluded)["nll"]
    for part in (slice(0, 1), slice(3, 20)):
        leaves["row_weights"] = torch.ones_like(rows[part], dtype=FLOAT)
        assert torch.equal(run(triton, leaves, targets, rows[part], excluded)["nll"], nll[part])
