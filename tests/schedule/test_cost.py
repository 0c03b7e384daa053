"""The model of the GPU's limits and the tiles it picks."""

import itertools

import pytest

from loopmdm_kernels.cuda import sources
from loopmdm_kernels.schedule import (
    BlockShape,
    Device,
    Forward,
    Tiles,
    build,
    choose,
    choose_backward,
    device_of,
)
from loopmdm_kernels.schedule.cost import ALONE_COLUMNS, PhaseCost, Way, key_block, product_work
from loopmdm_kernels.schedule.device import ASSUMED
from loopmdm_kernels.schedule.forward import SUMS_TOGETHER
from loopmdm_kernels.schedule.plan import plan_with as plan_of
from loopmdm_kernels.testing.schedule import check

SMALL = BlockShape(batch=1, length=1024, hidden=768, heads=12, mlp=3072, layers=2)


def test_plan_of_a_known_shape():
    plan = choose(SMALL)
    assert plan.tiles == Tiles(
        256, qkv=192, attn_out=96, mlp_in=192, mlp_out=192, mlp_out_parts=3, part=32, blocks=2, sum_rows=16
    )
    up = plan.phases[Forward.MLP_IN]
    assert (plan.blocks, up.tiles, up.waves) == (2, 64, 1)
    # 4 row tiles by 16 column tiles, on 66 pairs; each reads 256 rows, and 192 columns for both blocks.
    read = 768 * 2 * (256 + Device().multicast_cost * 192)
    assert up.bytes == pytest.approx(64 * read)
    assert up.arithmetic == pytest.approx(2 * 256 * 192 * 768 * 66 / 700e12)
    # What comes within the wait does not come behind it: for L2 the weights of 4.4 of 12 steps.
    assert up.traffic == pytest.approx(read * 64 / 5.5e12 - Device().wait_seconds)
    assert up.ahead == pytest.approx(Device().wait_seconds / (1.2 * 2 * 64 * 192 * 64 / 5.5e12))
    rows = plan.phases[Forward.NORM2]
    assert rows.bytes == 32 * 32 * (768 * (4 + 2) + 24 * 8), "fp32 in, bf16 out, and the statistics"
    sums = plan.phases[Forward.MLP_SUM]
    assert sums.bytes == 64 * 16 * 768 * (3 * 4 + 4 + 4 + 2), "parts and stream in, stream and rows out"
    assert Forward.NORM1 not in plan.phases, "they are normalised then"
    waits = 2 * len(plan.phases) * Device().wait_seconds
    assert plan.loop_seconds == pytest.approx(waits + 2 * sum(c.seconds for c in plan.phases.values()))


def test_few_tokens_take_small_tiles():
    assert choose(SMALL._replace(length=32)).tiles.rows == 64
    assert choose(SMALL._replace(batch=16)).tiles.rows == 256


def test_two_blocks_share_rows_where_l2_binds():
    """64 rows each: each normalises its own, and gets the weights that both need once."""
    shape = SMALL._replace(length=256)
    plan = choose(shape, Device(cluster=2))
    assert plan.tiles == Tiles(128, 128, 64, 192, 192, mlp_out_parts=6, blocks=2, sum_rows=8)
    up = plan.phases[Forward.MLP_IN]
    rows, weights = 768 * 4 * 128, 768 * 2 * 192
    assert up.bytes == pytest.approx(2 * 16 * (rows + Device().multicast_cost * weights))
    port, l2 = up.ways
    assert port.tile == pytest.approx((rows / 2 + weights) / Device().sm_bytes)
    assert port.tile > l2.tile, "one SM binds"
    assert up.ahead == plan.stages == 5
    assert port.tile - 5 * port.step < l2.tile - 5 * l2.step, "of what is left L2"
    assert up.traffic == pytest.approx(l2.tile - 5 * l2.step)
    alone = choose(shape, Device(cluster=1))
    assert alone.blocks == 1 and plan.loop_seconds < 0.95 * alone.loop_seconds
    # Of a sequence that ends in the first block's rows, that block has them all.
    few = choose(SMALL._replace(length=64)).tiles._replace(rows=128, blocks=2)
    cost = plan_of(SMALL._replace(length=64), Device(), few).phases[Forward.QKV]
    assert cost.bytes == pytest.approx(36 * 768 * (2 * 2 * 64 + 2 * 64 * Device().multicast_cost))


