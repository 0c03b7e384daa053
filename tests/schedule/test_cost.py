"""The model of the GPU's limits and the tiles it picks."""

import itertools

import pytest

from loopmdm_kernels.schedule import BlockShape, Device, Forward, Tiles, build, choose, device_of
from loopmdm_kernels.schedule.cost import key_block
from loopmdm_kernels.schedule.device import ASSUMED
from loopmdm_kernels.schedule.plan import _plan as plan_of
from loopmdm_kernels.testing.schedule import check

SMALL = BlockShape(batch=1, length=1024, hidden=768, heads=12, mlp=3072, layers=2)


def test_plan_of_a_known_shape():
    plan = choose(SMALL)
    assert plan.tiles == Tiles(256, qkv=192, attn_out=96, mlp_in=192, mlp_out=96, part=32, blocks=2)
    up = plan.phases[Forward.MLP_IN]
    assert (plan.pair, up.tiles, up.waves) == (2, 64, 1)
    # 4 row tiles by 16 column tiles, on 66 pairs; each reads 256 rows, and 192 columns for both blocks.
    read = 768 * 2 * (256 + Device().multicast_cost * 192)
    assert up.bytes == pytest.approx(64 * read)
    assert up.arithmetic == pytest.approx(2 * 256 * 192 * 768 * 66 / 700e12)
    assert up.traffic == pytest.approx(read * 64 / 5.5e12)
    rows = plan.phases[Forward.NORM2]
    assert rows.bytes == 32 * 32 * (768 * (4 + 2) + 24 * 8), "fp32 in, bf16 out, and the statistics"
    waits = 2 * len(plan.phases) * Device().wait_seconds
    assert plan.loop_seconds == pytest.approx(waits + 2 * sum(c.seconds for c in plan.phases.values()))


def test_few_tokens_take_small_tiles():
    assert choose(SMALL._replace(length=32)).tiles.rows == 64
    assert choose(SMALL._replace(batch=16)).tiles.rows == 256


def test_two_blocks_share_rows_where_l2_binds():
    """64 rows each: each normalises its own, and gets the weights that both need once."""
    shape = SMALL._replace(length=256)
    plan = choose(shape)
    assert plan.tiles == Tiles(128, qkv=128, attn_out=64, mlp_in=192, mlp_out=64, heads=2, blocks=2)
    up = plan.phases[Forward.MLP_IN]
    rows, weights = 768 * 4 * 128, 768 * 2 * 192
    assert up.bytes == pytest.approx(2 * 16 * (rows + Device().multicast_cost * weights))
    assert up.traffic == pytest.approx((rows / 2 + weights) / Device().sm_bytes), "of one SM, not of L2"
    alone = choose(shape, Device(cluster=1))
    assert alone.pair == 1 and plan.loop_seconds < 0.95 * alone.loop_seconds
    # Of a sequence that ends in the first block's rows, that block has them all.
    few = choose(SMALL._replace(length=64)).tiles._replace(rows=128, blocks=2)
    cost = plan_of(SMALL._replace(length=64), Device(), few).phases[Forward.QKV]
    assert cost.bytes == pytest.approx(18 * 768 * (4 * 2 * 64 + 2 * 128 * Device().multicast_cost))


def test_few_tokens_cut_the_inner_dimension():
    """24 tiles of 3072 keep 24 SMs busy: parts of them more, for one more wait."""
    plan = choose(SMALL._replace(length=128))
    assert plan.tiles.mlp_out_parts == 2 and plan.phases[Forward.MLP_OUT].tiles == 48
    whole = plan_of(SMALL._replace(length=128), Device(), plan.tiles._replace(mlp_out_parts=1))
    assert Forward.MLP_SUM not in whole.phases and plan.loop_seconds < whole.loop_seconds - 2e-6
    # A part reads half of the rows and columns, and writes its sums; MLP_SUM reads the two.
    moved = 24 * 2 * (1536 * (2 * 64 + 2 * 64) + 4 * 64 * 64)
    assert plan.phases[Forward.MLP_OUT].bytes == moved
    assert plan.phases[Forward.MLP_SUM].bytes == 24 * 2 * 4 * 64 * 64
    assert choose(SMALL).tiles.mlp_out_parts == 1


@pytest.mark.parametrize("length", [1, 32, 64, 81, 128, 200, 512])
def test_parts_do_not_depend_on_the_batch(length):
    """They decide in which order numbers are added."""
    parts = {choose(SMALL._replace(length=length, batch=batch)).tiles.mlp_out_parts for batch in (1, 3, 64)}
    assert len(parts) == 1


