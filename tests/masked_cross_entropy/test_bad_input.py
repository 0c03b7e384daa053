"""masked_cross_entropy, and the token that ops of the head exclude: what is refused, and in which words."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head

V, MASK = 50, 49


def case():
    hidden, head = head_inputs(vocab_size=V, excluded_token=MASK)
    rows = torch.tensor([0, 3, 4, 15, 16, 31])
    head = Head(*(t.float() for t in head.tensors), MASK)
    return hidden.float(), head, torch.zeros(2, 16, dtype=torch.int64), rows, torch.ones(6)


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
    hidden, head, targets, rows, weights = case()
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
    hidden, head, targets, rows, weights = case()
    with pytest.raises(ValueError, match=r"head.excluded_token: got 50, expected -1 or 0..49"):
        lk.masked_cross_entropy(hidden, head._replace(excluded_token=50), targets, rows, weights)