def test_four_blocks_share_rows_and_columns_where_l2_binds():
    """Of 64 rows by half of the columns each two get what one of them loads, rows as well as weights."""
    shape, device = SMALL._replace(length=256), Device()
    plan = choose(shape)
    assert plan.tiles == Tiles(128, 256, 64, 256, 256, 2, 4, blocks=4, sum_rows=16)
    up, rows, weights = plan.phases[Forward.MLP_IN], 768 * 4 * 128, 768 * 2 * 256
    assert up.tiles == 24 and up.waves == 1 and up.bytes == pytest.approx(24 * 1.2 * (rows + weights))
    port, l2 = up.ways
    assert port.tile == pytest.approx((rows + weights) / 2 / device.sm_bytes)
    assert port.step == pytest.approx(weights / 2 / 12 / device.sm_bytes)
    assert l2.step == pytest.approx(24 * 1.2 * weights / 12 / device.l2_bytes)
    # One block's 64 rows by 128 columns, at its SM's share of the rate; reading them takes less.
    assert up.arithmetic == pytest.approx(2 * 64 * 128 * 768 * 132 / device.product_flops)
    assert 768 * (64 * 4 + 128 * 2) / device.shared_read_bytes < up.arithmetic
    assert plan.loop_seconds < 0.95 * choose(shape, Device(cluster=2)).loop_seconds
    # A tile of q, k and v for each of 36 fours, and 32 of these at a time: two rounds, and so pairs.
    assert choose(SMALL._replace(length=512)).blocks == 2
    fours = plan_of(SMALL._replace(length=512), device, plan.tiles)
    assert fours.phases[Forward.QKV].tiles == 36 and fours.phases[Forward.QKV].waves == 2


