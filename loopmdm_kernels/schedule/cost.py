"""Picks the tiles of a shape by a model of the GPU's limits: arithmetic, L2 traffic, waiting.

A phase is `waves` rounds of equal tiles. A tile takes the longer of its arithmetic, at the SM's share of the
device's rate, and of its operands' way from L2, at the rate that the SMs at work leave each other. Between
phases lies one wait for counters. The rates are assumptions until they are measured on the device; a plan
is a ranking of tiles first and a time second.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from loopmdm_kernels.schedule.table import BlockShape, Phase, Tiles

STEP = 64  # of the inner dimension, per stage of the ring: 128 bytes of bf16, one swizzle row
KEY_BLOCK = 128  # keys that one step of the attention meets
FIXED_BYTES = 2_048  # barriers and instructions, and the ring's alignment
MAX_STAGES = 8
ENOUGH_STAGES = 3  # with two a load has only one step of arithmetic to hide behind
ROW_TILES = (64, 128)
COLUMN_TILES = (64, 128)  # sums of 192 columns beside the other phases do not fit the registers


class Device(NamedTuple):
    """What a GPU can do, per second and byte. Defaults: H200, as assumed in docs/kernels.md."""

    sms: int = 132
    product_flops: float = 700e12
    attention_flops: float = 450e12
    l2_bytes: float = 5.5e12
    sm_bytes: float = 0.11e12  # one SM alone: 64 bytes a cycle
    wait_seconds: float = 1e-6  # from the last signal of a phase to the first load of the next
    shared_bytes: int = 232_448  # what a block may use


# By compute capability: A100, RTX 3090, RTX 4090, H200. Peak rates times what their like reach elsewhere;
# nothing here is measured.
ASSUMED = {
    (8, 0): Device(108, 200e12, 150e12, 4.0e12, 0.09e12, shared_bytes=166_912),
    (8, 6): Device(82, 50e12, 40e12, 2.0e12, 0.10e12, shared_bytes=101_376),
    (8, 9): Device(128, 120e12, 90e12, 4.5e12, 0.15e12, shared_bytes=101_376),
    (9, 0): Device(),
}


def device_of(capability: tuple[int, int], sms: int, shared_bytes: int) -> Device:
    """What is assumed of a GPU: the rates of the nearest one not younger, in proportion to its SMs."""
    assumed = ASSUMED[max(known for known in ASSUMED if known <= capability)]
    share = sms / assumed.sms
    return assumed._replace(
        shared_bytes=shared_bytes,
        sms=sms,
        product_flops=assumed.product_flops * share,
        attention_flops=assumed.attention_flops * share,
        l2_bytes=assumed.l2_bytes * share,
    )


class PhaseCost(NamedTuple):
    tiles: int
    waves: int
    arithmetic: float  # seconds, of all waves
    traffic: float
    bytes: float  # moved from L2 by all tiles

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.traffic)


class Plan(NamedTuple):
    tiles: Tiles
    stages: int
    stage_bytes: int
    phases: dict[Phase, PhaseCost]  # of one layer
    loop_seconds: float
    limit_seconds: float  # the longest of arithmetic and traffic with all SMs busy, and of the waits alone

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + FIXED_BYTES


def choose(shape: BlockShape, device: Device = Device()) -> Plan:  # noqa: B008 - immutable
    """The fastest plan by the model.

    Raises:
        ValueError: the tiles divide a width in no way.
    """
    plans = [
        _plan(shape, device, tiles) for rows in ROW_TILES for tiles in _fastest_tiles(shape, device, rows)
    ]
    if not plans:
        raise ValueError(
            f"no tiles of {ROW_TILES} rows by {COLUMN_TILES} columns divide the widths of {shape}; "
            "with 64 rows a tile is two halves, and a tile of q, k and v holds whole heads"
        )
    plan = min(plans, key=lambda plan: (plan.stages < ENOUGH_STAGES, plan.stages < 2, plan.loop_seconds))
    if plan.stages < 2:
        raise ValueError(
            f"two stages of {plan.stage_bytes} bytes do not fit the {device.shared_bytes} bytes of shared "
            f"memory that a block has here, for {shape}"
        )
    return plan


def _fastest_tiles(shape: BlockShape, device: Device, rows: int) -> list[Tiles]:
    """The fastest columns of each product, which do not depend on each other; none if nothing fits."""
    halves = max(ROW_TILES) // rows  # with 64 rows the two groups of warps share the columns
    fastest = []
    for width, inner, multiple, left_bytes in (
        (3 * shape.hidden, shape.hidden, shape.head_dim, 4),
        (shape.hidden, shape.hidden, 32, 2),
        (shape.mlp, shape.hidden, 32, 4),
        (shape.hidden, shape.mlp, 32, 2),
    ):
        fitting = [n for n in COLUMN_TILES if width % n == 0 and n % (halves * multiple) == 0]
        if not fitting:
            return []
        costs = [_product_cost(shape, device, rows, n, width, inner, left_bytes).seconds for n in fitting]
        fastest.append(fitting[costs.index(min(costs))])
    qkv, attn_out, mlp_in, mlp_out = fastest
    return [Tiles(rows, qkv, attn_out, mlp_in, mlp_out, halves)]


def _plan(shape: BlockShape, device: Device, tiles: Tiles) -> Plan:
    hidden, rows = shape.hidden, tiles.rows
    costs = {
        Phase.QKV: _product_cost(shape, device, rows, tiles.qkv, 3 * hidden, hidden, 4),
        Phase.ATTENTION: _attention_cost(shape, device, tiles),
        Phase.ATTN_OUT: _product_cost(shape, device, rows, tiles.attn_out, hidden, hidden, 2),
        Phase.MLP_IN: _product_cost(shape, device, rows, tiles.mlp_in, shape.mlp, hidden, 4),
        Phase.MLP_OUT: _product_cost(shape, device, rows, tiles.mlp_out, hidden, shape.mlp, 2),
    }
    stage = stage_bytes(shape, tiles)
    tokens = shape.batch * shape.length
    products = 2 * tokens * hidden * (4 * hidden + 2 * shape.mlp) / device.product_flops
    attention = 4 * tokens * shape.length * hidden / device.attention_flops
    moved = sum(cost.bytes for cost in costs.values()) / device.l2_bytes
    return Plan(
        tiles,
        min(MAX_STAGES, (device.shared_bytes - FIXED_BYTES) // stage),
        stage,
        costs,
        shape.layers * sum(cost.seconds + device.wait_seconds for cost in costs.values()),
        shape.layers * max(products + attention, moved, len(costs) * device.wait_seconds),
    )


def stage_bytes(shape: BlockShape, tiles: Tiles) -> int:
    """A stage of the ring holds a step of both operands of a product, or a block of keys or of values."""
    stream, narrow = 4 * STEP * tiles.rows, 2 * STEP * tiles.rows
    weights = 2 * STEP
    return max(
        stream + weights * max(tiles.qkv, tiles.mlp_in),
        narrow + weights * max(tiles.attn_out, tiles.mlp_out),
        2 * tiles.heads * shape.head_dim * max(KEY_BLOCK, tiles.rows),
    )


def _product_cost(
    shape: BlockShape, device: Device, rows: int, columns: int, width: int, inner: int, left_bytes: int
) -> PhaseCost:
    tiles = shape.batch * math.ceil(shape.length / rows) * (width // columns)
    moved = inner * (left_bytes * rows + 2 * columns)
    return _phase(device, tiles, 2 * rows * columns * inner / device.product_flops, moved)


def _attention_cost(shape: BlockShape, device: Device, tiles: Tiles) -> PhaseCost:
    count = shape.batch * math.ceil(shape.length / tiles.rows) * math.ceil(shape.heads / tiles.heads)
    keys = KEY_BLOCK * math.ceil(shape.length / KEY_BLOCK)
    width = tiles.heads * shape.head_dim
    return _phase(
        device,
        count,
        4 * tiles.rows * keys * width / device.attention_flops,
        2 * width * (tiles.rows + 2 * shape.length),
    )


def _phase(device: Device, tiles: int, device_seconds: float, moved: int) -> PhaseCost:
    """`device_seconds`: a tile's arithmetic, were the whole device at work on it."""
    waves = math.ceil(tiles / device.sms)
    rate = min(device.sm_bytes, device.l2_bytes / min(tiles, device.sms))
    return PhaseCost(tiles, waves, waves * device_seconds * device.sms, waves * moved / rate, tiles * moved)
