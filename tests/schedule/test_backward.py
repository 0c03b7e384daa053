"""The table of the backward pass: proved, run on the CPU in any order it allows, equal to autograd."""

import re
from pathlib import Path

import pytest
import torch

from loopmdm_kernels.schedule import Backward, BackwardTiles, BlockShape, Instruction, build_backward
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from loopmdm_kernels.testing.reference import looped_blocks
from loopmdm_kernels.testing.schedule import ScheduleError, check, interpret_backward

SHAPE = BlockShape(batch=2, length=40, hidden=32, heads=2, mlp=64, layers=2)
TILES = BackwardTiles(rows=16, columns=16, part=8)
FEW = SHAPE._replace(length=20, mlp=32)  # for faults: proofs of tables that fail take long
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


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 16), (2, 40)])
def test_built_tables_pass(batch, length, layers):
    check(build_backward(SHAPE._replace(batch=batch, length=length, layers=layers), TILES))


def test_a_table_of_the_small_model_passes():
    shape = BlockShape(1, 200, 768, 12, 3072, 1)
    check(build_backward(shape, BackwardTiles(128, 128, 16)), loops=2)


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
    named = re.findall(r"^  k(\w+),", header, re.MULTILINE)
    assert named == [*(phase.name.title().replace("_", "") for phase in PHASES), "Nothing"]


def change(table, number, **words):
    loop = list(table.loop)
    loop[number] = loop[number]._replace(**words)
    return table._replace(loop=tuple(loop))


def check_with_fault(table):
    check(table, loops=2)


def find(table, phase, layer=0):
    """The last but one instruction of a phase: for tiles, neither the first row nor the first column."""
    return [n for n, item in enumerate(table.loop) if item.phase == phase and item.layer == layer][-2]


def layer_of(phase):
    return 1 if phase in (Backward.TOP, Backward.NORM1) else 0


@pytest.mark.parametrize("phase", PHASES)
def test_a_missing_wait_or_a_threshold_too_small_is_found(phase):
    table = build_backward(FEW, TILES)
    number = find(table, phase, layer_of(phase))
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with_fault(change(table, number, wait_number=0))
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with_fault(change(table, number, wait_count=table.loop[number].wait_count - 1))


@pytest.mark.parametrize("phase", PHASES)
def test_a_threshold_too_large_or_a_signal_left_out_is_found(phase):
    table = build_backward(FEW, TILES)
    number = find(table, phase, layer_of(phase))
    with pytest.raises(ScheduleError, match="deadlock"):
        check_with_fault(change(table, number, wait_count=table.loop[number].wait_count + 1))
    with pytest.raises(ScheduleError, match="deadlock"):
        check_with_fault(change(table, number, signal=-1))


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_given_twice_is_found(phase):
    table = build_backward(FEW, TILES)
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with_fault(change(table, find(table, phase, layer_of(phase)), signal_count=2))


@pytest.mark.parametrize(
    "phase",
    [Backward.ATTENTION, Backward.GRAD_KEYS, Backward.WEIGHT_QKV, Backward.WEIGHT_MLP_IN],
)
def test_a_wait_for_too_few_rows_is_found(phase):
    table = build_backward(FEW, TILES)
    number = find(table, phase)
    with pytest.raises(ScheduleError, match="read of unfinished data"):
        check_with_fault(change(table, number, wait_number=table.loop[number].wait_number - 1))


def test_a_step_that_does_not_wait_for_the_one_before_is_found():
    table = build_backward(FEW, TILES)
    loop = [
        item._replace(wait_number=0) if item.phase == Backward.NORM1 and item.layer == 0 else item
        for item in table.loop
    ]
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with_fault(table._replace(loop=tuple(loop)))


def test_an_order_that_reads_ahead_is_found():
    table = build_backward(FEW, TILES)
    late = find(table, Backward.GRAD_MIXED)
    moved = (table.loop[late], *table.loop[:late], *table.loop[late + 1 :])
    with pytest.raises(ScheduleError, match="deadlock"):
        check_with_fault(table._replace(loop=moved))


def test_a_deadlock_ends_the_interpreter():
    inputs = looped_inputs(1, 20, 32, num_heads=2)
    table = table_for(inputs)
    broken = change(table, find(table, Backward.QKV), signal=table.num_counters)
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
