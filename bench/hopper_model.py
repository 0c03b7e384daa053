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

from bench.script import arguments
from loopmdm_kernels.cuda import looped_blocks, weights
from loopmdm_kernels.schedule import BlockShape, Device, Plan, choose, choose_backward, plan
from loopmdm_kernels.schedule.device import RANGES
from loopmdm_kernels.testing import looped_inputs

Microseconds = Callable[[Device], float]
SMALL = BlockShape(1, 1024, 768, 12, 3072, 2)
SUDOKU = BlockShape(1, 81, 128, 4, 512, 2)
SUDOKU_CALLS, SUDOKU_LOOPS = 3, 12  # a block before the loop, two in it, one behind


class Case(NamedTuple):
    name: str
    microseconds: Microseconds
    at_most: int | None = None  # what it is to reach


def forward(shape: BlockShape) -> Microseconds:
    """One loop."""
    chosen = choose(shape)
    return lambda device: 1e6 * under(shape, chosen, device).loop_seconds


def under(shape: BlockShape, chosen: Plan, device: Device) -> Plan:
    """The same plan on a device of other rates."""
    return plan._plan(shape, device.as_cluster() if chosen.cluster > 1 else device, chosen.tiles)


def backward(shape: BlockShape) -> Microseconds:
    columns = choose_backward(shape).tiles.columns
    return lambda device: 1e6 * plan._backward_plan(shape, device, columns).loop_seconds


def sudoku_call() -> Microseconds:
    """All loops of the 9x9 model, with the two layers around them and what else is in the graph."""
    loop, nodes = forward(SUDOKU), nodes_of_a_call()
    return lambda device: (SUDOKU_LOOPS + 1) * loop(device) + 1e6 * SUDOKU_CALLS * nodes * device.node_seconds


class _Counted(TorchDispatchMode):
    """Operations that are a node of a graph: those that neither only reserve memory nor only look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func._schema.returns[0].alias_info
        self.nodes += "empty" not in func.__name__ and (result is None or result.is_write)
        return func(*args, **(kwargs or {}))


def nodes_of_a_call() -> int:
    """Around the kernel, when weights are packed and the table is there: with the comparison of weights."""
    inputs = looped_inputs(1, 81, 128, 4, num_blocks=1, rotary=False).to(torch.bfloat16)
    shape = looped_blocks.shape_of(inputs.x, inputs.blocks, 4)
    tiles = choose(shape).tiles
    table, _, counters = looped_blocks._table(shape, tiles, False, torch.device("cpu"), SUDOKU_LOOPS)
    packed = weights.packed(inputs.blocks)
    given = (inputs.x.float(), packed, inputs.modulation, SUDOKU_LOOPS, inputs.rotary, None, counters)
    with _Counted() as counted:
        looped_blocks.Buffers.allocate(table, *given)
    return counted.nodes + 1


def cases() -> list[Case]:
    return [
        *(
            Case(f"{length} tokens", forward(SMALL._replace(length=length)), at_most)
            for length, at_most in ((32, None), (128, 30), (256, None), (512, 70), (1024, 110), (4096, 480))
        ),
        Case("16 x 1024 tokens", forward(SMALL._replace(batch=16))),
        Case("backward, 8 x 1024", backward(SMALL._replace(batch=8)), 2000),
        Case("Sudoku call, 12 loops", sudoku_call(), 120),
    ]


NAMES = {
    "wait_seconds": ("hand-over", 1e-6, "us"),
    "cluster_wait_seconds": ("in a cluster", 1e-6, "us"),
    "l2_bytes": ("L2", 1e12, "TB/s"),
    "sm_bytes": ("one SM", 1e12, "TB/s"),
    "product_flops": ("products", 1e12, "TFLOP/s"),
    "attention_flops": ("attention", 1e12, "TFLOP/s"),
    "multicast_cost": ("a byte for a pair", 1, "bytes"),
    "node_seconds": ("graph node", 1e-6, "us"),
}


def rows() -> Iterator[list[str]]:
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


def table() -> str:
    head, *lines = rows()
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)) + "\n"


if __name__ == "__main__":
    arguments(__doc__)
    print(table())