@pytest.mark.parametrize(("sms", "fours"), [(132, 32), (114, 24), (78, 16), (16, 1), (1, 1)])
def test_clusters_of_four_are_in_one_part_of_the_gpu(sms, fours):
    device = Device(sms=sms)
    assert device.clusters(4) == fours and device.clusters(2) == max(1, sms // 2)
    assert device.clusters(1) == sms


def test_few_tokens_cut_the_inner_dimension():
    """48 tiles of 3072 keep 48 SMs busy: parts of them more, for one more wait."""
    plan = choose(SMALL._replace(length=128))
    assert plan.tiles.mlp_out_parts == 6 and plan.phases[Forward.MLP_OUT].tiles == 24
    whole = choose(SMALL._replace(length=128), parts=1)
    assert whole.tiles.mlp_out_parts == 1 and plan.loop_seconds < whole.loop_seconds - 2e-6
    # A part reads a sixth of the rows and columns, and writes its sums; MLP_SUM reads the six.
    moved = 4 * 6 * (512 * 2 * (128 + 192) * Device().multicast_cost + 4 * 128 * 192)
    assert plan.phases[Forward.MLP_OUT].bytes == pytest.approx(moved)
    assert plan.phases[Forward.MLP_SUM].bytes == 128 * 768 * (6 * 4 + 4 + 4 + 2)
    assert choose(SMALL._replace(length=4096)).tiles.mlp_out_parts == 1
    wide = BlockShape(1, 128, 4096, 64, 16384, 2)
    assert choose(wide).tiles.sum_rows == 0, "a row has more columns than the quads of a block hold"
    assert choose(wide, ASSUMED[8, 0]).tiles.mlp_out_parts == 1


def test_few_tokens_have_small_tiles_of_heads():
    """Of two groups one has a head of q, k and v, and in attention."""
    shape = SMALL._replace(length=128)
    plan = choose(shape)
    assert (plan.tiles.qkv, plan.tiles.heads, plan.blocks) == (128, 2, 4), "of two blocks, side by side"
    assert plan.phases[Forward.ATTENTION].tiles == 6
    for larger in (plan.tiles._replace(qkv=256), plan.tiles._replace(heads=4)):
        assert plan_of(shape, Device(), larger).loop_seconds > plan.loop_seconds + 4e-7
    assert choose(shape, ASSUMED[8, 0]).tiles.qkv == 128, "nor are there such tiles for Ampere"
    assert choose(shape, ASSUMED[8, 0]).tiles.heads == 2
    odd = choose(BlockShape(1, 32, 192, 3, 768, 2))
    assert odd.tiles.rows == 64 and odd.tiles.heads == 1


def test_many_tokens_add_the_same_parts_in_one_tile():
    """To the same bits, and by the model for nothing: no sums wait in memory."""
    shape = SMALL._replace(batch=16, length=256)
    plan = choose(shape)
    assert plan.tiles.mlp_out_parts == 4 and not plan.tiles.sum_rows and Forward.MLP_SUM not in plan.phases
    whole = plan_of(shape, Device(), plan.tiles._replace(mlp_out_parts=1))
    assert plan.loop_seconds == whole.loop_seconds
    apart = plan_of(shape, Device(), plan.tiles._replace(sum_rows=32))
    assert apart.loop_seconds > 1.1 * plan.loop_seconds
    # A group of warps has registers for two sums of 192 columns.
    assert plan.tiles.mlp_out == 192
    assert choose(shape, Device().without_hopper()).tiles.sum_rows > 0, "whose kernel has no such tiles"


def test_what_shared_memory_gives_to_products():
    """Two groups read all rows for half of the columns each, one reads them once."""
    work = [
        product_work(SMALL, Tiles(rows, 1, 1, 1, 1), columns, 768, left_bytes=left)
        for rows, columns, left in ((64, 64, 2), (64, 256, 4), (128, 64, 2))
    ]
    assert [each.shared_read for each in work] == [
        768 * (64 * 2 + 64 * 2), 768 * (2 * 64 * 4 + 256 * 2), 768 * (128 * 2 + 2 * 64 * 2)
    ]  # fmt: skip
    slow = Device(shared_read_bytes=0.05e12)
    tiles = choose(SMALL._replace(length=128)).tiles
    cost = plan_of(SMALL._replace(length=128), slow, tiles).phases[Forward.QKV]
    assert cost.arithmetic == pytest.approx(768 * 256 / 0.05e12)


def test_rows_that_go_one_behind_the_other_wait_for_l2():
    shape, trip = SMALL._replace(length=512), Device().load_seconds
    tiles = Tiles(128, 128, 64, 128, 128, 2, 4, 0, 2, 4)
    sums = [plan_of(shape, Device(), tiles._replace(sum_rows=n)).phases[Forward.MLP_SUM] for n in (4, 8, 32)]
    # Of 768 columns the quads of a block have two rows, and room for three each: 2, 4 and 16 of a block.
    assert [cost.trips for cost in sums] == [1, 1, 3] and [cost.waves for cost in sums] == [2, 1, 1]
    assert [cost.seconds - cost.traffic for cost in sums] == pytest.approx([trip, 0, 2 * trip])
    norms = plan_of(shape, Device(), Tiles(256, 192, 96, 192, 96, part=128, blocks=2)).phases[Forward.NORM1]
    assert norms.trips == 4, "64 rows of a block, two for each of eight warps"
    assert norms.of_tile(behind_wait=False) == pytest.approx(norms.of_tile(behind_wait=True) + trip)


def test_numbers_of_the_model_are_those_of_the_kernel():
    cuda = sources.folder() / "cuda"
    rows = (cuda / "looped_blocks" / "row_phases.cuh").read_text()
    assert f"constexpr int kAloneColumns = {ALONE_COLUMNS};" in (cuda / "tile/config_sm90.cuh").read_text()
    assert f"constexpr int kSumsTogether = {SUMS_TOGETHER};" in rows
    assert "kRows = Config::kHidden <= 1024 ? 2 : 1;" in rows, "rows of a norm, as its trips are counted"


@pytest.mark.parametrize("length", [1, 32, 64, 81, 128, 200, 512])
def test_parts_do_not_depend_on_the_batch(length):
    """They decide in which order numbers are added."""
    parts = {choose(SMALL._replace(length=length, batch=batch)).tiles.mlp_out_parts for batch in (1, 3, 64)}
    assert len(parts) == 1


def test_rows_beyond_the_sequence_are_not_moved():
    tiles = choose(SMALL._replace(length=64)).tiles
    assert (tiles.rows, tiles.qkv, tiles.mlp_in) == (64, 64, 64)
    few, more = (plan_of(SMALL._replace(length=length), Device(), tiles) for length in (16, 64))
    assert more.phases[Forward.MLP_IN].bytes - few.phases[Forward.MLP_IN].bytes == 48 * 48 * 768 * 4
    assert more.phases[Forward.QKV].bytes - few.phases[Forward.QKV].bytes == 36 * 48 * 768 * 2


def test_few_keys_are_one_small_block():
    blocks = {length: choose(SMALL._replace(length=length)).key_block for length in (1, 64, 65, 1024)}
    assert blocks == {1: 64, 64: 64, 65: 128, 1024: 128}
    few = choose(SMALL._replace(length=64))
    assert few.phases[Forward.ATTENTION].arithmetic == pytest.approx(1.6 * 4 * 64 * 64 * 64 * 132 / 450e12)
    assert key_block(SMALL._replace(length=64), few.tiles._replace(rows=128)) == 128, "a box has more rows"


def test_the_plan_is_the_best_of_all_tiles():
    shape = SMALL._replace(length=300)
    best = choose(shape)
    parts, both = best.tiles.mlp_out_parts, (64, 128)
    for rows, qkv, out, up, down, heads, sums in itertools.product(
        both, both, both, both, both, (1, 2), (0, best.tiles.sum_rows)
    ):
        if heads <= 128 // rows:
            tiles = Tiles(rows, qkv, out, up, down, heads, parts, sum_rows=sums)
            assert plan_of(shape, Device(), tiles).loop_seconds >= best.loop_seconds


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
    with pytest.raises(ValueError, match="do not fit the 24000 bytes of shared memory"):
        choose(SMALL, Device(shared_bytes=24_000))


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
        product_flops=1400e12,
        attention_flops=900e12,
        l2_bytes=11e12,
        sm_bytes=0.22e12,
        wait_seconds=0.75e-6,
        shared_read_bytes=0.4e12,
    )
    assert choose(SMALL, faster).loop_seconds == pytest.approx(plan.loop_seconds / 2)


