"""The phases of the looped-blocks kernel one by one: its own code, whose table has the tiles of one phase.

Each layer's tiles wait for those of the layer before, as in a call: work and one hand-over. Or they wait for
nobody, and a block goes from one to the next: work, of which loads hide behind arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from bench.probes.hopper_facts import SMALL, NotLaunched, Run, scaled
from bench.run import Figure, Figures
from loopmdm_kernels.cuda import driver, looped_blocks, tensor_maps
from loopmdm_kernels.cuda.compiler import compile_kernel
from loopmdm_kernels.cuda.launch import set_map
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.cuda.targets import SM90, Target
from loopmdm_kernels.cuda.weights import PackedWeights, packed
from loopmdm_kernels.schedule import BlockShape, Device, Plan, Table, choose
from loopmdm_kernels.schedule.forward import Forward, phases_of
from loopmdm_kernels.schedule.plan import plan_with
from loopmdm_kernels.schedule.table import Counters
from loopmdm_kernels.testing import LoopedInputs, looped_inputs

TOKENS = (128, 1024)
LOOPS = 132  # of a launch: with 128 tokens each of 132 blocks has as many tiles of attention
HEADS_SHAPE = SMALL._replace(length=128)
GROUPS = {"one head": 1, "two heads": 2}  # of a tile of 64 queries, by one group of warps and by two in turn


def table_of(shape: BlockShape, plan: Plan, name: IntEnum, *, waits: bool) -> Table:
    """Tiles of one phase in all layers."""
    (phase,) = (phase for phase in phases_of(plan.tiles) if phase.name == name)
    before = phase.waits_for._replace(phases=(name,), layer=-1) if waits else Counters()
    phase = phase._replace(waits_for=before)
    return Table(shape, plan.tiles, (phase,)).made((phase, layer) for layer in range(shape.layers))


def first_counters(table: Table) -> list[int]:
    """As if a loop before the first had ended."""
    counters = [0] * table.num_counters
    for item in table.loop:
        if item.layer == 0:
            for counter in range(item.wait, item.wait + item.wait_number):
                counters[counter] = table.tiles.blocks * item.wait_count
    return counters


class Prepared(NamedTuple):
    """What a launch of one phase reads and writes."""

    table: Table
    words: torch.Tensor
    buffers: looped_blocks.Buffers
    weights: PackedWeights
    start: torch.Tensor  # of the counters

    @classmethod
    def of(cls, inputs: LoopedInputs, table: Table, loops: int) -> Prepared:
        """All numbers that the phase reads are of the size that a call's have."""
        weights = packed(inputs.blocks)
        given = (inputs.modulation, loops, inputs.rotary, None)
        buffers = looped_blocks.Buffers.allocate(table, inputs.x.float(), weights, *given)
        for name, tensor in buffers._asdict().items():
            if tensor is not None and (name.endswith("_values") or name in ("affine", "gate")):
                tensor.normal_()
        for statistics in (buffers.statistics1, buffers.statistics2):
            statistics.fill_(32.0)[..., 0] = 0.0  # squared deviations and mean of 32 columns
        buffers.stop.fill_(loops)
        start = torch.zeros_like(buffers.counters)
        start[: table.num_counters] = torch.tensor(first_counters(table), dtype=start.dtype)
        return cls(table, table.encode().to(inputs.x.device), buffers, weights, start)

    def parameters(self, target: Target = SM90) -> Any:
        """All but the maps."""
        return looped_blocks.pack_parameters(target, self.table, self.buffers, self.weights, self.words, None)

    def maps(self, plan: Plan) -> dict[str, tensor_maps.Layout]:
        return looped_blocks.map_layouts(self.table.shape, plan, self.buffers, self.weights)


class Launcher:
    """Of one plan's kernel."""

    def __init__(self, run: Run, shape: BlockShape, plan: Plan) -> None:
        self.run, self.shape, self.plan = run, shape, plan
        inputs = looped_inputs(shape.batch, shape.length, shape.hidden, shape.heads, shape.layers)
        self._inputs = inputs.to(torch.bfloat16, device=run.device)
        cubin = compile_kernel(SM90.source, defines(shape, plan), SM90.architecture)
        self._kernel: Any = NotLaunched()
        self._blocks = run.limits.sms
        if not run.dry:
            self._kernel = driver.Kernel(cubin, SM90.entry, plan.shared_bytes)
            if plan.blocks > 1:
                self._blocks = plan.blocks * self._kernel.active_clusters(plan.blocks, SM90.threads)

    @property
    def workers(self) -> int:
        return self._blocks // self.plan.blocks

    def call(self, name: IntEnum, *, waits: bool) -> Callable[[], None]:
        table = table_of(self.shape, self.plan, name, waits=waits)
        prepared = Prepared.of(self._inputs, table, LOOPS)
        parameters, counters = prepared.parameters(), prepared.buffers.counters
        if not self.run.dry:
            for field, layout in prepared.maps(self.plan).items():
                set_map(parameters, field, layout)

        def launch() -> None:
            counters.copy_(prepared.start)
            self._kernel.launch(
                self._blocks, SM90.threads, self.run.stream, parameters, cluster=self.plan.blocks
            )

        return launch


def planned(run: Run, shape: BlockShape) -> Plan:
    """Of this GPU as the op sees it."""
    return choose(shape) if run.dry else looped_blocks._kernel(shape, SM90, 0)[1]


def phases(tokens: int, run: Run) -> Figures:
    """Microseconds of each phase, of a layer: with a hand-over, and of tiles that wait for nobody."""
    shape = SMALL._replace(length=tokens)
    launcher = Launcher(run, shape, planned(run, shape))
    calls = {
        f"{name.name}{'' if waits else ', not waiting'}": launcher.call(name, waits=waits)
        for waits in (True, False)
        for name in launcher.plan.phases
    }
    times = run.seconds(calls)
    return {name: scaled(seconds, 1e6 / LOOPS / shape.layers) for name, seconds in times.items()}


def heads(run: Run) -> Figures:
    """Microseconds of a tile of attention, 64 queries by 128 keys: of one group of warps, of two in turn."""
    few = choose(SMALL._replace(length=32)).tiles
    figures: Figures = {}
    for name, number in GROUPS.items():
        launcher = Launcher(run, HEADS_SHAPE, plan_with(HEADS_SHAPE, Device(), few._replace(heads=number)))
        seconds = run.seconds({name: launcher.call(Forward.ATTENTION, waits=False)})[name]
        tiles = launcher.plan.phases[Forward.ATTENTION].tiles * LOOPS * HEADS_SHAPE.layers
        figures[name] = scaled(seconds, 1e6 * launcher.workers / tiles)
    return figures


def of_model(tokens: int, device: Device) -> dict[str, float]:
    """What `phases` is to find with a hand-over, by the plan that the op takes for such a device."""
    plan = choose(SMALL._replace(length=tokens), device)
    return {name.name: 1e6 * (device.wait_seconds + cost.seconds) for name, cost in plan.phases.items()}


def beside_model(tokens: int, figures: Figures, device: Device) -> dict[str, Figure]:
    """Found and by the model, of the phases that have a figure."""
    return {
        name: {"us": figures[name], "model us": round(us, 2)}
        for name, us in of_model(tokens, device).items()
        if isinstance(figures.get(name), float)
    }
