"""What the cost model says of the Hopper kernels, and how far each of its assumptions moves it.

    python -m bench.hopper_model    the tables, as docs/kernels/looped_blocks.md has them

Nothing here is measured. Plans are those of the assumed rates, whatever the rates then turn out to be; what a
GPU has shown is put in their place by `python -m bench.gpu_hopper`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.draw_schedule import simulate
from bench.probes.hopper_facts import SMALL, SUDOKU
from bench.script import arguments
from loopmdm_kernels.cuda import looped_blocks, looped_rows, prepare, weights
from loopmdm_kernels.schedule import (
    BlockShape,
    Device,
    Plan,
    build_backward,
    choose,
    choose_backward,
    choose_rows,
    plan,
    rows,
)
from loopmdm_kernels.schedule.cost import sides
from loopmdm_kernels.testing import looped_inputs

# Between what and what the assumptions of the H200 may lie. A wait is fence, meeting and signal (0.5 us),
# a poll that sees it (0.3) and the way of the first box from L2 (0.6 to 0.8).
RANGES = {
    "wait_seconds": (1.0e-6, 2.0e-6),
    "ahead_share": (0.5, 1.3),  # from the first box of rows on; since the tile before was multiplied
    "load_seconds": (0.3e-6, 0.9e-6),  # as plain loads of few bytes; as a box behind a poll
    "head_alone": (1.2, 2.0),  # 1: turns gain nothing; 2: two heads take no longer than one
    "cluster_wait_seconds": (0.7e-6, 1.4e-6),
    "shared_read_bytes": (0.12e12, 0.22e12),
    "meet_seconds": (0.06e-6, 0.2e-6),
    "l2_bytes": (4.0e12, 7.0e12),
    "sm_bytes": (0.08e12, 0.13e12),
    "product_flops": (600e12, 800e12),
    "attention_flops": (350e12, 550e12),
    "multicast_cost": (1.0, 2.0),
    "node_seconds": (1.0e-6, 2.0e-6),
}
Microseconds = Callable[[Device], float]
NARROW = {
    "Sudoku": SUDOKU,
    "4 Sudokus": SUDOKU._replace(batch=4),
    "8 Sudokus": SUDOKU._replace(batch=8),
    "6x6 Sudoku": BlockShape(1, 36, 64, 4, 256, 2),
}
SUDOKU_CALLS, SUDOKU_LOOPS = 3, 12  # a block before the loop, two in it, one behind


class Case(NamedTuple):
    name: str
    microseconds: Microseconds
    at_most: int | None = None  # what it is to reach


def forward(shape: BlockShape) -> Microseconds:
    """One loop."""
    found, chosen = choose_rows(shape), choose(shape)
    return by_tiles(shape, chosen) if found is None else by_rows(shape, found)


def by_rows(shape: BlockShape, found: rows.RowsPlan) -> Microseconds:
    """One loop of the kernel for narrow blocks."""

    def seconds(device: Device) -> float:
        planned = rows.rows_plan(plan.tiled_batch(shape), device, found.mlp_out_parts)
        assert planned is not None
        return planned.loop_seconds

    return lambda device: 1e6 * seconds(device)


def by_tiles(shape: BlockShape, chosen: Plan) -> Microseconds:
    return lambda device: 1e6 * under(shape, chosen, device).loop_seconds


def under(shape: BlockShape, chosen: Plan, device: Device) -> Plan:
    """The same plan on a device of other rates."""
    return plan.plan_with(shape, device, chosen.tiles)


def backward(shape: BlockShape) -> Microseconds:
    tiles = choose_backward(shape).tiles
    return lambda device: 1e6 * plan._backward_plan(shape, device, tiles).loop_seconds


def backward_by_tiles(shape: BlockShape) -> Microseconds:
    """The step behind the first, tile by tile in the order of the table: phases that do not wait overlap."""
    tiles = choose_backward(shape).tiles
    table = build_backward(shape, tiles)

    def seconds(device: Device) -> float:
        chosen = plan._backward_plan(shape, device, tiles)
        done = simulate(table, chosen, device.clusters(chosen.blocks), device, loops=2)
        first, both = (max(tile.end for tile in done[: n * len(table.loop)]) for n in (1, 2))
        return both - first

    return lambda device: 1e6 * seconds(device)


def sudoku_call() -> Microseconds:
    """All loops of the 9x9 model, with the two layers around them and what else is in the graph."""
    loop, nodes = forward(SUDOKU), nodes_of_a_call()
    return lambda device: (SUDOKU_LOOPS + 1) * loop(device) + 1e6 * SUDOKU_CALLS * nodes * device.node_seconds


class CountedNodes(TorchDispatchMode):
    """Operations that are a node of a graph: those that neither only reserve memory nor only look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func._schema.returns[0].alias_info
        self.nodes += "empty" not in func.__name__ and (result is None or result.is_write)
        return func(*args, **(kwargs or {}))


