"""One optimizer step of one rank: passes over its micro-batches, clipping, the update, the average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.model import flops
from loopmdm.model.loop_law import LoopLaw
from loopmdm.model.seeds import derive_seed
from loopmdm.train.batches import Prefetcher
from loopmdm.train.config import TrainConfig
from loopmdm.train.ema import EMA
from loopmdm.train.optimizers import Optimizer
from loopmdm.train.parallel import Layout, Ranks, full

_CLIP_EPS = 1e-6  # what torch adds to the norm that it divides by


def leaves_out(config: TrainConfig, model: Any) -> bool:
    """Whether parameters of a model of this configuration get no gradient at some S."""
    return config.backprop_loops > 0 or getattr(model, "learns_between_loops", False)


def clip(parameters: Sequence[Tensor], limit: float | None, wait: bool) -> Tensor:
    """Scale the gradients down to the largest norm, if they are beyond it; returns the norm before.

    wait: where the norm can be waited for, gradients within it are not touched.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = full(nn.utils.get_total_norm(gradients))
    if limit is not None and not (wait and float(norm) + _CLIP_EPS <= limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


class MicroBatch(NamedTuple):
    """What a loss was computed from."""

    batch: Batch
    num_loops: int
    seed: int


Check: TypeAlias = Callable[[int, float, float, list[MicroBatch]], None]


class Figures(NamedTuple):
    """What a step tells, summed over the ranks."""

    loss_sum: float  # of the micro-batches
    nll_sum: float
    tokens: float
    requests: list[float]
    grad_norm: float


@dataclass
class Step:
    """A step whose figures may still be on their way from the device."""

    number: int  # counted from 1
    record: dict[str, Any]
    micro_batches: list[MicroBatch]  # of this rank
    _values: Tensor  # float64
    _arrived: torch.cuda.Event | None

    def figures(self) -> Figures:
        """The figures, waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, nll_sum, tokens, *requests, grad_norm = self._values.tolist()
        return Figures(loss_sum, nll_sum, tokens, requests, grad_norm)


@dataclass
class Stepper:
    """Takes optimizer steps; what is random in one follows from (seed, step, number of the micro-batch)."""

    ranks: Ranks
    layout: Layout
    batches: Prefetcher
    law: LoopLaw
    config: TrainConfig
    dims: Any  # configuration of the model, for the ledger of FLOPs
    optimizer: Optimizer
    ema: EMA
    device: torch.device

    def take(self, step: int, requests: Sequence[bool], check: Check | None) -> Step:
        """Step `step`, counted from 0; its figures are not waited for.

        Args:
            requests: of this rank, added up over all.
            check: called with (number, loss, gradient norm, micro-batches) before the weights move; None:
                they are not waited for.
        """
        config, layout, device = self.config, self.layout, self.device
        num_loops = self.law.sample(config.seed, step)
        learning_rate = config.learning_rate_at(step)
        figures = torch.zeros(3 + len(requests), dtype=torch.float64, device=device)
        work, used = 0.0, []
        for index in range(layout.own):
            batch = self.batches.get(step, index)
            seed = derive_seed(config.seed, 0, step, layout.number(index))
            used.append(MicroBatch(batch, num_loops, seed))
            with self.ranks.micro_batch(last=index == layout.own - 1):
                loss, nll_sum, num_tokens = self.ranks.loss(*used[-1])
                (loss / layout.own).backward()  # type: ignore[no-untyped-call]
            figures[:3] += torch.stack([v.detach().double() for v in (loss, nll_sum, num_tokens)])
            batch_size, length = batch.input_ids.shape
            work += layout.world_size * batch_size * self._work(length, num_loops)
        figures[3:] = torch.tensor([float(one) for one in requests], dtype=torch.float64)
        if leaves_out(config, self.dims):
            # Otherwise Adam would count other steps for these than for the rest.
            for parameter in self.ema.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.ranks.add_up(figures)
        norm = clip(self.ema.parameters, config.clip, wait=check is not None)
        figures = torch.cat([figures, norm.double()[None]])
        if check is not None:
            loss_sum, grad_norm = figures[[0, -1]].tolist()
            check(step + 1, loss_sum, grad_norm, used)
        self.optimizer.step(learning_rate)
        self.ema.update()
        figures = figures.to("cpu", non_blocking=True)
        arrived = None
        if device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(device))
        record = {"num_loops": num_loops, "lr": learning_rate, "work": work}
        return Step(step + 1, record, used, figures, arrived)

    def _work(self, length: int, num_loops: int) -> float:
        """Training FLOPs of a sequence; a backward pass is twice a forward pass."""
        whole = flops.training_flops(self.dims, length, num_loops)
        if self.config.loop_loss != "last":
            return whole + (num_loops - 1) * flops.TRAINING_FACTOR * flops.readout_flops(self.dims, length)
        kept = self.config.backprop_loops
        if not kept or num_loops <= kept:
            return whole
        return whole / 3 + 2 / 3 * flops.training_flops(self.dims, length, kept)
