"""The tiles that the model of the GPU's limits picks for the backward pass."""

import pytest

from loopmdm_kernels.schedule import (
    Backward,
    BackwardTiles,
    BlockShape,
    Device,
    build_backward,
    choose,
    choose_backward,
)
from loopmdm_kernels.testing.schedule import check

SMALL = BlockShape(batch=8, length=1024, hidden=768, heads=12, mlp=3072, layers=2)


def test_plan_of_a_known_shape():
    plan = choose_backward(SMALL)
    assert plan.tiles == BackwardTiles(rows=256, columns=256, part=32) and plan.blocks == 2
    assert (plan.stages, plan.stage_bytes, plan.kept_bytes) == (4, 49152, 32768)
    weights = plan.phases[Backward.WEIGHT_MLP_IN]
    # 12 by 3 tiles, each of 256 rows and 256 columns, which both blocks get, over 8192 tokens.
    assert (weights.tiles, weights.waves) == (36, 1)
    assert weights.bytes == pytest.approx(36 * 8192 * 2 * (256 + 1.2 * 256))
    assert weights.arithmetic == pytest.approx(2 * 256 * 256 * 8192 * 66 / 700e12)
    # A wait behind each of 16 phases; 108 tiles of weights' gradients follow each other on 66 pairs.
    others = [cost.seconds for phase, cost in plan.phases.items() if phase < Backward.WEIGHT_MLP_OUT]
    waits = 16 * Device().wait_seconds
    assert plan.loop_seconds == pytest.approx(2 * (sum(others) + waits + 2 * weights.seconds))
    assert set(plan.phases) == set(Backward)
    assert all(
        plan.phases[phase].tiles == sum(item.phase == phase and item.layer == 1 for item in table.loop)
        for table in (build_backward(SMALL, plan.tiles),)
        for phase in Backward
        if phase != Backward.TOP
    )


@pytest.mark.parametrize("length", [1, 81, 1024])
@pytest.mark.parametrize(("hidden", "heads", "mlp"), [(192, 3, 768), (512, 8, 2048), (1024, 8, 4096)])
def test_plans_are_legal(length, hidden, heads, mlp):
    shape = BlockShape(1, length, hidden, heads, mlp, 1)
    plan = choose_backward(shape)
    assert plan.shared_bytes <= 232_448 and plan.stages >= 3 and plan.stage_bytes % 1024 == 0
    table = build_backward(shape, plan.tiles)
    if len(table.loop) < 250:
        check(table, loops=2)


def test_few_rows_and_gpus_without_pairs_get_tiles_of_one_block():
    for shape, device in ((SMALL._replace(batch=16, length=128), Device()), (SMALL, Device(cluster=1))):
        plan = choose_backward(shape, device)
        assert plan.tiles == BackwardTiles(rows=128, columns=192, part=16) and plan.blocks == 1


def test_its_arithmetic_beside_that_of_the_forward_pass():
    """Three times the products of layers; of attention nine products of scores' size beside two."""
    rates = Device(wait_seconds=0, l2_bytes=1e18, sm_bytes=1e16)
    ratio = choose_backward(SMALL, rates).loop_seconds / choose(SMALL, rates).loop_seconds
    assert 3 < ratio < 4.5


def test_widths_that_no_tile_divides():
    with pytest.raises(ValueError, match="no tiles of"):
        choose_backward(BlockShape(1, 8, 96, 1, 384, 1))