def nodes_of_a_call() -> int:
    """Around the kernel, when weights are packed: with prepare_call."""
    inputs = looped_inputs(1, 81, 128, 4, num_blocks=1, rotary=False).to(torch.bfloat16)
    found = choose_rows(looped_blocks.shape_of(inputs.x, inputs.blocks, 4))
    assert found is not None
    packed = weights.packed(inputs.blocks)
    given = (inputs.x.float(), packed, inputs.modulation, SUDOKU_LOOPS, inputs.rotary, None)
    with CountedNodes() as counted:
        prepare.modulation_for_kernel(inputs.modulation)
        looped_rows.Buffers.allocate(found, *given)
    return counted.nodes + 1


def cases() -> list[Case]:
    return [
        *(
            Case(f"{length} tokens", forward(SMALL._replace(length=length)), at_most)
            for length, at_most in (
                (32, None),
                (128, 30),
                (256, None),
                (384, None),
                (512, 70),
                (1024, 110),
                (4096, 480),
            )
        ),
        Case("16 x 1024 tokens", forward(SMALL._replace(batch=16))),
        Case("backward, 8 x 1024", backward(SMALL._replace(batch=8)), 2000),
        Case("backward, tile by tile", backward_by_tiles(SMALL._replace(batch=8)), 2000),
        Case("Sudoku call, 12 loops", sudoku_call(), 120),
    ]


NAMES = {
    "wait_seconds": ("hand-over", 1e-6, "us"),
    "ahead_share": ("weights meanwhile", 1, "of it"),
    "load_seconds": ("a load waited for", 1e-6, "us"),
    "head_alone": ("a head alone", 1, "halves of two"),
    "cluster_wait_seconds": ("in a cluster", 1e-6, "us"),
    "shared_read_bytes": ("shared memory", 1e12, "TB/s"),
    "meet_seconds": ("step of a block", 1e-6, "us"),
    "l2_bytes": ("L2", 1e12, "TB/s"),
    "sm_bytes": ("one SM", 1e12, "TB/s"),
    "product_flops": ("products", 1e12, "TFLOP/s"),
    "attention_flops": ("attention", 1e12, "TFLOP/s"),
    "multicast_cost": ("a byte for two blocks", 1, "bytes"),
    "node_seconds": ("graph node", 1e-6, "us"),
}


def case_rows() -> Iterator[list[str]]:
    assumed = Device()
    yield [
        "us", "assumed", "to reach",
        *(f"{NAMES[field][0]} {low / NAMES[field][1]:g} to {high / NAMES[field][1]:g} {NAMES[field][2]}"
          for field, (low, high) in RANGES.items()),
        "all at their best, worst",
    ]  # fmt: skip
    for case in cases():
        ends = {
            field: [case.microseconds(assumed._replace(**{field: value})) for value in span]
            for field, span in RANGES.items()
        }
        extreme = []
        for best in (True, False):
            device = assumed._replace(
                **{
                    field: RANGES[field][(a <= b) != best] if a != b else getattr(assumed, field)
                    for field, (a, b) in ends.items()
                }
            )
            extreme.append(case.microseconds(device))
        yield [
            case.name, f"{case.microseconds(assumed):.0f}", f"{case.at_most or ''}",
            *("-" if f"{a:.0f}" == f"{b:.0f}" else f"{a:.0f} to {b:.0f}" for a, b in ends.values()),
            f"{extreme[0]:.0f}, {extreme[1]:.0f}",
        ]  # fmt: skip


