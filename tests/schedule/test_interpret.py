"""The table, run on the CPU in any order it allows, computes what the op computes."""

import pytest
import torch

from loopmdm_kernels.schedule import BlockShape, Tiles, build
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from loopmdm_kernels.testing.reference import looped_blocks
from loopmdm_kernels.testing.schedule import interpret

ROWS = 64


def table_for(inputs, rows=ROWS, *, heads=1, parts=1, norms=0, sums=0, adaptive=False):
    batch, length, hidden = inputs.x.shape
    mlp = inputs.blocks[0].mlp_in.shape[0]
    shape = BlockShape(batch, length, hidden, inputs.num_heads, mlp, len(inputs.blocks))
    head_dim = hidden // inputs.num_heads
    tiles = Tiles(rows, 3 * head_dim, 16, 32, 16, heads, parts, norms, sum_rows=sums)
    return build(shape, tiles, adaptive=adaptive)


def run(inputs, loops, *, table=None, **options):
    table = table or table_for(inputs)
    return interpret(
        table, inputs.x, inputs.blocks, inputs.modulation, loops,
        rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
    )  # fmt: skip


def oracle(inputs, loops, **options):
    return looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, loops,
        num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
    )  # fmt: skip


def assert_equal_to_oracle(out, expected):
    # Both are float64; sums in another order differ by parts in 10^15, which twelve loops amplify.
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("num_blocks", [1, 5, 132])
@pytest.mark.parametrize("loops", [1, 2, 12])
@pytest.mark.parametrize("length", [1, 81, 128, 1000])
@pytest.mark.parametrize("norms", [0, 32])
def test_equals_the_oracle(length, loops, num_blocks, norms):
    inputs = looped_inputs(1, length, 32, num_heads=2, seed=length)
    # The longest case takes seconds; a larger tile shortens it without leaving out a case.
    rows = 256 if norms else 128 if length == 1000 else ROWS
    out, used = run(inputs, loops, table=table_for(inputs, rows, norms=norms), num_blocks=num_blocks)
    assert_equal_to_oracle(out, oracle(inputs, loops))
    assert used.tolist() == [loops]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 31, 64, 100, 131, 132])
def test_any_number_of_blocks_and_any_order_give_the_same_bits(num_blocks):
    inputs = looped_inputs(2, 40, 32, num_heads=2, key_mask=True)
    table = table_for(inputs, rows=16, norms=8)
    expected, _ = run(inputs, 3, table=table)
    for seed in range(2):
        out, _ = run(inputs, 3, table=table, num_blocks=num_blocks, seed=seed)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_options(blocks, per_sequence, rotary):
    inputs = looped_inputs(
        2, 40, 48, num_heads=3, num_blocks=blocks, key_mask=True, rotary=rotary,
        per_sequence_modulation=per_sequence,
    )  # fmt: skip
    # Two heads to a tile, of three: the last tile holds one.
    out, _ = run(inputs, 3, table=table_for(inputs, 16, heads=2), num_blocks=9)
    assert_equal_to_oracle(out, oracle(inputs, 3))


@pytest.mark.parametrize("num_blocks", [1, 7, 132])
@pytest.mark.parametrize("length", [1, 81])
@pytest.mark.parametrize(("parts", "sums", "norms"), [(4, 16, 0), (1, 2, 0), (4, 8, 32)])
def test_parts_of_a_product(parts, sums, norms, length, num_blocks):
    inputs = looped_inputs(2, length, 32, num_heads=2, seed=length)
    table = table_for(inputs, parts=parts, sums=sums, norms=norms)
    expected, _ = run(inputs, 3, table=table)
    out, _ = run(inputs, 3, table=table, num_blocks=num_blocks, seed=1)
    assert torch.equal(out, expected), "the order of the sum does not depend on who was first"
    assert_equal_to_oracle(out, oracle(inputs, 3))


def test_each_sequence_has_its_own_loops():
    inputs = looped_inputs(4, 20, 32, num_heads=2)
    loops = torch.tensor([3, 1, 5, 2])
    for adaptive in (False, True):
        table = table_for(inputs, 16, adaptive=adaptive)
        out, used = run(inputs, loops, table=table, num_blocks=11)
        assert_equal_to_oracle(out, oracle(inputs, loops))
        assert torch.equal(used, loops)


@pytest.mark.parametrize("num_blocks", [1, 6, 132])
@pytest.mark.parametrize("sums", [0, 8])
def test_early_exit(sums, num_blocks):
    inputs = looped_inputs(6, 37, 32, num_heads=2, seed=1)
    _, changes = oracle(inputs, 8, exit_threshold=0.0)
    assert changes.tolist() == [8] * 6
    # A threshold that some sequences meet early and some never.
    scale = torch.tensor([1e-3, 1.0, 30.0, 1e3, 1.0, 1e2], dtype=torch.float64)[:, None, None]
    inputs = inputs._replace(x=inputs.x * scale)
    expected, expected_used = oracle(inputs, 8, exit_threshold=0.2)
    assert len(set(expected_used.tolist())) > 1, "the test needs sequences that end at different loops"
    table = table_for(inputs, 16, parts=2, norms=4, sums=sums, adaptive=True)
    out, used = run(inputs, 8, table=table, exit_threshold=0.2, num_blocks=num_blocks, seed=num_blocks)
    assert torch.equal(used, expected_used)
    assert_equal_to_oracle(out, expected)


@pytest.mark.parametrize("loops", [1, 2, 12])
def test_rounding_points_keep_to_the_tolerance_of_bf16(loops):
    exact = looped_inputs(2, 70, 64, num_heads=2, seed=5)
    rounded = exact.to(torch.bfloat16)
    exact = rounded.to(torch.float64)
    out, _ = run(rounded, loops, table=table_for(rounded, 32, norms=16), num_blocks=8)
    assert out.dtype == torch.float32
    assert_matches_oracle(out, oracle(rounded, loops), oracle(exact, loops))
