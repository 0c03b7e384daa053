"""masked_cross_entropy: values and gradients against float64, and their edges."""

import itertools
import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.testing import LEAVES, head_inputs
from loopmdm_kernels.types import Head
from tests.masked_cross_entropy.cases import (
    ALONE,
    BF16,
    FLOAT,
    HALF,
    PAIRS,
    USUAL,
    assert_same,
    case,
    check,
    run,
)

# (D, V, R): around the widths of lanes, panels, pairs, tiles (192 tokens) and chunks (768) on the CPU.
CPU_SIZES = [
    (1, 70, 9),
    (7, 97, 3),
    (32, 192, 33),
    (37, 1543, 40),
    (48, 101, 64),
    (65, 61, 100),
    (64, 2311, 7),
    (70, 197, 1),
    (33, 65, 8),
    (128, 389, 66),
]
BOTH = [(FLOAT, FLOAT), (BF16, BF16)]  # dtype of the parameters, of the products
PLAIN = {"excluded": False, "sequences": False}


def of(sizes, dtypes, *options):
    """(size, dtypes, options of the case), each with each."""
    return [(*rest, more) for *rest, more in itertools.product(sizes, dtypes, options or ({},))]


@pytest.mark.by_backend(
    "given",
    reference=of([(48, 389, 40)], BOTH),
    cpu=of(CPU_SIZES, itertools.product((FLOAT, BF16), repeat=2))
    + of([(128, 3203, 200), (40, 211, _C.CROSS_ENTROPY_GROUP_ROWS + 70)], BOTH)
    + of([(48, 389, 40)], BOTH, PLAIN, {"excluded": False}),
    triton=of([USUAL["triton"]], [*BOTH, (HALF, HALF), (FLOAT, BF16)])
    + of([(1, 70, 9), (7, 33, 3), (65, 129, 40)], [(BF16, BF16)], PLAIN),
    # Tiles of 64 and of 128 rows, one and two tiles of D, a vocabulary less and more than a chunk.
    cuda=of([(72, 601, 33), (264, 257, 150)], [(BF16, BF16)])
    + of([(200, 301, 140), (8, 40, 1)], [(BF16, BF16)], PLAIN)
    + of([(72, 301, 33)], [(FLOAT, BF16)]),
)
def test_values_and_gradients(backend, given):
    size, (dtype, compute_dtype), options = given
    check(backend, case(backend, dtype, size, **options), compute_dtype=compute_dtype)


# What dtypes say little of.
EDGE = pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[FLOAT], cuda=[BF16])


@EDGE
def test_large_logits(backend, dtype):
    check(backend, case(backend, dtype, spread=3000.0))


@pytest.mark.by_backend(
    "excluded", reference=["first", "last"], cpu=["first", "last"], triton=["last"], cuda=["first"]
)
def test_excluded_token(backend, excluded):
    leaves, targets, rows, _ = case(backend)
    excluded_token = 0 if excluded == "first" else len(leaves["bias"]) - 1
    targets[targets == excluded_token] = 7
    # The CPU does not look at its weight; the others take nothing of it, which is nothing of a number alone.
    leaves["weight"][excluded_token] = math.nan if backend.name == "cpu" else 100.0
    out = run((leaves, targets, rows, excluded_token))
    leaves["weight"][excluded_token] = 1
    assert_same(out, run((leaves, targets, rows, excluded_token)))
    assert bool((out["weight"][excluded_token] == 0).all()) and out["bias"][excluded_token] == 0
    check(backend, (leaves, targets, rows, excluded_token))


@EDGE
def test_no_rows(backend, dtype):
    leaves, targets, rows, excluded = case(backend, dtype)
    leaves["row_weights"] = leaves["row_weights"][:0]
    out = run((leaves, targets, rows[:0], excluded))
    assert out["total"].item() == 0 and out["nll"].shape == (0,)
    assert all(bool((out[name] == 0).all()) for name in LEAVES)


