"""attention: what it refuses, and how it says so."""

import pytest
import torch

import loopmdm_kernels as lk


def inputs():
    return [torch.zeros(2, 3, 20, 8, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (1, torch.zeros(2, 3, 20, 4, dtype=torch.float64), ValueError, r"k: got shape \[2, 3, 20, 4\]"),
        (2, torch.zeros(2, 3, 20, 8), TypeError, "v: got float32, expected float64"),
        (0, torch.zeros(3, 20, 8, dtype=torch.float64), ValueError, r"q: got shape \[3, 20, 8\]"),
        (0, torch.zeros(2, 3, 0, 8, dtype=torch.float64), ValueError, "q: got shape"),
    ],
)
def test_bad_input(position, value, error, message):
    tensors = inputs()
    tensors[position] = value
    with pytest.raises(error, match=message):
        lk.attention(*tensors)


@pytest.mark.parametrize("wrong", [1, "x", (), (torch.zeros(20, 4),), torch.zeros(2, 20, 4), [None, None]])
def test_rotary_that_is_none(wrong):
    tensors = inputs()
    with pytest.raises(TypeError, match=r"rotary: got .*, expected a Rotary or None"):
        lk.attention(*tensors, rotary=wrong)
