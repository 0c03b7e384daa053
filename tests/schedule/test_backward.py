"""The table of the backward pass: proved, run on the CPU in any order it allows, equal to autograd."""

import re
from pathlib import Path

import pytest
import torch

from loopmdm_kernels.schedule import Backward, BackwardTiles, BlockShape, Instruction, build_backward
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from loopmdm_kernels.testing.reference import looped_blocks
from loopmdm_kernels.testing.schedule import interpret_backward

SHAPE = BlockShape(batch=2, length=40, hidden=32, heads=2, mlp=64, layers=2)
TILES = BackwardTiles(rows=16, columns=16, part=8)
PHASES = list(Backward)


def table_for(inputs, rows=32, columns=None, part=8):
    batch, length, hidden = inputs.x.shape
    mlp = inputs.blocks[0].mlp_in.shape[0]
    shape = BlockShape(batch, length, hidden, inputs.num_heads, mlp, len(inputs.blocks))
    return build_backward(shape, BackwardTiles(rows, columns or hidden // inputs.num_heads, part))


def named(grad_x, grad_blocks, grad_modulation):
    grads = {"x": grad_x, "modulation": grad_modulation}
    for index, block in enumerate(grad_blocks):
        grads |= {f"blocks[{index}].{name}": value for name, value in block._asdict().items()}
    return grads


def apply(inputs, loops, x=None):
    return looped_blocks(
        inputs.x if x is None else x, inputs.blocks, inputs.modulation, loops,
        num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask,
    )  # fmt: skip


def oracle(inputs, loops, grad):
    inputs = inputs.to(inputs.blocks[0].qkv.dtype, requires_grad=True)
    leaves = inputs.leaves()
    out = apply(inputs, loops)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)), strict=True))


def run(inputs, loops, grad, *, table=None, **options):
    """By the table. The loop inputs hold NaN for loops that a sequence does not take."""
    counts = torch.as_tensor(loops).expand(len(inputs.x))
    shape = (int(counts.max()), *inputs.x.shape)
    loop_inputs = torch.full(shape, torch.nan, dtype=inputs.x.dtype)
    state = inputs.x
    for loop in range(len(loop_inputs)):
        loop_inputs[loop, counts > loop] = state[counts > loop]
        state = apply(inputs, 1, state)
    result = interpret_backward(
        table or table_for(inputs), grad, loop_inputs, inputs.blocks, inputs.modulation, counts,
        rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
    )  # fmt: skip
    return named(*result)


def gradient(inputs, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(inputs.x.shape, generator=generator, dtype=torch.float64).to(inputs.x.dtype)


def assert_equal_to_oracle(inputs, loops, **options):
    grad = gradient(inputs)
    ours, expected = run(inputs, loops, grad, **options), oracle(inputs, loops, grad)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize(("length", "loops"), [(1, 1), (1, 12), (81, 2), (81, 12), (128, 1)])
def test_equals_autograd_of_the_oracle(length, loops):
    inputs = looped_inputs(1, length, 32, num_heads=2, seed=length)
    assert_equal_to_oracle(
        inputs, loops, table=table_for(inputs, 64, part=32), num_blocks=1 + 131 * (loops == 2)
    )


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rotary", [False, True])
def test_options(blocks, rotary):
    inputs = looped_inputs(
        2, 40, 48, num_heads=3, num_blocks=blocks, mlp_ratio=2, key_mask=True, rotary=rotary,
        per_sequence_modulation=rotary,
    )  # fmt: skip
    # 48 rows of weights in tiles of 32: the last is half empty.
    assert_equal_to_oracle(inputs, 3, table=table_for(inputs, columns=16), num_blocks=9)


def test_each_sequence_has_its_own_loops():
    inputs = looped_inputs(4, 20, 32, num_heads=2, per_sequence_modulation=True)
    assert_equal_to_oracle(inputs, torch.tensor([3, 1, 4, 2]), table=table_for(inputs, 16), num_blocks=11)


@pytest.mark.parametrize("num_blocks", [2, 7, 31, 132])
def test_any_number_of_blocks_and_any_order_give_the_same_bits(num_blocks):
    inputs = looped_inputs(2, 40, 32, num_heads=2, key_mask=True, mlp_ratio=2)
    grad, table = gradient(inputs), table_for(inputs, 16)
    expected = run(inputs, 2, grad, table=table)
    for seed in range(2):
        again = run(inputs, 2, grad, table=table, num_blocks=num_blocks, seed=seed)
        assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_rounding_points_keep_to_the_tolerance_of_bf16():
    rounded = looped_inputs(2, 70, 64, num_heads=2, seed=5).to(torch.bfloat16)
    exact, grad = rounded.to(torch.float64), gradient(rounded)
    ours, baseline = run(rounded, 2, grad, num_blocks=8), oracle(rounded, 2, grad)
    for name, expected in oracle(exact, 2, grad).items():
        assert ours[name].dtype == baseline[name].dtype
        assert_matches_oracle(ours[name], baseline[name], expected, name=name)


def test_every_tile_occurs_once_and_is_waited_for():
    table = build_backward(SHAPE, TILES)
    places = [(i.phase, i.layer, i.sequence, i.row, i.column) for i in table.loop]
    assert len(set(places)) == len(places)
    assert {Backward(item.phase) for item in table.loop} == set(Backward)
    raised = [0] * (table.num_counters + 1)
    for item in table.loop:
        raised[item.signal] += item.signal_count
    waited = {
        counter: item.wait_count
        for item in table.loop
        for counter in range(item.wait, item.wait + item.wait_number)
    }
    assert waited == dict(enumerate(raised)), "each counter is waited for, with all that a step adds to it"
    words = table.encode()
    assert [Instruction(*row) for row in words.tolist()] == list(table.loop)


def test_phases_are_those_of_the_header():
    header = (Path(__file__).parents[2] / "csrc" / "common" / "schedule.h").read_text()
    _, backward = re.findall(r"enum Phase : int32_t \{(.*?)\}", header, re.DOTALL)
    named = re.findall(r"^  k(\w+),", backward, re.MULTILINE)
    assert named == [*(phase.name.title().replace("_", "") for phase in PHASES), "Nothing"]


def test_a_deadlock_ends_the_interpreter():
    inputs = looped_inputs(1, 20, 32, num_heads=2)
    table = table_for(inputs)
    loop = [
        item._replace(signal=table.num_counters) if item.phase == Backward.QKV else item
        for item in table.loop
    ]
    broken = table._replace(loop=tuple(loop))
    with pytest.raises(RuntimeError, match="deadlock"):
        run(inputs, 1, gradient(inputs), table=broken, num_blocks=4)


@pytest.mark.parametrize(
    ("shape", "tiles", "message"),
    [
        ({}, {"columns": 48}, r"tiles.columns: got 48, expected a divisor of hidden 32"),
        ({"heads": 1}, {}, r"tiles.columns: got 16, expected a multiple of the head size 32"),
        ({}, {"part": 5}, r"tiles.part: got 5, expected a divisor of tiles.rows 16"),
        ({"layers": 0}, {}, r"layers: got 0, expected at least 1"),
    ],
)
def test_errors(shape, tiles, message):
    with pytest.raises(ValueError, match=message):
        build_backward(SHAPE._replace(**shape), TILES._replace(**tiles))