def test_rows_beyond_the_sequence_are_not_moved():
    few, more = (choose(SMALL._replace(length=length)) for length in (16, 64))
    assert few.tiles.rows == more.tiles.rows == 64
    assert more.phases[Forward.QKV].bytes - few.phases[Forward.QKV].bytes == 18 * 48 * 768 * 4


def test_few_keys_are_one_small_block():
    blocks = {length: choose(SMALL._replace(length=length)).key_block for length in (1, 64, 65, 1024)}
    assert blocks == {1: 64, 64: 64, 65: 128, 1024: 128}
    few = choose(SMALL._replace(length=64))
    assert few.phases[Forward.ATTENTION].arithmetic == pytest.approx(4 * 64 * 64 * 128 * 132 / 450e12)
    assert key_block(SMALL._replace(length=64), few.tiles._replace(rows=128)) == 128, "a box has more rows"


def test_the_plan_is_the_best_of_all_tiles():
    shape = SMALL._replace(length=300)
    best = choose(shape)
    for rows, qkv, out, up, down in itertools.product((64, 128), (64, 128), (64, 128), (64, 128), (64, 128)):
        if rows == 128 or qkv == 128:  # with 64 rows a tile of q, k and v is two heads
            parts = best.tiles.mlp_out_parts
            other = plan_of(shape, Device(), Tiles(rows, qkv, out, up, down, 128 // rows, parts))
            assert other.loop_seconds >= best.loop_seconds


@pytest.mark.parametrize("length", [1, 64, 81, 300, 1024])
@pytest.mark.parametrize(
    ("hidden", "heads", "mlp"),
    [(64, 4, 256), (128, 4, 512), (512, 8, 2048), (768, 12, 3072), (1024, 16, 4096), (1024, 8, 4096)],
)
def test_plans_are_legal(length, hidden, heads, mlp):
    shape = BlockShape(2, length, hidden, heads, mlp, 1)
    plan = choose(shape)
    assert plan.shared_bytes <= 232_448 and plan.stages >= 3
    assert plan.stage_bytes % 1024 == 0, "a stage starts at an address that is a multiple of the swizzle atom"
    table = build(shape, plan.tiles)
    if len(table.loop) < 500:
        check(table)


@pytest.mark.parametrize("capability", ASSUMED)
@pytest.mark.parametrize(("hidden", "heads"), [(256, 8), (768, 12), (1024, 8)])
def test_a_plan_fits_the_shared_memory_of_its_device(capability, hidden, heads):
    device = ASSUMED[capability]
    for length in (32, 1024):
        plan = choose(BlockShape(1, length, hidden, heads, 4 * hidden, 2), device)
        assert plan.shared_bytes <= device.shared_bytes
        # Whole heads of 128 need tiles of which sm_86 and sm_89 hold two, and no others exist.
        assert plan.stages >= (2 if device.shared_bytes < 128_000 and heads == 8 and hidden == 1024 else 3)


def test_no_plan_fits():
    with pytest.raises(ValueError, match="do not fit the 48000 bytes of shared memory"):
        choose(SMALL, Device(shared_bytes=48_000))


def test_a_device_is_known_by_the_nearest_that_is_not_younger():
    assert device_of((9, 0), 132, 232_448) == Device()
    half = device_of((8, 7), 41, 166_912)
    known = ASSUMED[8, 6]
    assert (half.sms, half.shared_bytes) == (41, 166_912)
    assert half.product_flops == known.product_flops / 2 and half.sm_bytes == known.sm_bytes
    assert device_of((12, 0), 132, 101_376).attention_flops == Device().attention_flops


def test_time_grows_with_work_and_shrinks_with_rates():
    times = [choose(SMALL._replace(length=length)).loop_seconds for length in (1, 64, 256, 1024, 4096)]
    assert times == sorted(times)
    plan = choose(SMALL)
    assert plan.limit_seconds < plan.loop_seconds
    faster = Device(
        product_flops=1400e12, attention_flops=900e12, l2_bytes=11e12, sm_bytes=0.22e12, wait_seconds=0.75e-6
    )
    assert choose(SMALL, faster).loop_seconds == pytest.approx(plan.loop_seconds / 2)


def test_widths_that_no_tile_divides():
    with pytest.raises(ValueError, match="no tiles"):
        choose(BlockShape(1, 8, 40, 1, 160, 1))
