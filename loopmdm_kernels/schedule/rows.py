"""The kernel for narrow blocks: whether it takes a shape, and what that costs by the model.

Each block of threads has eight tokens of a sequence and streams the weights of all layers past them; a
cluster has the sequence (csrc/cuda/looped_blocks/looped_rows_sm90.cu).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from loopmdm_kernels.schedule.cost import STEP
from loopmdm_kernels.schedule.device import Device
from loopmdm_kernels.schedule.forward import STATISTICS_COLUMNS
from loopmdm_kernels.schedule.plan import FIXED_BYTES, choose, tiled_batch
from loopmdm_kernels.schedule.table import BlockShape

ROWS = 8  # tokens of a block
KEYS = 128  # the most that it meets at once
MOST_HIDDEN = 256  # a warp normalises whole rows
HEAD_DIMS = (16, 32, 64)
GROUP_FEATURES = 64  # of a stage of weights, for each group of warps
ENOUGH_STAGES = 4


class RowsPlan(NamedTuple):
    blocks: int  # of a cluster
    groups: int  # of warps that compute
    stages: int
    mlp_out_parts: int
    beside_bytes: int  # of shared memory, besides the ring
    loop_seconds: float

    @property
    def stage_bytes(self) -> int:
        return 2 * self.features * STEP

    @property
    def features(self) -> int:
        """Of a stage."""
        return GROUP_FEATURES * self.groups

    @property
    def threads(self) -> int:
        """Those that compute, and a warp that loads."""
        return 128 * self.groups + 32

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + self.beside_bytes + FIXED_BYTES


def choose_rows(
    shape: BlockShape,
    device: Device = Device(),  # noqa: B008 - immutable
    clusters: int | None = None,
) -> RowsPlan | None:
    """The plan where this kernel takes the shape and is the faster one, for the next of the tiles' batches.

    Args:
        clusters: that the device holds at the same time, where that is known.
    """
    shape, tiled = tiled_batch(shape), choose(shape, device)
    plan = rows_plan(shape, device, tiled.tiles.mlp_out_parts, clusters)
    return plan if plan is not None and plan.loop_seconds < tiled.loop_seconds else None


def rows_plan(
    shape: BlockShape, device: Device, mlp_out_parts: int, clusters: int | None = None
) -> RowsPlan | None:
    """None where the shape does not fit the kernel, or the kernel not the device."""
    blocks = math.ceil(shape.length / ROWS)
    groups = 1 if shape.hidden == GROUP_FEATURES else 2
    widths = (shape.hidden, shape.mlp)
    if (
        shape.length > KEYS
        or shape.hidden > MOST_HIDDEN
        or blocks > min(device.cluster, device.sms)
        or shape.head_dim not in HEAD_DIMS
        or any(width % (GROUP_FEATURES * groups) for width in widths)
    ):
        return None
    beside = _beside_bytes(shape, blocks, groups)
    plan = RowsPlan(blocks, groups, 0, mlp_out_parts, beside, math.inf)
    plan = plan._replace(stages=(device.shared_bytes - plan.shared_bytes) // plan.stage_bytes)
    if plan.stages < ENOUGH_STAGES:
        return None
    if clusters is None:  # of a device in parts that each hold the largest one
        clusters = max(1, device.sms // device.cluster) * (min(device.cluster, device.sms) // blocks)
    return plan._replace(loop_seconds=_loop_seconds(shape, device, plan, clusters))


def _atoms(number: int) -> int:
    return -(-number // 1024) * 1024


def _beside_bytes(shape: BlockShape, blocks: int, groups: int) -> int:
    """As `Places` of rows_config_sm90.cuh has it, which asserts that it is the same."""
    panels, heads = shape.hidden // STEP, STEP // shape.head_dim
    keys = math.ceil(blocks * ROWS / 16) * 16
    tiles = math.ceil(keys / 64)
    operand = 128 * ROWS
    kept = 2 * panels * keys * 128 + 2 * panels * operand
    wide = max(groups * tiles * heads * operand, shape.mlp // STEP * operand)
    sums = 4 * max(ROWS * (2 * shape.hidden + 4), groups * heads * 4 * ROWS * (8 * tiles + 1))
    parts = shape.hidden // STATISTICS_COLUMNS
    rows = 2 * 4 * ROWS * (parts * (STATISTICS_COLUMNS + 8) + 4) + 8 * ROWS * parts
    softmax = 4 * groups * heads * ROWS * (4 + 1)
    return _atoms(kept + wide + _atoms(sums) + rows + softmax + 8 * 4 * groups)


def _loop_seconds(shape: BlockShape, device: Device, plan: RowsPlan, clusters: int) -> float:
    """Stage by stage: one is loaded where another has been read, and read where it is loaded.

    Between the products of keys and values and that of what attention gives lies the hand-over, in which
    queries are made; what the cluster hands over comes the same way as the weights.
    """
    rounds = math.ceil(shape.batch / clusters)
    rate = min(device.sm_bytes, device.l2_bytes / (min(shape.batch, clusters) * plan.blocks))
    panels = shape.hidden // STEP
    tiles, mlp_tiles = shape.hidden // plan.features, shape.mlp // plan.features
    of_keys, of_queries, of_out = 2 * tiles * panels, tiles * panels, tiles * panels
    stages = of_keys + of_queries + of_out + 2 * mlp_tiles * panels
    load, read = plan.stage_bytes / rate, plan.stage_bytes / device.shared_read_bytes
    keys = 4 * plan.blocks * ROWS * shape.hidden  # bytes, and values
    meeting = device.meet_seconds

    loaded, done = 0.0, [0.0] * plan.stages  # of the last stages
    ends = []
    for _ in range(4):
        sent = 0.0
        for stage in range(stages):
            loaded = max(loaded, done[-plan.stages]) + load
            start = max(done[-1], loaded)
            if stage == of_keys:
                start += 2 * meeting
                sent = start + device.cluster_wait_seconds + keys / rate
                loaded += keys / rate
            elif stage == of_keys + of_queries:
                start = max(start + 2 * meeting, sent) + keys / device.shared_read_bytes + 4 * meeting
            elif stage in (0, stages - mlp_tiles * panels, of_keys + of_queries + of_out):
                start += 2 * meeting
            done.append(start + read)
        ends.append(done[-1])
    return rounds * shape.layers * (ends[-1] - ends[-2])
