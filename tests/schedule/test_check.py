"""The checker passes the tables that `build` makes and finds every planted fault."""

import pytest
import torch

from loopmdm_kernels.schedule import (
    Backward,
    BackwardTiles,
    BlockShape,
    Forward,
    Instruction,
    Tiles,
    build,
    build_backward,
)
from loopmdm_kernels.testing import looped_inputs
from loopmdm_kernels.testing.schedule import ScheduleError, check, interpret

SMALL = BlockShape(batch=2, length=40, hidden=32, heads=2, mlp=128, layers=2)
TILES = Tiles(rows=16, qkv=16, attn_out=16, mlp_in=32, mlp_out=16)
PARTS = TILES._replace(mlp_out_parts=4, sum_rows=4)
NORMS = TILES._replace(part=4)
FEW = BlockShape(batch=2, length=20, hidden=32, heads=2, mlp=32, layers=2)  # failing proofs take long
BACKWARD_TILES = BackwardTiles(rows=16, columns=16, part=8)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 16, 40])
def test_built_tables_pass(length, layers, adaptive):
    check(build(SMALL._replace(length=length, layers=layers), TILES, adaptive=adaptive))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "tiles",
    [PARTS, PARTS._replace(sum_rows=0), NORMS, PARTS._replace(part=8), TILES._replace(sum_rows=8)],
    ids=str,
)
def test_tables_of_other_phases_pass(tiles, layers, adaptive):
    check(build(SMALL._replace(layers=layers), tiles, adaptive=adaptive))


@pytest.mark.parametrize("length", [1, 81, 128, 1000])
def test_tables_of_the_small_model_pass(length):
    rows = 64 if length < 512 else 128
    tiles = Tiles(rows, 128, 64, 128, 64, heads=128 // rows, mlp_out_parts=4 if length <= 81 else 1)
    tiles = tiles._replace(sum_rows=16 if length <= 81 else 0)
    check(build(BlockShape(1, length, 768, 12, 3072, 2), tiles, adaptive=length == 81))
    norms = Tiles(256, 256, 128, 192, 128, part=32, blocks=2)
    check(build(BlockShape(1, length, 768, 12, 3072, 2), norms, adaptive=length == 81))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 16), (2, 40)])
def test_built_tables_of_the_backward_pass_pass(batch, length, layers):
    shape = FEW._replace(batch=batch, length=length, mlp=64, layers=layers)
    check(build_backward(shape, BACKWARD_TILES))


def test_a_backward_table_of_the_small_model_passes():
    shape = BlockShape(1, 200, 768, 12, 3072, 1)
    check(build_backward(shape, BackwardTiles(128, 128, 16)), loops=2)


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


def last_but_one(table, phase, layer):
    """Of the instructions of a phase: for tiles, neither the first row nor the first column."""
    return [n for n, item in enumerate(table.loop) if item.phase == phase and item.layer == layer][-2]


PRODUCTS = (Forward.QKV, Forward.ATTENTION, Forward.ATTN_OUT, Forward.MLP_IN, Forward.MLP_OUT)
SPLIT = (Forward.QKV, Forward.MLP_OUT, Forward.MLP_SUM)  # what parts of a product change
OF_NORMS = (Forward.NORM1, Forward.QKV, Forward.NORM2, Forward.MLP_IN)  # and what norms of their own do


# In which phase, of which layer, faults are planted.
PLACES = (
    [("forward", phase, layer) for phase in PRODUCTS for layer in (0, 1)]
    + [("parts", phase, 1) for phase in SPLIT]
    + [("norms", phase, layer) for phase in OF_NORMS for layer in (0, 1)]
    + [("backward", phase, int(phase in (Backward.TOP, Backward.NORM1))) for phase in Backward]
)


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-{place[1].name}-{place[2]}")
def place(request):
    """An instruction, and the check of its table with other words in it."""
    kind, phase, layer = request.param
    if kind == "backward":
        table, loops = build_backward(FEW, BACKWARD_TILES), 2
        number = last_but_one(table, phase, layer)
    else:
        tiles = {"forward": TILES, "parts": PARTS, "norms": NORMS}[kind]
        table, loops = build(SMALL if kind == "forward" else SMALL._replace(batch=1), tiles), None
        part = 2 if kind == "parts" and phase is Forward.MLP_OUT else 0
        number = first(table, phase, layer=layer, row=1, part=part)
    return table.loop[number], lambda **words: check(change(table, number, **words), loops)


def test_a_missing_wait_or_a_threshold_too_small_is_found(place):
    item, check_with = place
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with(wait_number=0)
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with(wait_count=item.wait_count - 1)


def test_a_threshold_too_large_or_a_signal_left_out_is_found(place):
    item, check_with = place
    with pytest.raises(ScheduleError, match="deadlock"):
        check_with(wait_count=item.wait_count + 1)
    with pytest.raises(ScheduleError, match="deadlock"):
        check_with(signal=-1)


def test_a_signal_given_twice_is_found(place):
    """The others' last signal is not needed any more to reach the target."""
    _, check_with = place
    with pytest.raises(ScheduleError, match="not ordered"):
        check_with(signal_count=2)


@pytest.mark.parametrize(
    "phase",
    [Backward.ATTENTION, Backward.GRAD_KEYS, Backward.WEIGHT_QKV, Backward.WEIGHT_MLP_IN],
)
def test_a_wait_for_too_few_rows_is_found(phase):
    table = build_backward(FEW, BACKWARD_TILES)
    number = last_but_one(table, phase, 0)
    with pytest.raises(ScheduleError, match="read of unfinished data"):
        check(change(table, number, wait_number=table.loop[number].wait_number - 1), 2)


def test_a_step_that_does_not_wait_for_the_one_before_is_found():
    table = build_backward(FEW, BACKWARD_TILES)
    loop = [
        item._replace(wait_number=0) if item.phase == Backward.NORM1 and item.layer == 0 else item
        for item in table.loop
    ]
    with pytest.raises(ScheduleError, match="not ordered"):
        check(table._replace(loop=tuple(loop)), 2)


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


@pytest.mark.parametrize("phase", [Forward.MLP_IN, Backward.GRAD_MIXED], ids=["forward", "backward"])
def test_an_order_that_reads_ahead_is_found(phase):
    forward = isinstance(phase, Forward)
    table = build(SMALL, TILES) if forward else build_backward(FEW, BACKWARD_TILES)
    late = first(table, phase, layer=1)
    moved = (table.loop[late], *table.loop[:late], *table.loop[late + 1 :])
    with pytest.raises(ScheduleError, match="deadlock"):
        check(table._replace(loop=moved), None if forward else 2)


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
