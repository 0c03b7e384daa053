"""Scalar arguments at and beyond their ranges, of every type of number; over every backend here."""

import numpy as np
import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.ops import checks
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head

EXCLUDED = 0  # the lowest id, which a tie would go to
RESTRICTIONS = [{}, {"top_k": 1}, {"top_k": 3}, {"top_k": 50}, {"top_p": 1e-300}, {"top_p": 0.5, "top_k": 5}]


pytestmark = pytest.mark.backends("reference", "best")


def head_case(spread: float = 2.0) -> tuple[torch.Tensor, Head]:
    hidden, head = head_inputs(1, 16, 16, 50, excluded_token=EXCLUDED, spread=spread)
    return hidden.float(), Head(*(tensor.float() for tensor in head[:4]), EXCLUDED)


def draw(spread: float = 2.0, **options):
    hidden, head = head_case(spread)
    return lk.sample_rows(hidden, head, torch.arange(16), row_rng(16), **options)


@pytest.mark.parametrize("kept", RESTRICTIONS, ids=str)
@pytest.mark.parametrize("spread", [2.0, 1e4])
@pytest.mark.parametrize("temperature", [0, 1e-20, 1e-10, 1e-6, 1.0, 1e6, 1e20])
def test_the_excluded_token_is_never_drawn(backend, temperature, spread, kept):
    drawn = draw(spread, temperature=temperature, **kept)
    assert not (drawn.token == EXCLUDED).any()
    assert torch.isfinite(drawn.log_prob).all()
    if temperature < 1e-5:
        assert torch.equal(drawn.token, drawn.top1_token)


@pytest.mark.parametrize(
    "temperature",
    [
        1e-39,
        1e-300,
        5e-324,
        9e-21,
        1.1e20,
        1e39,
        10**400,
        -1e-30,
        -1,
        float("inf"),
        float("nan"),
        np.float32("nan"),
    ],
)
def test_temperatures_beyond_the_range_are_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature: got .*expected 0 or a number from 1e-20 to 1e\+20"):
        draw(temperature=temperature)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["1", None, True, [1.0], 1j, torch.tensor(1.0)], ids=str)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name}: got"):
        draw(**{name: value})


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.float32, np.float64, np.float16])
def test_numbers_of_any_type(backend, kind):
    want = draw(temperature=2.0, top_p=1.0, top_k=4)
    options = {"temperature": kind(2), "top_p": kind(1), "top_k": np.int32(4)}
    assert torch.equal(draw(**options).token, want.token)


def test_a_top_k_beyond_64_bits_keeps_all(backend):
    assert torch.equal(draw(top_k=2**80).token, draw(top_k=50).token)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_seeds_beyond_the_range_are_refused(seed):
    hidden, head = head_case()
    with pytest.raises(ValueError, match=r"rng\.seed: got .*0 <= seed < 2\^63"):
        lk.sample_rows(hidden, head, torch.arange(16), row_rng(16)._replace(seed=seed))
    with pytest.raises(ValueError, match=r"dropout_seed: got .*0 <= dropout_seed < 2\^63"):
        blocks(dropout=0.5, dropout_seed=seed)


def blocks(**options):
    inputs = looped_inputs().to(torch.float32)
    arguments = {"num_loops": 2, "num_heads": inputs.num_heads, **options}
    return lk.looped_blocks(inputs.x, inputs.blocks, inputs.modulation, **arguments)


@pytest.mark.parametrize("dropout", [-1e-9, 1, 1 - 1e-12, 2, float("nan"), float("inf")])
def test_rates_of_dropout_beyond_the_range_are_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout: got .*expected 0 <= dropout < 1"):
        blocks(dropout=dropout)


@pytest.mark.parametrize("threshold", [-1, -1e-300, float("nan")])
def test_exit_thresholds_beyond_the_range_are_refused(threshold):
    with pytest.raises(ValueError, match=r"exit_threshold: got"):
        blocks(exit_threshold=threshold)


@pytest.mark.parametrize("dropout", [0, 1e-39, 1e-300, 0.5, checks.LARGEST_DROPOUT])
def test_any_rate_in_the_range_is_finite(backend, dropout):
    assert torch.isfinite(blocks(dropout=dropout, dropout_seed=2**63 - 1)).all()


@pytest.mark.parametrize(
    ("threshold", "loops"), [(0, 3), (1e-300, 3), (1e-39, 3), (1e39, 1), (float("inf"), 1)]
)
def test_extreme_exit_thresholds(backend, threshold, loops):
    _, used = blocks(num_loops=3, exit_threshold=threshold)
    assert used.tolist() == [loops, loops]


def test_whole_numbers_of_any_type(backend):
    want = blocks(dropout=0.25, dropout_seed=7)
    got = blocks(
        num_loops=np.int64(2), num_heads=np.int32(4), dropout=np.float32(0.25), dropout_seed=np.uint64(7)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["num_loops", "num_heads", "dropout_seed"])
@pytest.mark.parametrize("value", [2.0, True, "2", None])
def test_what_is_no_whole_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name}: got"):
        blocks(**{name: value})