@EDGE
def test_rows_that_are_not_asked_for_have_no_gradient(backend, dtype):
    leaves, targets, rows, excluded = case(backend, dtype)
    others = torch.ones(targets.numel(), dtype=torch.bool, device=backend.device)
    others[rows] = False
    assert others.any()
    assert not run((leaves, targets, rows, excluded))["hidden"].flatten(0, 1)[others].any()


@EDGE
def test_nan_stays_in_its_row(backend, dtype):
    leaves, targets, rows, excluded = case(backend, dtype)
    clean = run((leaves, targets, rows, excluded))
    leaves["hidden"].flatten(0, 1)[rows[3], 5] = math.nan
    out = run((leaves, targets, rows, excluded))
    bad = rows == rows[3]
    assert bool(out["nll"][bad].isnan().all()) and bool(out["total"].isnan())
    assert torch.equal(out["nll"][~bad], clean["nll"][~bad])
    assert bool(out["weight"].isnan().any())
    others = torch.arange(targets.numel(), device=backend.device) != rows[3]
    assert torch.equal(out["hidden"].flatten(0, 1)[others], clean["hidden"].flatten(0, 1)[others])


FOUR = [("weight",), ("row_weights",), *PAIRS[:2]]


@pytest.mark.by_backend("wanted", cpu=[*ALONE, *PAIRS], triton=FOUR, cuda=FOUR)
def test_only_wanted_gradients(backend, wanted):
    inputs = case(backend)
    assert_same(run(inputs, wanted=wanted), run(inputs))


@pytest.mark.backends("triton")
def test_small_gradients_in_fp16(backend):
    """A loss divided by a million tokens: the gradients of the logits are below what fp16 can hold."""
    plain, small = (run(case(backend, HALF), upstream=s, wanted=("hidden",)) for s in (1.0, 2.0**-20))
    assert torch.equal(small["hidden"] * 2.0**20, plain["hidden"])


@pytest.mark.by_backend("size", triton=[(6, 40, 130)], cuda=[(40, 300, 300)])
def test_groups_of_rows(backend, size, monkeypatch):
    """Gradients of weight and bias are summed over groups, the last one smaller."""
    inputs = case(backend, BF16, size, sequences=False)
    together = run(inputs)
    for module in ("cuda.masked_cross_entropy", "triton.head"):
        monkeypatch.setattr(f"loopmdm_kernels.{module}._GROUP_ELEMENTS", 1)
    for name, value in run(inputs).items():
        if name in ("weight", "bias"):
            bound = 0.01 if backend.name == "cuda" else 0.02
            torch.testing.assert_close(value, together[name], rtol=bound, atol=bound)
        else:
            assert torch.equal(value, together[name]), name
    check(backend, inputs)


V, MASK = 50, 49


def exact_case(per_sequence):
    hidden, head = head_inputs(vocab_size=V, excluded_token=MASK, per_sequence_modulation=per_sequence)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V - 1, hidden.shape[:2], generator=generator)
    weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    return hidden, head, targets, torch.tensor([0, 3, 4, 15, 16, 31]), weights


def test_value_is_the_weighted_subs_cross_entropy():
    """The oracle itself, in float64."""
    hidden, head, targets, rows, weights = exact_case(True)
    logits = lk.head_logits(hidden, head)
    logits[..., MASK] -= 1e6
    log_probs = (logits - logits.logsumexp(-1, keepdim=True)).flatten(0, 1)
    expected = torch.stack([-log_probs[r, targets.flatten()[r]] for r in rows])
    total, nll = lk.masked_cross_entropy(hidden, head, targets, rows, weights)
    torch.testing.assert_close(nll, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-10, atol=1e-10)


def test_gradcheck():
    hidden, head, targets, rows, weights = exact_case(False)

    def call(hidden, norm, weight, bias, modulation, weights):
        head = Head(norm, weight, bias, modulation, MASK)
        return lk.masked_cross_entropy(hidden, head, targets, rows, weights)

    leaves = [t.requires_grad_() for t in (hidden, *head.tensors, weights)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
