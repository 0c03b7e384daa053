"""looped_blocks: what it refuses, and how it says so."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import looped_inputs
from loopmdm_kernels.types import BlockWeights
from tests.looped_blocks.cases import call

BAD = [
    ({"x": torch.zeros(2, 16, 32, dtype=torch.int64)}, TypeError, "x: got int64"),
    (
        {"x": torch.zeros(2, 16, 32, dtype=torch.bfloat16)},
        TypeError,
        "x: got bfloat16, expected float32 or float64",
    ),
    ({"x": torch.zeros(16, 32)}, ValueError, r"x: got shape \[16, 32\], expected \[B, L, D\]"),
    ({"x": torch.zeros(0, 16, 32)}, ValueError, "x: got shape"),
    ({"x": [1.0]}, TypeError, "x: got list"),
    ({"blocks": []}, ValueError, "blocks: got none"),
    ({"blocks": None}, TypeError, "blocks: got NoneType, expected a list of BlockWeights"),
    ({"blocks": {"a": 1}}, TypeError, "blocks: got dict"),
    ({"blocks": torch.zeros(2, 2)}, TypeError, "blocks: got Tensor"),
    ({"blocks": "ab"}, TypeError, r"blocks\[0\]: got str, expected a BlockWeights"),
    ({"blocks": [None]}, TypeError, r"blocks\[0\]: got NoneType"),
    ({"rotary": 1}, TypeError, "rotary: got int, expected a Rotary or None"),
    ({"rotary": ()}, TypeError, "rotary: got tuple of 0"),
    ({"rotary": (None, None)}, TypeError, "rotary.cos: got NoneType"),
    ({"exit_threshold": 10**400}, ValueError, "exit_threshold: got a number beyond float64"),
    (
        {"modulation": torch.zeros(2, 3, 6, 32)},
        ValueError,
        r"modulation: got shape \[2, 3, 6, 32\], expected \[2, 1 or 2",
    ),
    ({"num_loops": 0}, ValueError, "num_loops: got 0, expected at least 1"),
    ({"num_loops": -1}, ValueError, "num_loops: got -1"),
    ({"num_loops": 2**30}, ValueError, r"num_loops: got 1073741824, expected .* below 2\^30"),
    ({"num_loops": torch.tensor([1, 2**30])}, ValueError, "num_loops: got values in 1..1073741824"),
    ({"num_loops": 1.5}, TypeError, "num_loops: got 1.5"),
    ({"num_loops": True}, TypeError, "num_loops: got True"),
    ({"num_loops": torch.tensor([1, 0])}, ValueError, "num_loops: got values in 0..1"),
    ({"num_loops": torch.tensor([1.0, 2.0])}, TypeError, "num_loops: got float32"),
    ({"num_loops": torch.tensor([1, 2, 3])}, ValueError, r"num_loops: got shape \[3\], expected \[1 or 2\]"),
    # One for all is read by the host; on a device each sequence has its own.
    (
        {"num_loops": torch.ones(1, dtype=torch.int64, device="meta")},
        ValueError,
        r"num_loops: got shape \[1\], expected \[2\]",
    ),
    (
        {"num_loops": torch.tensor([1, 3]), "max_loops": 2},
        ValueError,
        r"num_loops: got values in 1..3, .* 1..2",
    ),
    ({"max_loops": 2}, ValueError, "max_loops: got 2, expected None where all sequences have one num_loops"),
    ({"num_heads": 3}, ValueError, "num_heads: got 3"),
    ({"key_mask": torch.zeros(2, 16, dtype=torch.bool)}, ValueError, "key_mask: a sequence has no key"),
    ({"key_mask": torch.ones(2, 16)}, TypeError, "key_mask: got float32, expected bool"),
    ({"compute_dtype": torch.int8}, TypeError, "compute_dtype: got torch.int8"),
    ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
    ({"exit_threshold": float("nan")}, ValueError, "exit_threshold: got nan"),
    ({"x": torch.zeros(2, 16, 32, device="meta")}, ValueError, r"blocks\[0\].norm1: on cpu, expected meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    inputs = looped_inputs().to(torch.float32)
    arguments = {
        "x": inputs.x,
        "blocks": inputs.blocks,
        "modulation": inputs.modulation,
        "num_loops": 2,
        "num_heads": inputs.num_heads,
        **change,
    }
    with pytest.raises(error, match=message):
        lk.looped_blocks(**arguments)


@pytest.mark.parametrize("wrong", [None, torch.float32, 3, "x", torch.tensor(1.0), torch.zeros(0)])
@pytest.mark.parametrize("name", BlockWeights._fields)
def test_a_weight_that_is_none_is_named(name, wrong):
    inputs = looped_inputs().to(torch.float32)
    blocks = [inputs.blocks[0]._replace(**{name: wrong}), inputs.blocks[1]]
    with pytest.raises((TypeError, ValueError), match=rf"blocks\[0\].{name}: got"):
        call(inputs._replace(blocks=blocks), 1)


def test_wrong_weight_shape_is_named():
    inputs = looped_inputs().to(torch.float32)
    blocks = [inputs.blocks[0], inputs.blocks[1]._replace(mlp_out=torch.zeros(32, 64))]
    with pytest.raises(ValueError, match=r"blocks\[1\].mlp_out: got shape \[32, 64\], expected \[32, 128\]"):
        call(inputs._replace(blocks=blocks), 1)
