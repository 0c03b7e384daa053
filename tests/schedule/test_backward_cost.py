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
    assert plan.tiles == BackwardTiles(rows=128, columns=192, part=16)
    assert (plan.stages, plan.stage_bytes, plan.kept_bytes) == (4, 40960, 32768)
    weights = plan.phases[Backward.WEIGHT_MLP_IN]
    # 24 by 4 tiles, each of 128 rows and 192 columns, over 8192 tokens.
    assert (weights.tiles, weights.waves) == (96, 1)
    assert weights.bytes == 96 * 8192 * 2 * (128 + 192)
    assert weights.arithmetic == pytest.approx(2 * 128 * 192 * 8192 * 132 / 700e12)
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


def test_it_takes_about_four_times_the_arithmetic_of_the_forward_pass():
    rates = Device(wait_seconds=0, l2_bytes=1e18, sm_bytes=1e16)
    ratio = choose_backward(SMALL, rates).loop_seconds / choose(SMALL, rates).loop_seconds
    assert 3.5 < ratio < 5


def test_widths_that_no_tile_divides():
    with pytest.raises(ValueError, match="no tiles of"):
        choose_backward(BlockShape(1, 8, 96, 1, 384, 1))
