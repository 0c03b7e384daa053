"""sample_rows: what it refuses, and how it says so."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head


def draw(rng=None, **options):
    hidden, head = head_inputs(1, 2, vocab_size=20)
    head = Head(*(t.float() for t in head.tensors))
    return lk.sample_rows(
        hidden.float(), head, torch.zeros(1, dtype=torch.int64), rng or row_rng(1), **options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"temperature": 10**400}, "temperature: got a number beyond float64"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 2.0}, "top_k: got 2.0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


@pytest.mark.parametrize(
    ("rng", "error", "message"),
    [
        (row_rng(2), ValueError, r"rng.sequence: got shape \[2\], expected \[1\]"),
        (row_rng(1)._replace(seed=-1), ValueError, "rng.seed: got -1"),
        (row_rng(1)._replace(step=torch.tensor([2**30])), ValueError, "rng.step: got values in 1073741824"),
        (row_rng(1)._replace(position=torch.tensor([0.5])), TypeError, "rng.position: got float32"),
    ],
)
def test_bad_random_names(rng, error, message):
    with pytest.raises(error, match=message):
        draw(rng)


@pytest.mark.parametrize("wrong", [None, 0, (0, None, None, None), [1], "x", torch.zeros(2)])
def test_names_of_random_numbers_that_are_none(wrong):
    hidden, head = head_inputs(1, 2, vocab_size=20)
    with pytest.raises(TypeError, match=r"rng: got .*, expected a RowRng"):
        lk.sample_rows(hidden, head, torch.arange(2), wrong)


def test_whole_numbers_beyond_64_bits():
    """An int is taken as the float it stands for, however large."""
    assert torch.equal(draw(temperature=2**65).token, draw(temperature=2.0**65).token)
