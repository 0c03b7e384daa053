"""The checker passes the tables that `build` makes and finds every planted fault."""

import pytest
import torch

from loopmdm_kernels.schedule import BlockShape, Forward, Instruction, Tiles, build
from loopmdm_kernels.testing import looped_inputs
from loopmdm_kernels.testing.schedule import ScheduleError, check, interpret

SMALL = BlockShape(batch=2, length=40, hidden=32, heads=2, mlp=128, layers=2)
TILES = Tiles(rows=16, qkv=16, attn_out=16, mlp_in=32, mlp_out=16)
PARTS = TILES._replace(mlp_out_parts=4)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_built_tables_pass(length, layers, adaptive):
    check(build(SMALL._replace(length=length, layers=layers), TILES, adaptive=adaptive))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_tables_with_parts_pass(layers, adaptive):
    check(build(SMALL._replace(layers=layers), PARTS, adaptive=adaptive))


@pytest.mark.parametrize("length", [1, 81, 128, 1000])
def test_tables_of_the_small_model_pass(length):
    rows = 64 if length < 512 else 128
    tiles = Tiles(rows, 128, 64, 128, 64, heads=128 // rows, mlp_out_parts=4 if length <= 81 else 1)
    check(build(BlockShape(1, length, 768, 12, 3072, 2), tiles, adaptive=length == 81))


def change(table, number, **words):
    """The table with other words in one instruction of the loop."""
    loop = list(table.loop)
    loop[number] = loop[number]._replace(**words)
    return table._replace(loop=tuple(loop))


def first(table, phase, **words):
    """Number of the first instruction of the loop with these words."""
    for number, item in enumerate(table.loop):
        if item.phase == phase and all(getattr(item, name) == value for name, value in words.items()):
            return number
    raise LookupError(phase)


PRODUCTS = (Forward.QKV, Forward.ATTENTION, Forward.ATTN_OUT, Forward.MLP_IN, Forward.MLP_OUT)
SPLIT = (Forward.QKV, Forward.MLP_OUT, Forward.MLP_SUM)  # what parts of a product change


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("phase", PRODUCTS)
def test_a_missing_wait_is_found(phase, layer):
    table = build(SMALL, TILES)
    number = first(table, phase, layer=layer, row=1)
    with pytest.raises(ScheduleError, match="not ordered"):
        check(change(table, number, wait=-1, wait_number=0))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("phase", PRODUCTS)
def test_a_threshold_too_small_is_found(phase, layer):
    table = build(SMALL, TILES)
    number = first(table, phase, layer=layer, row=2)
    count = table.loop[number].wait_count
    with pytest.raises(ScheduleError, match="not ordered"):
        check(change(table, number, wait_count=count - 1))


@pytest.mark.parametrize("phase", PRODUCTS)
def test_a_threshold_too_large_is_found(phase):
    table = build(SMALL, TILES)
    number = first(table, phase, layer=1)
    with pytest.raises(ScheduleError, match="deadlock"):
        check(change(table, number, wait_count=table.loop[number].wait_count + 1))


def test_attention_that_waits_for_too_few_rows_is_found():
    table = build(SMALL, TILES)
    number = first(table, Forward.ATTENTION, layer=1)
    with pytest.raises(ScheduleError, match=r"read of unfinished data.*qkv"):
        check(change(table, number, wait_number=table.row_tiles - 1))


@pytest.mark.parametrize("phase", PRODUCTS)
def test_a_wait_for_another_row_is_found(phase):
    table = build(SMALL, TILES)
    number = first(table, phase, layer=1, row=0)
    with pytest.raises(ScheduleError):
        check(change(table, number, wait=table.loop[number].wait + 1))


@pytest.mark.parametrize("phase", PRODUCTS)
def test_a_signal_left_out_or_given_twice_is_found(phase):
    table = build(SMALL, TILES)
    number = first(table, phase, layer=1)
    with pytest.raises(ScheduleError, match="deadlock"):
        check(change(table, number, signal=-1))
    # Given twice, the others' last signal is not needed any more to reach the target.
    with pytest.raises(ScheduleError, match="not ordered"):
        check(change(table, number, signal_count=2))


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        (Forward.QKV, "read_slot"),
        (Forward.QKV, "write_slot"),
        (Forward.ATTENTION, "read_slot"),
        (Forward.ATTN_OUT, "read_slot"),
        (Forward.ATTN_OUT, "write_slot"),
        (Forward.MLP_IN, "read_slot"),
        (Forward.MLP_OUT, "write_slot"),
    ],
)
def test_the_wrong_half_of_a_buffer_is_found(phase, word):
    """By the checker where it races or reads what nobody wrote, else by the values."""
    table = build(SMALL, TILES)
    number = first(table, phase, layer=1, row=1)
    broken = change(table, number, **{word: 1 - getattr(table.loop[number], word)})
    inputs = looped_inputs(SMALL.batch, SMALL.length, SMALL.hidden, SMALL.heads, SMALL.layers)
    arguments = (inputs.x, inputs.blocks, inputs.modulation, 2)
    expected, _ = interpret(table, *arguments)
    try:
        check(broken)
    except ScheduleError:
        return
    out, _ = interpret(broken, *arguments)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("phase", SPLIT)
