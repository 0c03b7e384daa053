"""masked_cross_entropy in Triton: values and gradients against float64, and edges."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.triton import masked_cross_entropy as module
from loopmdm_kernels.types import Head

LEAVES = ("hidden", "norm", "weight", "bias", "modulation", "row_weights")
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(*args, **options):
    with lk.use_backend("triton"):
        return lk.masked_cross_entropy(*args, **options)


def case(
    device, dtype=FLOAT, width=36, vocab_size=301, num_rows=33, excluded=True, sequences=True, **options
):
    """(leaves, targets, rows, excluded token); rows repeat, no tile is full."""
    hidden, head = head_inputs(3, 11, width, vocab_size, per_sequence_modulation=sequences, **options)
    generator = torch.Generator().manual_seed(width + vocab_size)
    excluded_token = vocab_size // 2 if excluded else -1
    targets = torch.randint(0, vocab_size - excluded, (3, 11), generator=generator)
    if excluded:
        targets += targets >= excluded_token
    rows = torch.randint(0, 33, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) + 0.5
    leaves = (3 * hidden.float(), *(t.to(dtype) for t in head[:4]), weights)
    named = dict(zip(LEAVES, (t.to(device) for t in leaves), strict=True))
    return named, targets.to(device), rows.to(device), excluded_token


def run(op, leaves, targets, rows, excluded_token, kind=None, wanted=LEAVES, upstream=1.0, **options):
    """nll and the gradients of `wanted` of upstream * (0.7 total + random . nll)."""
    leaves = {k: (t if kind is None else t.to(kind)).detach() for k, t in leaves.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    hidden, norm, weight, bias, modulation, row_weights = leaves.values()
    head = Head(norm, weight, bias, modulation, excluded_token)
    total, nll = op(hidden, head, targets, rows, row_weights, **options)
    mix = torch.randn(rows.shape[0], generator=torch.Generator().manual_seed(5)).to(nll)
    loss = upstream * (0.7 * total + (mix * nll).sum())
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    return {"total": total.detach()[None], "nll": nll.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_case(inputs, **options):
    out, baseline = (run(op, *inputs, **options) for op in (triton, reference.masked_cross_entropy))
    oracle = run(reference.masked_cross_entropy, *inputs, kind=torch.float64)
    total = (out["nll"].double() * inputs[0]["row_weights"].double()).sum()
    torch.testing.assert_close(out["total"][0], total.float(), rtol=1e-6, atol=0)
    for name in ("nll", *LEAVES):
        assert out[name].dtype == baseline[name].dtype, name
        assert_matches_oracle(out[name], baseline[name], oracle[name], name=name)


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