def _chosen(shape: BlockShape, **without: Any) -> Microseconds:
    """One loop by the plan that is chosen for each device, of which some things are not made use of."""
    return lambda device: 1e6 * choose(shape, device._replace(**without)).loop_seconds


def _whole(shape: BlockShape) -> Microseconds:
    """One loop, MLP_OUT not in parts."""
    return lambda device: 1e6 * choose(shape, device, parts=1).loop_seconds


def _instead(shape: BlockShape, **fields: int) -> Microseconds:
    """One loop by the plan that is chosen, with other tiles; `qkv` and `heads` are those of a block."""

    def seconds(device: Device) -> float:
        tiles = choose(shape, device).tiles
        of_tile = {
            name: number * (sides(tiles) if name in ("qkv", "heads") else 1)
            for name, number in fields.items()
        }
        return plan.plan_with(shape, device, tiles._replace(**of_tile)).loop_seconds

    return lambda device: 1e6 * seconds(device)


def mechanism_rows() -> Iterator[list[str]]:
    """What each mechanism of the kernels is there for: the same loop without it."""
    yield ["us a loop", "with", "without", "saves, over all ranges"]
    assumed = Device()
    devices = [assumed._replace(**{field: end}) for field, span in RANGES.items() for end in span]
    few, short, some, more, half = (SMALL._replace(length=length) for length in (32, 128, 256, 384, 512))
    many, batch, sums = SMALL, SMALL._replace(batch=16), some._replace(batch=16)
    for name, with_it, without in (
        ("weights before the rows, 32 tokens", _chosen(few), _chosen(few, ahead_share=0.0)),
        ("weights before the rows, 1024 tokens", _chosen(many), _chosen(many, ahead_share=0.0)),
        ("parts of MLP_OUT, 32 tokens", _chosen(few), _whole(few)),
        ("parts of MLP_OUT, 256 tokens", _chosen(some), _whole(some)),
        ("parts of MLP_OUT, 1024 tokens", _chosen(many), _whole(many)),
        ("one tile for all parts, 16 x 256 tokens", _chosen(sums), _instead(sums, sum_rows=32)),
        ("parts, 512 x 256 tokens", _chosen(some._replace(batch=512)), _whole(some._replace(batch=512))),
        ("one head a tile of q, k and v, 128 tokens", _chosen(short), _instead(short, qkv=128)),
        ("one head a tile of attention, 128 tokens", _chosen(short), _instead(short, heads=2)),
        ("one head a tile of attention, 512 tokens", _chosen(half), _instead(half, heads=2)),
        (
            "wide tiles, rows normalised once, pairs: 1024 tokens",
            _chosen(many),
            _chosen(many, has_wide_tiles=False),
        ),
        ("fours, 128 tokens", _chosen(short), _chosen(short, cluster=2)),
        ("fours, 256 tokens", _chosen(some), _chosen(some, cluster=2)),
        ("fours, 384 tokens", _chosen(more), _chosen(more, cluster=2)),
        ("pairs, 512 tokens", _chosen(half), _chosen(half, cluster=1)),
        ("pairs, 1024 tokens", _chosen(many), _chosen(many, cluster=1)),
        ("pairs, 16 x 1024 tokens", _chosen(batch), _chosen(batch, cluster=1)),
        *(
            (f"eight tokens a block, {name}", forward(shape), _chosen(shape))
            for name, shape in NARROW.items()
        ),
    ):
        times = [(with_it(device), without(device)) for device in (assumed, *devices)]
        saved = [1 - there / not_there for there, not_there in times]
        yield [
            name,
            *(f"{time:.1f}" if time < 100 else f"{time:.0f}" for time in times[0]),
            f"{round(100 * min(saved))} to {round(100 * max(saved))} %",
        ]


def table(rows: Iterator[list[str]]) -> str:
    head, *lines = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)) + "\n"


if __name__ == "__main__":
    arguments(__doc__)
    print(table(case_rows()))
    print(table(mechanism_rows()))
