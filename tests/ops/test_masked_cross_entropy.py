"""masked_cross_entropy: values and gradients against a computation over all logits."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs, row_rng
from loopmdm_kernels.types import Head

V, MASK = 50, 49


def case(dtype=torch.float64, *, requires_grad=False, per_sequence=True):
    hidden, head = head_inputs(vocab_size=V, excluded_token=MASK, per_sequence_modulation=per_sequence)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V - 1, hidden.shape[:2], generator=generator)
    rows = torch.tensor([0, 3, 4, 15, 16, 31])
    weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    stream = torch.promote_types(dtype, torch.float32)
    hidden = hidden.to(stream).requires_grad_(requires_grad)
    head = Head(*(t.to(dtype).requires_grad_(requires_grad) for t in head[:4]), MASK)
    return hidden, head, targets, rows, weights.to(stream)


def test_value_is_the_weighted_subs_cross_entropy():
    hidden, head, targets, rows, weights = case()
    logits = lk.head_logits(hidden, head)
    logits[..., MASK] -= 1e6
    log_probs = (logits - logits.logsumexp(-1, keepdim=True)).flatten(0, 1)
    expected = torch.stack([-log_probs[r, targets.flatten()[r]] for r in rows])
    total, nll = lk.masked_cross_entropy(hidden, head, targets, rows, weights)
    torch.testing.assert_close(nll, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_match_the_oracle(dtype):
    results = []
    for op, kind in (
        (lk.masked_cross_entropy, dtype),
        (reference.masked_cross_entropy, dtype),
        (reference.masked_cross_entropy, torch.float64),
    ):
        hidden, head, targets, rows, weights = case(kind, requires_grad=True)
        total, nll = op(hidden, head, targets, rows, weights)
        total.backward()
        results.append([total.detach()[None], nll.detach(), hidden.grad, *(t.grad for t in head[:4])])
    for name, out, baseline, oracle in zip(
        ("total", "nll", "hidden", *Head._fields[:4]), *results, strict=True
    ):
        assert_matches_oracle(out, baseline, oracle, name=name)
    assert bool((results[0][2].flatten(0, 1)[[1, 2, 5]] == 0).all())  # rows not asked for have no gradient


def test_gradcheck():
    hidden, head, targets, rows, weights = case(requires_grad=True, per_sequence=False)
    weights.requires_grad_()

    def call(hidden, norm, weight, bias, modulation, weights):
        return lk.masked_cross_entropy(
            hidden, Head(norm, weight, bias, modulation, MASK), targets, rows, weights
        )

    assert torch.autograd.gradcheck(call, (hidden, *head[:4], weights), fast_mode=True)


def test_no_rows():
    hidden, head, targets, _, _ = case(requires_grad=True)
    total, nll = lk.masked_cross_entropy(
        hidden, head, targets, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    )
    assert total.item() == 0.0 and nll.shape == (0,)
    total.backward()
    assert bool((hidden.grad == 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([32] * 6)}, ValueError, "rows: got values in 32..32, expected 0..31"),
        ({"rows": torch.tensor([-1] * 6)}, ValueError, "rows: got values in -1..-1"),
        ({"rows": torch.zeros(6)}, TypeError, "rows: got float32, expected int64"),
        ({"row_weights": torch.ones(5)}, ValueError, r"row_weights: got shape \[5\], expected \[6\]"),
        ({"targets": torch.full((2, 16), V)}, ValueError, "targets: got values in 50..50, expected 0..49"),
        (
            {"targets": torch.full((2, 16), MASK)},
            ValueError,
            "targets: a row's target is the excluded token 49",
        ),
        (
            {"hidden": torch.zeros(2, 16, 31)},
            ValueError,
            r"head.weight: got shape \[50, 32\], expected \[V, 31\]",
        ),
    ],
)
def test_bad_input(change, error, message):
    hidden, head, targets, rows, weights = case(torch.float32)
    arguments = {"hidden": hidden, "head": head, "targets": targets, "rows": rows, "row_weights": weights}
    with pytest.raises(error, match=message):
        lk.masked_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("token", [2.0, float("nan"), True, None, "2", torch.tensor(2)])
@pytest.mark.parametrize("op", ["masked_cross_entropy", "head_logits", "sample_rows"])
def test_an_excluded_token_that_is_no_int(op, token):
    hidden, head, targets, rows, weights = case()
    others = {"masked_cross_entropy": (targets, rows, weights), "sample_rows": (rows, row_rng(len(rows)))}
    with pytest.raises(TypeError, match=r"head.excluded_token: got .*, expected -1 or 0..49"):
        getattr(lk, op)(hidden, head._replace(excluded_token=token), *others.get(op, ()))


def test_excluded_token_out_of_range():
    hidden, head, targets, rows, weights = case(torch.float32)
    with pytest.raises(ValueError, match=r"head.excluded_token: got 50, expected -1 or 0..49"):
        lk.masked_cross_entropy(hidden, head._replace(excluded_token=50), targets, rows, weights)
