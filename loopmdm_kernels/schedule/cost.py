"""Picks the tiles of a shape by a model of the GPU's limits: arithmetic, L2 traffic, waiting.

A phase is `waves` rounds of equal tiles. A tile takes the longer of its arithmetic, at the SM's share of the
device's rate, and of its operands' way from L2, at the rate that the SMs at work leave each other. Between
phases lies one wait for counters. The rates are assumptions until they are measured on the device; a plan
is a ranking of tiles first and a time second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loopmdm_kernels.schedule.measured import Table as Measured
from loopmdm_kernels.schedule.table import BlockShape, Phase, Table, Tiles

STEP = 64  # of the inner dimension, per stage of the ring: 128 bytes of bf16, one swizzle row
KEY_BLOCKS = (64, 128)  # keys that one step of the attention meets
FIXED_BYTES = 2_048  # barriers and instructions, and the ring's alignment
MAX_STAGES = 8
ENOUGH_STAGES = 3  # with two a load has only one step of arithmetic to hide behind
RESIDENT_STAGES = 4  # of the ring, beside weights that stay in shared memory
COUNTER_BYTES = 1_024  # room for the counters of a cluster in the shared memory of one block
ROW_TILES = (64, 128)
COLUMN_TILES = (64, 128)  # 96 or 192 want more registers than there are: docs/kernels/looped_blocks.md
PARTS = (1, 2, 3, 4, 6, 8, 12)  # of MLP_OUT's inner dimension
# Share of the time that a split may take, which costs traffic in every batch and may gain in none, and a
# cluster, which leaves most of the device alone.
WORTH = 0.9
Columns = tuple[list[int], list[int], list[int]]


class Device(NamedTuple):
    """What a GPU can do, per second and byte. Defaults: H200, as assumed in docs/kernels/looped_blocks.md."""

    sms: int = 132
    product_flops: float = 700e12
    attention_flops: float = 450e12
    l2_bytes: float = 5.5e12
    sm_bytes: float = 0.11e12  # one SM alone: 64 bytes a cycle
    wait_seconds: float = 1e-6  # from the last signal of a phase to the first load of the next
    shared_bytes: int = 232_448  # what a block may use
    keeps_weights: bool = True  # its kernel can leave weights in shared memory for all loops
    cluster: int = 16  # blocks that can signal by the shared memory of one of them; 1: its kernel cannot
    cluster_wait_seconds: float = 0.6e-6  # instead of wait_seconds: without two ways to L2 and back

    def as_cluster(self) -> Device:
        """The part of the device that one cluster is."""
        share = self.cluster / self.sms
        return self._replace(
            sms=self.cluster,
            product_flops=self.product_flops * share,
            attention_flops=self.attention_flops * share,
            wait_seconds=self.cluster_wait_seconds,
            shared_bytes=self.shared_bytes - COUNTER_BYTES,
        )


# By compute capability: A100, RTX 3090, RTX 4090, H200. Peak rates times what their like reach elsewhere;
# nothing here is measured.
ASSUMED = {
    (8, 0): Device(
        108, 200e12, 150e12, 4.0e12, 0.09e12, shared_bytes=166_912, keeps_weights=False, cluster=1
    ),
    (8, 6): Device(82, 50e12, 40e12, 2.0e12, 0.10e12, shared_bytes=101_376, keeps_weights=False, cluster=1),
    (8, 9): Device(128, 120e12, 90e12, 4.5e12, 0.15e12, shared_bytes=101_376, keeps_weights=False, cluster=1),
    (9, 0): Device(),
}


def nearest(capability: tuple[int, int]) -> Device:
    """Of the GPUs something is assumed of, the youngest that is not younger than this."""
    return ASSUMED[max(known for known in ASSUMED if known <= capability)]


def device_of(
    capability: tuple[int, int],
    sms: int,
    shared_bytes: int,
    *,
    name: str = "",
    measured: Measured | None = None,
) -> Device:
    """What is known of a GPU: what `measured` has under its name, and what is assumed for the rest.

    Assumed are the rates of the nearest GPU that is not younger, in proportion to the SMs.
    """
    assumed = nearest(capability)
    share = sms / assumed.sms
    known: dict[str, Any] = {
        "product_flops": assumed.product_flops * share,
        "attention_flops": assumed.attention_flops * share,
        "l2_bytes": assumed.l2_bytes * share,
        **(measured or {}).get(name, {}),
    }
    return assumed._replace(sms=sms, shared_bytes=shared_bytes, **known)


class PhaseCost(NamedTuple):
    tiles: int
    waves: int
    arithmetic: float  # seconds, of all waves
    traffic: float
    bytes: float  # moved from L2 by all tiles
    weights: int = 0  # bytes of a tile's weights

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.traffic)

    def with_resident_weights(self) -> PhaseCost:
        moved = self.bytes - self.tiles * self.weights
        return self._replace(bytes=moved, traffic=self.traffic * moved / self.bytes)


class Plan(NamedTuple):
    tiles: Tiles
    stages: int
    stage_bytes: int
    key_block: int
    resident_bytes: int  # of shared memory for weights that stay in it for all loops; 0: they come from L2
    cluster: int  # blocks, all in one cluster; 1: all that the device holds
    phases: dict[Phase, PhaseCost]  # of one layer
    loop_seconds: float
    limit_seconds: float  # the longest of arithmetic and traffic with all SMs busy, and of the waits alone

    @property
    def shared_bytes(self) -> int:
        counters = COUNTER_BYTES if self.cluster > 1 else 0
        return self.stages * self.stage_bytes + self.resident_bytes + FIXED_BYTES + counters


def choose(shape: BlockShape, device: Device = Device()) -> Plan:  # noqa: B008 - immutable
    """The fastest plan by the model.

    Raises:
        ValueError: the tiles divide a width in no way.
    """
    fitting = {rows: columns for rows in ROW_TILES if all(columns := _columns(shape, rows))}
    if not fitting or shape.mlp % STEP:
        raise ValueError(
            f"no tiles of {ROW_TILES} rows by {COLUMN_TILES} columns divide the widths of {shape}; "
            "with 64 rows a tile is two halves, and a tile of q, k and v holds whole heads"
        )
    parts = _parts(shape, device, fitting)
    plan = _fastest_of_all(shape, device, fitting, parts)
    if _fits_cluster(shape, device, parts):
        alone = _fastest_of_all(shape, device.as_cluster(), fitting, parts)
        if alone.stages >= ENOUGH_STAGES and alone.loop_seconds < WORTH * plan.loop_seconds:
            return alone._replace(cluster=device.cluster)
    if plan.stages < 2:
        raise ValueError(
            f"two stages of {plan.stage_bytes} bytes do not fit the {device.shared_bytes} bytes of shared "
            f"memory that a block has here, for {shape}"
        )
    return plan


def _fastest_of_all(shape: BlockShape, device: Device, fitting: Mapping[int, Columns], parts: int) -> Plan:
    plans = [_fastest(shape, device, rows, *columns, parts) for rows, columns in fitting.items()]
    return min(plans, key=lambda plan: (plan.stages < ENOUGH_STAGES, plan.stages < 2, plan.loop_seconds))


def _fits_cluster(shape: BlockShape, device: Device, parts: int) -> bool:
    """Whether the counters fit, with the smallest tiles and what is counted beside the table.

    Heads of 128 take the registers that waiting for such counters would need.
    """
    smallest = Tiles(min(ROW_TILES), 1, 1, 1, 1, mlp_out_parts=parts)
    counters = Table(shape, smallest, False, (), (), ()).num_counters + shape.batch + 2
    return 1 < device.cluster < device.sms and shape.head_dim <= 64 and 4 * counters <= COUNTER_BYTES


def _columns(shape: BlockShape, rows: int) -> Columns:
    """Columns that tiles may have: of q, k and v; of a product with D results; of MLP_IN."""
    halves = max(ROW_TILES) // rows  # with 64 rows the two groups of warps share the columns, and the heads
    if shape.heads % halves:
        return [], [], []

    def fitting(width: int, multiple: int = 32) -> list[int]:
        return [n for n in COLUMN_TILES if width % n == 0 and n % (halves * multiple) == 0]

    return fitting(3 * shape.hidden, max(32, shape.head_dim)), fitting(shape.hidden), fitting(shape.mlp)


def _parts(shape: BlockShape, device: Device, fitting: Mapping[int, Columns]) -> int:
    """Into how many parts MLP_OUT is cut.

    A sum has other bits for each number of them. It is a function of the sequence alone, so that what a row
    gives does not depend on its batch.
    """
    alone = shape._replace(batch=1)

    def fastest(parts: int) -> float:
        return min(
            _mlp_out_seconds(alone, device, rows, n, parts)
            for rows, (_, out, _) in fitting.items()
            for n in out
        )

    best = min((parts for parts in PARTS if shape.mlp % (parts * STEP) == 0), key=fastest)
    return best if fastest(best) < WORTH * fastest(1) else 1


def _fastest(
    shape: BlockShape, device: Device, rows: int, qkv: list[int], out: list[int], up: list[int], parts: int
) -> Plan:
    """The fastest columns of each product, which do not depend on each other."""

    def stream(width: int) -> Callable[[int], float]:
        return lambda n: _stream_cost(shape, device, rows, n, width).seconds

    tiles = Tiles(
        rows,
        min(qkv, key=stream(3 * shape.hidden)),
        min(out, key=lambda n: _attn_out_cost(shape, device, rows, n).seconds),
        min(up, key=stream(shape.mlp)),
        min(out, key=lambda n: _mlp_out_seconds(shape, device, rows, n, parts)),
        max(ROW_TILES) // rows,
        parts,
    )
    return _plan(shape, device, tiles)


def _plan(shape: BlockShape, device: Device, tiles: Tiles) -> Plan:
    hidden, rows = shape.hidden, tiles.rows
    costs = {
        Phase.QKV: _stream_cost(shape, device, rows, tiles.qkv, 3 * hidden),
        Phase.ATTENTION: _attention_cost(shape, device, tiles),
        Phase.ATTN_OUT: _attn_out_cost(shape, device, rows, tiles.attn_out),
        Phase.MLP_IN: _stream_cost(shape, device, rows, tiles.mlp_in, shape.mlp),
        **_mlp_out_costs(shape, device, rows, tiles.mlp_out, tiles.mlp_out_parts),
    }
    stage = stage_bytes(shape, tiles)
    room = device.shared_bytes - FIXED_BYTES
    resident = _largest_share(shape.layers, costs, device) if device.keeps_weights else room
    if resident <= room - RESIDENT_STAGES * stage:
        costs = {phase: cost.with_resident_weights() for phase, cost in costs.items()}
    else:
        resident = 0
    tokens = shape.batch * shape.length
    products = 2 * tokens * hidden * (4 * hidden + 2 * shape.mlp) / device.product_flops
    attention = 4 * tokens * shape.length * hidden / device.attention_flops
    moved = sum(cost.bytes for cost in costs.values()) / device.l2_bytes
    return Plan(
        tiles,
        min(MAX_STAGES, (room - resident) // stage),
        stage,
        key_block(shape, tiles),
        resident,
        1,
        costs,
        shape.layers * sum(cost.seconds + device.wait_seconds for cost in costs.values()),
        shape.layers * max(products + attention, moved, len(costs) * device.wait_seconds),
    )


def _largest_share(layers: int, costs: dict[Phase, PhaseCost], device: Device) -> int:
    """Bytes of weights of all tiles that one block executes in a loop, for the block with the most."""
    numbers = [(cost.tiles, cost.weights) for _ in range(layers) for cost in costs.values()]
    if sum(tiles * weights for tiles, weights in numbers) > device.sms * device.shared_bytes:
        return device.shared_bytes
    weights = [weights for tiles, weights in numbers for _ in range(tiles)]
    return max(sum(weights[block :: device.sms]) for block in range(device.sms))


def stage_bytes(shape: BlockShape, tiles: Tiles) -> int:
    """A stage of the ring holds a step of both operands of a product, or a block of keys or of values."""
    stream, narrow = 4 * STEP * tiles.rows, 2 * STEP * tiles.rows
    weights = 2 * STEP
    return max(
        stream + weights * max(tiles.qkv, tiles.mlp_in),
        narrow + weights * max(tiles.attn_out, tiles.mlp_out),
        2 * tiles.heads * shape.head_dim * max(key_block(shape, tiles), tiles.rows),
    )


def key_block(shape: BlockShape, tiles: Tiles) -> int:
    """Few keys are one small block. Those that a block has too many weigh nothing: the bits are the same."""
    small, large = KEY_BLOCKS
    return small if shape.length <= small and tiles.rows <= small else large


def _stream_cost(shape: BlockShape, device: Device, rows: int, columns: int, width: int) -> PhaseCost:
    """A product whose left operand is the stream, in fp32."""
    return _product_cost(shape, device, rows, columns, width // columns, shape.hidden, 4)


def _attn_out_cost(shape: BlockShape, device: Device, rows: int, columns: int) -> PhaseCost:
    return _product_cost(shape, device, rows, columns, shape.hidden // columns, shape.hidden, 2)


def _mlp_out_seconds(shape: BlockShape, device: Device, rows: int, columns: int, parts: int) -> float:
    costs = _mlp_out_costs(shape, device, rows, columns, parts)
    return sum(cost.seconds + device.wait_seconds for cost in costs.values())


def _mlp_out_costs(
    shape: BlockShape, device: Device, rows: int, columns: int, parts: int
) -> dict[Phase, PhaseCost]:
    """Of the product, and of the sum of its parts, which adds a wait."""
    number, inner = shape.hidden // columns, shape.mlp // parts
    if parts == 1:
        return {Phase.MLP_OUT: _product_cost(shape, device, rows, columns, number, inner, 2)}
    part = 4 * min(rows, shape.length) * columns
    tiles = shape.batch * math.ceil(shape.length / rows) * number
    return {
        Phase.MLP_OUT: _product_cost(shape, device, rows, columns, number * parts, inner, 2, part),
        Phase.MLP_SUM: phase_cost(device, tiles, 0.0, parts * part),
    }


def _product_cost(
    shape: BlockShape,
    device: Device,
    rows: int,
    columns: int,
    number: int,
    inner: int,
    left_bytes: int,
    written: int = 0,
) -> PhaseCost:
    """`number`: tiles beside each other. Rows beyond the sequence cost arithmetic and are not moved."""
    tiles = shape.batch * math.ceil(shape.length / rows) * number
    moved = inner * (left_bytes * min(rows, shape.length) + 2 * columns) + written
    cost = phase_cost(device, tiles, 2 * rows * columns * inner / device.product_flops, moved)
    return cost._replace(weights=2 * columns * inner)


def _attention_cost(shape: BlockShape, device: Device, tiles: Tiles) -> PhaseCost:
    count = shape.batch * math.ceil(shape.length / tiles.rows) * math.ceil(shape.heads / tiles.heads)
    block = key_block(shape, tiles)
    keys = block * math.ceil(shape.length / block)
    width = tiles.heads * shape.head_dim
    return phase_cost(
        device,
        count,
        4 * tiles.rows * keys * width / device.attention_flops,
        2 * width * (tiles.rows + 2 * shape.length),
    )


def phase_cost(device: Device, tiles: int, device_seconds: float, moved: int) -> PhaseCost:
    """`device_seconds`: a tile's arithmetic, were the whole device at work on it."""
    waves = math.ceil(tiles / device.sms)
    rate = min(device.sm_bytes, device.l2_bytes / min(tiles, device.sms))
    return PhaseCost(tiles, waves, waves * device_seconds * device.sms, waves * moved / rate, tiles * moved)
