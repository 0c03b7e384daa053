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

    def handed_over_bytes(self, shape: BlockShape) -> int:
        """Keys of all blocks that a block gets; as many of values."""
        return 2 * self.blocks * ROWS * shape.hidden

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


class Places(NamedTuple):
    """Of a block's shared memory behind the ring, where keys and values begin, in bytes.

    As rows_config_sm90.cuh has them, which asserts that `end` is the same.
    """

    queries: int
    rows: int
    wide: int
    end: int


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
    plan = RowsPlan(blocks, groups, 0, mlp_out_parts, places(shape, blocks, groups).end, math.inf)
    plan = plan._replace(stages=(device.shared_bytes - plan.shared_bytes) // plan.stage_bytes)
    if plan.stages < ENOUGH_STAGES:
        return None
    if clusters is None:  # of a device in parts that each hold the largest one
        clusters = max(1, device.sms // device.cluster) * (min(device.cluster, device.sms) // blocks)
    return plan._replace(loop_seconds=_loop_seconds(shape, device, plan, clusters))


def _turns_in_thread(shape: BlockShape, groups: int) -> bool:
    """Whether a thread has both features of each pair that is rotated."""
    return 8 * shape.head_dim // 2 <= GROUP_FEATURES * groups


def _atoms(number: int) -> int:
    return -(-number // 1024) * 1024


def places(shape: BlockShape, blocks: int, groups: int) -> Places:
    panels, heads = shape.hidden // STEP, STEP // shape.head_dim
    keys = math.ceil(blocks * ROWS / 16) * 16
    tiles = math.ceil(keys / 64)
    operand = 128 * ROWS
    wide = max(groups * tiles * heads * operand, shape.mlp // STEP * operand)
    turned = ROWS * (shape.hidden + 4) * (not _turns_in_thread(shape, groups))
    sums = 4 * max(turned, groups * heads * 4 * ROWS * (8 * tiles + 1))
    parts = shape.hidden // STATISTICS_COLUMNS
    kept = 2 * 4 * ROWS * (parts * (STATISTICS_COLUMNS + 8) + 4) + 8 * ROWS * parts
    softmax = 4 * groups * heads * ROWS * (4 + 1)
    queries = 2 * panels * keys * 128
    rows = _atoms(queries + panels * operand + kept)
    return Places(
        queries,
        rows,
        rows + panels * operand,
        _atoms(rows + panels * operand + wide + sums + softmax + 8 * 4 * groups),
    )


def _loop_seconds(shape: BlockShape, device: Device, plan: RowsPlan, clusters: int) -> float:
    """Stage by stage: one is loaded where another has been read, and read where it is loaded.

    Keys are handed over, then values, then queries are made. What the cluster hands over comes the same way
    as the weights. Scores wait for keys, means for values.
    """
    rounds = math.ceil(shape.batch / clusters)
    rate = min(device.sm_bytes, device.l2_bytes / (min(shape.batch, clusters) * plan.blocks))
    panels = shape.hidden // STEP
    product, mlp = shape.hidden // plan.features * panels, shape.mlp // plan.features * panels  # stages
    stages = 4 * product + 2 * mlp
    load, read = plan.stage_bytes / rate, plan.stage_bytes / device.shared_read_bytes
    keys = plan.handed_over_bytes(shape)
    sent = device.cluster_wait_seconds + keys / rate
    keys_read = keys / device.shared_read_bytes
    step = device.meet_seconds
    again = 3 * (panels // plan.groups - 1) * step  # attention of a group's other panels
    rotate = step * (1 if _turns_in_thread(shape, plan.groups) else 2)

    loaded, done = 0.0, [0.0] * plan.stages  # of the last stages
    keys_sent = values_sent = 0.0
    ends = []
    for _ in range(4):
        for stage in range(stages):
            loaded = max(loaded, done[-plan.stages]) + load
            start = max(done[-1], loaded)
            if stage == 0:  # residual, norm
                start += 2 * step
            elif stage == product:
                start += rotate
                keys_sent = start + sent
                loaded += keys / rate
            elif stage == 2 * product:
                start += step
                values_sent = start + sent
                loaded += keys / rate
            elif stage == 3 * product:
                start = max(start + rotate, keys_sent) + keys_read + 2 * step  # the largest; weights
                start = max(start, values_sent) + keys_read + 2 * step + again  # their sums; means
            elif stage == 4 * product:  # residual, norm
                start += 2 * step
            elif stage == 4 * product + mlp:  # GELU of the last features
                start += step
            done.append(start + read)
        ends.append(done[-1])
    return rounds * shape.layers * (ends[-1] - ends[-2])
