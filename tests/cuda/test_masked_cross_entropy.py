"""`masked_cross_entropy` of the Hopper backend, its kernels emulated: values, gradients, edges."""

import math

import pytest
import torch

from loopmdm_kernels import reference
from loopmdm_kernels.cuda import masked_cross_entropy as module
from loopmdm_kernels.cuda.masked_cross_entropy import masked_cross_entropy
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.types import Head

LEAVES = ("hidden", "norm", "weight", "bias", "modulation", "row_weights")
BF16 = torch.bfloat16
reference_op = reference.masked_cross_entropy


pytestmark = pytest.mark.usefixtures("gpu")


def case(width=72, vocab_size=301, num_rows=33, excluded=True, sequences=True, dtype=BF16, **options):
    """(leaves, targets, rows, excluded token); rows repeat, no tile is full."""
    hidden, head = head_inputs(3, 50, width, vocab_size, per_sequence_modulation=sequences, **options)
    generator = torch.Generator().manual_seed(width + vocab_size)
    excluded_token = vocab_size // 2 if excluded else -1
    targets = torch.randint(0, vocab_size - excluded, (3, 50), generator=generator)
    if excluded:
        targets += targets >= excluded_token
    rows = torch.randint(0, 150, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator) + 0.5
    leaves = (3 * hidden.float(), *(t.to(dtype) for t in head[:4]), weights)
    return dict(zip(LEAVES, leaves, strict=True)), targets, rows, excluded_token


def run(op, leaves, targets, rows, excluded_token, kind=None, wanted=LEAVES, **options):
    """nll and the gradients of `wanted` of 0.7 total + random . nll."""
    leaves = {k: (t if kind is None else t.to(kind)).detach() for k, t in leaves.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    hidden, norm, weight, bias, modulation, row_weights = leaves.values()
    head = Head(norm, weight, bias, modulation, excluded_token)
    total, nll = op(hidden, head, targets, rows, row_weights, **options)
    mix = torch.randn(rows.shape[0], generator=torch.Generator().manual_seed(5)).to(nll)
    grads = torch.autograd.grad(0.7 * total + (mix * nll).sum(), [leaves[name] for name in wanted])
    return {"total": total.detach()[None], "nll": nll.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_case(inputs, **options):
    out, baseline = (run(op, *inputs, **options) for op in (masked_cross_entropy, reference_op))
    oracle = run(reference_op, *inputs, kind=torch.float64)
    total = (out["nll"].double() * inputs[0]["row_weights"].double()).sum()
    torch.testing.assert_close(out["total"][0], total.float(), rtol=1e-6, atol=0)
    for name in ("nll", *LEAVES):
        assert out[name].dtype == baseline[name].dtype, name
        # The reference keeps the gradients of the logits in fp32; as operands of WGMMA they are bf16.
        factor = 2.0 if name == "nll" else 3.0
        assert_matches_oracle(out[name], baseline[name], oracle[name], name=name, factor=factor)


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
    assert names == ["modulated_rows_sm90", "cross_entropy_sm90", "cross_entropy_combine_sm90"]


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
    assert [name for name, _ in gpu.launches].count("cross_entropy_backward_sm90") == 2
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