def test_faults_between_parts_and_sums_are_found(phase):
    table = build(SMALL._replace(batch=1), PARTS)
    number = first(table, phase, layer=1, row=1, part=2 if phase is Forward.MLP_OUT else 0)
    count = table.loop[number].wait_count
    for words in ({"wait": -1, "wait_number": 0}, {"wait_count": count - 1}):
        with pytest.raises(ScheduleError, match="not ordered"):
            check(change(table, number, **words))
    for words in ({"wait_count": count + 1}, {"signal": -1}):
        with pytest.raises(ScheduleError, match="deadlock"):
            check(change(table, number, **words))
    with pytest.raises(ScheduleError, match="not ordered"):
        check(change(table, number, signal_count=2))


def test_a_part_computed_twice_is_found():
    table = build(SMALL._replace(batch=1), PARTS)
    number = first(table, Forward.MLP_OUT, layer=0, row=0, part=1)
    with pytest.raises(ScheduleError, match=r"two writes.*partial"):
        check(change(table, number, part=0))


def test_keys_in_one_buffer_would_be_overwritten_while_read():
    """Why q, k and v have two halves: the next layer's come while slow tiles still read this layer's."""
    table = build(SMALL, TILES)
    loop = [
        item._replace(write_slot=0) if item.phase == Forward.QKV
        else item._replace(read_slot=0) if item.phase == Forward.ATTENTION
        else item
        for item in table.loop
    ]  # fmt: skip
    with pytest.raises(ScheduleError, match=r"still being read.*qkv"):
        check(table._replace(loop=tuple(loop)))


def test_cyclic_waits_are_found():
    table = build(SMALL, TILES)
    attention, product = first(table, Forward.ATTENTION, layer=0), first(table, Forward.ATTN_OUT, layer=0)
    # Attention waits for the projection that waits for it, in the same loop.
    broken = change(
        table, attention, wait=table.loop[product].signal, wait_number=1,
        wait_count=SMALL.hidden // TILES.attn_out,
    )  # fmt: skip
    with pytest.raises(ScheduleError, match="deadlock"):
        check(broken)
    inputs = looped_inputs(SMALL.batch, SMALL.length, SMALL.hidden, SMALL.heads, SMALL.layers)
    with pytest.raises(RuntimeError, match="deadlock"):
        interpret(broken, inputs.x, inputs.blocks, inputs.modulation, 1, num_blocks=4)


def test_an_order_that_reads_ahead_is_found():
    table = build(SMALL, TILES)
    late = first(table, Forward.MLP_IN, layer=1)
    moved = (table.loop[late], *table.loop[:late], *table.loop[late + 1 :])
    with pytest.raises(ScheduleError, match="deadlock"):
        check(table._replace(loop=moved))


def test_sequences_that_share_a_counter_are_found():
    table = build(SMALL, TILES)
    number = first(table, Forward.MLP_IN, sequence=1, row=0)
    other = table.loop[first(table, Forward.MLP_IN, sequence=0, row=0)]
    with pytest.raises(ScheduleError, match="of sequence 0"):
        check(change(table, number, wait=other.wait))


@pytest.mark.parametrize("adaptive", [False, True])
def test_entering_too_late_and_leaving_too_early_are_found(adaptive):
    table = build(SMALL, TILES, adaptive=adaptive)
    enter = (table.enter[0]._replace(signal_count=1), *table.enter[1:])
    with pytest.raises(ScheduleError, match="deadlock"):
        check(table._replace(enter=enter))
    leave = (table.leave[0]._replace(wait=-1, wait_number=0), *table.leave[1:])
    with pytest.raises(ScheduleError, match=r"LEAVE .* and MLP_OUT .* are not ordered"):
        check(table._replace(leave=leave))


def test_an_exit_that_does_not_wait_for_all_rows_is_found():
    table = build(SMALL, TILES, adaptive=True)
    number = first(table, Forward.EXIT)
    with pytest.raises(ScheduleError, match="not ordered"):
        check(change(table, number, wait_number=1))


def test_errors_name_the_instructions():
    table = build(SMALL, TILES)
    number = first(table, Forward.MLP_OUT, layer=1, sequence=1, row=2)
    with pytest.raises(ScheduleError, match=r"\(loop 0, layer 0, sequence 1, row 2, column 0\)"):
        check(change(table, number, wait=-1, wait_number=0))


def test_every_random_change_of_a_wait_or_signal_is_found_or_harmless():
    """Whatever single word of a wait or signal changes, a table that passes still computes the same."""
    shape = SMALL._replace(batch=1, length=20)
    table = build(shape, PARTS)
    inputs = looped_inputs(1, 20, 32, 2, 2)
    arguments = (inputs.x, inputs.blocks, inputs.modulation, 2)
    expected, _ = interpret(table, *arguments)
    generator = torch.Generator().manual_seed(0)
    words = ("wait", "wait_number", "wait_count", "signal", "signal_count")
    found = 0
    for _ in range(60):
        number = int(torch.randint(len(table.loop), (1,), generator=generator))
        word = words[int(torch.randint(len(words), (1,), generator=generator))]
        old = getattr(table.loop[number], word)
        new = max(
            -1 if word == "signal" else 0, old + [-1, 1][int(torch.randint(2, (1,), generator=generator))]
        )
        broken = change(table, number, **{word: new})
        try:
            check(broken)
        except (ScheduleError, IndexError):
            found += 1
            continue
        for seed in range(2):
            out, _ = interpret(broken, *arguments, num_blocks=16, seed=seed)
            assert torch.equal(out, expected), (number, word, new)
    assert found > 30


def test_instructions_are_thirteen_words():
    table = build(SMALL, PARTS, adaptive=True)
    words = table.encode()
    assert words.dtype == torch.int32 and words.shape[1] == 13
    assert [Instruction(*row) for row in words.tolist()] == [*table.enter, *table.loop, *table.leave]
