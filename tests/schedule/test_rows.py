"""The plan of the kernel for narrow blocks."""

import pytest

from loopmdm_kernels.schedule import BlockShape, Device, choose, choose_rows
from loopmdm_kernels.schedule.rows import rows_plan

SUDOKU = BlockShape(1, 81, 128, 4, 512, 2)
AT_ONCE = Device(cluster_wait_seconds=0.0, meet_seconds=0.0, shared_read_bytes=1e18)


def test_a_cluster_holds_a_sequence():
    for length, blocks in ((1, 1), (8, 1), (9, 2), (81, 11), (128, 16)):
        plan = choose_rows(SUDOKU._replace(length=length))
        assert plan.blocks == blocks and plan.groups == 2 and plan.threads == 288
        assert plan.shared_bytes <= Device().shared_bytes < plan.shared_bytes + plan.stage_bytes
    assert choose_rows(BlockShape(1, 36, 64, 4, 256, 2)).threads == 160


@pytest.mark.parametrize(
    "other",
    [
        {"length": 129},
        {"heads": 1},  # of 128
        {"hidden": 192, "heads": 6, "mlp": 768},
        {"mlp": 192},  # one group of warps would have nothing to do
        {"hidden": 384, "heads": 12, "mlp": 1536},  # a warp would not normalise whole rows
    ],
)
def test_what_it_does_not_take(other):
    assert rows_plan(SUDOKU._replace(**other), Device(), 1) is None


def test_devices_without_room_for_the_cluster():
    assert rows_plan(SUDOKU, Device(cluster=8), 1) is None
    assert rows_plan(SUDOKU, Device(sms=10), 1) is None
    assert rows_plan(SUDOKU, Device(sms=11), 1).blocks == 11
    assert rows_plan(SUDOKU, Device(shared_bytes=101_376), 1) is None


def test_a_device_with_fewer_clusters_than_assumed():
    """Eight sequences then take two rounds."""
    eight = SUDOKU._replace(batch=8)
    assert choose_rows(eight, clusters=8) == choose_rows(eight)
    assert choose_rows(eight, clusters=7) is None
    assert choose_rows(SUDOKU, clusters=1) == choose_rows(SUDOKU)


def test_a_device_of_one_multiprocessor():
    assert choose(SUDOKU._replace(length=8), Device(sms=1)).loop_seconds > 0


def test_it_is_chosen_where_it_is_faster():
    """Which follows the next of the batches that tiles are chosen for."""
    for batch in (1, 2, 3, 4, 8):
        shape = SUDOKU._replace(batch=batch)
        assert choose_rows(shape).loop_seconds < choose(shape).loop_seconds
        assert choose_rows(shape).mlp_out_parts == choose(shape).tiles.mlp_out_parts
    assert choose_rows(SUDOKU._replace(batch=3)) == choose_rows(SUDOKU._replace(batch=4))
    assert choose_rows(SUDOKU._replace(batch=512)) is None
    assert choose_rows(SUDOKU._replace(hidden=256, heads=8, mlp=1024)) is None
    assert rows_plan(SUDOKU._replace(hidden=256, heads=8, mlp=1024), Device(), 1) is not None


def test_a_loop_takes_what_its_weights_take_to_stream_by():
    """Where nothing else takes time: those of two layers, and keys and values of each."""
    streamed = 2 * (24 * 128 * 128 + 4 * 88 * 128)
    assert rows_plan(SUDOKU, AT_ONCE, 1).loop_seconds == pytest.approx(streamed / 0.11e12, rel=0.02)
    eight = rows_plan(SUDOKU._replace(batch=8), AT_ONCE, 1).loop_seconds  # what L2 gives 88 blocks
    assert eight == pytest.approx(streamed / (5.5e12 / 88), rel=0.02)
    assert rows_plan(SUDOKU._replace(batch=16), AT_ONCE, 1).loop_seconds == pytest.approx(2 * eight)


def test_a_loop_takes_what_nothing_can_overlap():
    """Products out of shared memory, the hand-over and the meetings, where loads take no time."""
    device = Device(sm_bytes=1e18, l2_bytes=1e21)
    # Values and queries are made while keys are on their way, values are sent while keys are met.
    read = (20 * 128 * 128 + 4 * 88 * 128) / device.shared_read_bytes
    layer = read + device.cluster_wait_seconds + 10 * device.meet_seconds
    assert rows_plan(SUDOKU, device, 1).loop_seconds == pytest.approx(2 * layer, rel=0.01)
    # Heads of 64: keys meet once more before they are rotated.
    wide_heads = rows_plan(SUDOKU._replace(heads=2), device, 1).loop_seconds
    assert wide_heads == pytest.approx(2 * (layer + device.meet_seconds), rel=0.01)