def test_widths_that_no_tile_divides():
    for hidden, heads in ((40, 1), (32, 1), (96, 3), (160, 5), (224, 7)):
        with pytest.raises(ValueError, match=r"no tiles .* multiples of 64"):
            choose(BlockShape(1, 8, hidden, heads, 4 * hidden, 1))


def by_stages(ways, arithmetic, steps, stages, waves, wait):
    """Seconds from the end of the wait until a block's last tile is multiplied, one stage after another.

    Loads go through `ways`, each a pair of what a step's weights and rows take there. The weights of the
    first stages are asked for when the wait begins, rows when it ends, a later stage when the one that was in
    its place has been read.
    """
    clocks = [-wait] * len(ways)

    def load(weights, rows, start):
        for i, (of_weights, of_rows) in enumerate(ways):
            start = max(start, clocks[i])
            clocks[i] = max(start + weights * of_weights + rows * of_rows, clocks[i - 1] if i else start)
        return clocks[-1]

    ahead = min(steps, stages)
    for _ in range(ahead):
        load(1, 0, -wait)
    read = [0.0] * stages  # nothing is read within the wait
    for step in range(waves * steps):
        loaded = load(step >= ahead, 1, read[-stages])
        read.append(max(loaded, read[-1]) + arithmetic)
    return read[-1]


