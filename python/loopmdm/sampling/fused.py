"""The ordered run with whole steps in compiled code, where nobody has to be asked in between.

What `OrderedRun` does between two network calls takes longer than a call of a small model. The compiled steps
make the same network calls, draw with the same numbers and reveal the same slots.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor

from loopmdm.exits import HiddenChange
from loopmdm.model import LoopMDM
from loopmdm.model.cut import why_watched
from loopmdm.model.modules import TokenEmbedding
from loopmdm.model.vocabulary import CalledHead
from loopmdm.plan import StepCompute
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.network import Network
from loopmdm.sampling.ordered import OrderedRun
from loopmdm.sampling.orders import Order
from loopmdm.sampling.result import StepEvent
from loopmdm.sampling.run import check_finite
from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.cpu.decoding import Computes, NetworkParts, Reveals, Slots, State, Steps
from loopmdm_kernels.tracing import traced, transformed
from loopmdm_kernels.types import RevealRule, RowRng

_SLICE = 50.0  # milliseconds after which signals and the progress bar have their turn
# What a step asks of a model. The compiled steps do not ask, so that it must be LoopMDM's own.
_ASKED = ("hidden", "stages", "head", "condition", "block_weights", "compute_dtype")


class FusedRun(OrderedRun):
    """An `OrderedRun` that takes its steps in compiled code where these options and this model allow it."""

    def __init__(self, canvas: Canvas, order: Order, network: Network, decoding: Decoding) -> None:
        super().__init__(canvas, order, network, decoding)
        self._rule = order.rule if _can_fuse(canvas, order, network, decoding) else None
        self._steps: Steps | None = None

    def advance(self, first: int, most: int, watched: bool) -> tuple[int, list[StepEvent]]:
        # Hooks may come and go between two steps.
        if self._rule is None or not _is_plain(self.network.models[0]):
            return super().advance(first, most, watched)
        if self._steps is None:
            self._steps = self._prepare(self._rule, watched)
            if self._steps is None:
                self._rule = None
                return super().advance(first, most, watched)
        taken = self._steps.take(first, most, _SLICE)
        config, slots = self.network.config, self.slots
        self.ledger.record_calls(
            config, taken.calls, taken.sequences, taken.loops, taken.rows, length=self.tokens.shape[1]
        )
        if taken.not_finite >= 0:
            slot = slice(taken.not_finite, taken.not_finite + 1)
            last = first + taken.steps - 1
            check_finite(torch.tensor([math.nan]), last, slots.sequence[slot], slots.position[slot])
        return taken.steps, self._events(taken.reveals) if watched else []

    @torch.inference_mode()
    def _prepare(self, rule: RevealRule, watched: bool) -> Steps | None:
        """The compiled steps; None where other kernels than theirs would be used.

        Where nobody watches, and the order rates no prediction, tokens are drawn without their statistics.
        """
        model, decoding, slots = self.network.models[0], self.decoding, self.slots
        head = self.network.head(model, None)
        assert not isinstance(head, CalledHead)
        none = torch.empty(0, dtype=torch.int64)
        draw = Draw(
            RowRng(decoding.seed, none, none, none),
            cast(float, decoding.temperature),
            cast(float, decoding.top_p),
            cast("int | None", decoding.top_k),
            statistics=watched or rule.schedule is None or rule.rating not in ("none", "place"),
        )
        network = NetworkParts(
            model.vocab_embed.embedding,
            model.position_embed.embedding if model.config.positions == "learned" else None,
            model.stages(self.tokens[:1]).calls(),
            SampleCall(torch.empty(1, 1, model.config.hidden_size), head, model.compute_dtype, none, draw),
        )
        if network.why_not() is not None:
            return None
        return Steps(
            network,
            Slots(slots.sequence, slots.position, slots.sequence_id, slots.blocks.of_slot),
            rule,
            self._computes(),
            State(self.tokens, slots.masked, self.network_calls, self.loops),
            self.network.max_batch,
        )

    def _computes(self) -> Computes:
        """Of each step."""
        steps = self.num_steps
        parts = [
            (part.compute, steps if part.steps is None else part.steps) for part in self.decoding.plan.parts
        ]
        counts = torch.tensor([count for _, count in parts])

        def of_steps(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).repeat_interleave(counts)[:steps].contiguous()

        return Computes(
            of_steps([self.network.loops_of(compute) for compute, _ in parts], torch.int64),
            of_steps([compute.min_loops for compute, _ in parts], torch.int64),
            of_steps([_threshold(compute) for compute, _ in parts], torch.float64),
        )

    def _events(self, reveals: Reveals) -> list[StepEvent]:
        """One for each step that revealed something."""
        events, first = [], 0
        for step, revealed in groupby(reveals.step.tolist()):
            last = first + len(list(revealed))
            slot, _, loops, log_prob = reveals.part(first, last)
            sequence, position = self.slots.sequence[slot], self.slots.position[slot]
            tokens = self.tokens[sequence, position]
            events.append(StepEvent(step, sequence, position, tokens, log_prob.exp(), loops.clone()))
            first = last
        return events


def _threshold(compute: StepCompute) -> float:
    """Of the op; below 0: none."""
    threshold = None if compute.exit is None else compute.exit.threshold
    return -1.0 if threshold is None else threshold


def _can_fuse(canvas: Canvas, order: Order, network: Network, decoding: Decoding) -> bool:
    """Whether the options leave nothing to be asked between two steps."""
    plan, width = decoding.plan, canvas.tokens.shape[1]
    placed = plan.reading == "step" and (plan.num_steps is None or not order.timed)
    return (
        type(network) is Network
        and len(network.models) == 1
        and not network.needs_times
        and placed
        and order.rule is not None
        and decoding.eos_token_id is None
        and decoding.skip_unchanged
        and width <= network.context
        and bool((canvas.lengths == width).all())
        and all(_is_op(compute, network.loops_of(compute)) for compute in plan.computes)
    )


def _is_op(compute: StepCompute, most: int) -> bool:
    """Whether the loops of a step are one call of the op, or two."""
    rule = compute.exit
    return rule is None or (
        type(rule) is HiddenChange and rule.threshold is not None and compute.min_loops <= most
    )


def _is_plain(model: object) -> bool:
    """Whether no part of the model is watched or replaced, and nothing in PyTorch has to see its ops."""
    if not isinstance(model, LoopMDM) or model.device.type != "cpu" or traced() or transformed():
        return False
    if any(getattr(type(model), name) is not getattr(LoopMDM, name) for name in _ASKED):
        return False
    if not model.__dict__.keys().isdisjoint(_ASKED) or model.cuts() or model.config.acts_between_loops:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    embeddings = [model.vocab_embed, *([model.position_embed] if model.config.positions == "learned" else [])]
    return all(type(module) is TokenEmbedding and why_watched(module) is None for module in embeddings)