@pytest.mark.parametrize("wait", [0.0, 0.4, 1.5, 50.0])
def test_the_formula_beside_loads_stage_by_stage(wait):
    """It neglects how a pipeline fills: rows of one step, or arithmetic of two."""
    times = itertools.product((0.0, 0.05, 0.3, 1.0), (0.05, 0.2, 1.0), (0.05, 0.3, 1.0, 1.5))
    for (rows, weights, arithmetic), stages, steps, waves in itertools.product(
        times, (2, 3, 7), (4, 12), (1, 3)
    ):
        way = Way(steps * (rows + weights), weights)
        cost = PhaseCost(1, waves, waves * steps * arithmetic, (way, way), 0, steps).after(wait, stages)
        simulated = by_stages([(weights, rows)], arithmetic, steps, stages, waves, wait)
        assert cost.seconds - 1e-9 <= simulated <= cost.seconds + max(rows, 2 * arithmetic) + 1e-9


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("length", [32, 128, 256, 512, 1024])
def test_the_products_of_a_plan_beside_loads_stage_by_stage(length, batch):
    """Out of L2, then through the port of an SM, whichever takes longer at the moment."""
    plan, wait = choose(SMALL._replace(length=length, batch=batch)), Device().wait_seconds
    products = [cost for cost in plan.phases.values() if cost.steps > 1]
    assert len(products) == 4
    for cost in products:
        arithmetic = cost.arithmetic / cost.waves / cost.steps
        ways = [(way.step, way.tile / cost.steps - way.step) for way in reversed(cost.ways)]
        simulated = by_stages(ways, arithmetic, cost.steps, plan.stages, cost.waves, wait)
        slack = max(max(rows for _, rows in ways), 2 * arithmetic)
        assert cost.seconds - 1e-12 <= simulated <= cost.seconds + slack


def test_what_crosses_a_wait():
    way = Way(tile=24.0, step=1.0)
    cost = PhaseCost(1, 2, 1.0, (way, Way(tile=12.0, step=0.5)), 0, steps=12)
    assert cost.traffic == 48
    assert cost.after(0.0, 4).traffic == 48, "nothing without a wait"
    assert cost.after(3.0, 0).traffic == 48, "nor without a stage"
    assert cost.after(3.0, 4).traffic == 45, "no more than the wait, and of the first wave"
    assert cost.after(50.0, 4).traffic == 44, "no more than the stages hold"
    assert cost.after(50.0, 20).traffic == 36, "nor than the tile has"
    bound = cost._replace(arithmetic=100.0)
    assert bound.after(3.0, 4).seconds == 101, "rows come behind the weights"
    assert bound.after(50.0, 4).seconds == 100
    # Of a tile alone: the first wave's, and a later one's.
    assert [cost.after(3.0, 4).of_tile(behind_wait=behind) for behind in (True, False)] == [21, 24]
    rows = PhaseCost(1, 1, 1.0, (Way(24.0, 0.0), Way(12.0, 0.0)), 0, steps=1)
    assert rows.after(3.0, 4) == rows, "what has no weights"


def test_weights_and_no_other_operands_cross_a_wait():
    forward, back = choose(SMALL), choose_backward(SMALL._replace(batch=8))
    assert {phase.name for phase, cost in forward.phases.items() if cost.ahead} == {
        "QKV", "ATTN_OUT", "MLP_IN", "MLP_OUT",
    }  # fmt: skip
    assert {phase.name for phase, cost in back.phases.items() if cost.ahead} == {
        "QKV", "ATTN_OUT", "MLP_IN", "MLP_OUT", "GRAD_MLP_IN", "GRAD_NORM2", "GRAD_MIXED", "GRAD_NORM1",
    }  # fmt: skip
    for plan in (forward, back):
        for cost in plan.phases.values():
            assert max(cost.ahead * way.step for way in cost.ways) <= Device().wait_seconds * (1 + 1e-9)
    at_once = choose(SMALL, Device(wait_seconds=0.0))
    assert not any(cost.ahead for cost in at_once.phases.values())


def test_on_ampere_one_stage_stays_empty():
    device = ASSUMED[8, 0]
    plan = choose(SMALL._replace(length=128), device)
    assert plan.phases[Forward.QKV].ahead == plan.stages - 1 > 0


def test_columns_are_the_fastest_for_the_stages_they_leave():
    """With fewer columns the ring is deeper and more weights cross a wait: no other columns are faster."""
    for length in (32, 128, 512):
        shape = SMALL._replace(length=length)
        best = choose(shape)
        for qkv, out, up, down in itertools.product((128, 256), (64, 128), (64, 128, 192, 256), (64, 128)):
            tiles = best.tiles._replace(qkv=qkv, attn_out=out, mlp_in=up, mlp_out=down)
            other = plan_of(shape, Device(), tiles)
            assert other.stages < 3 or other.loop_seconds >= best.loop_seconds - 1e-12
