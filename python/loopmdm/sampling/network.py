"""Runs the planned network on some sequences and draws a token for the rows that were asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loopmdm.exits import ExitCost, ExitRule
from loopmdm.model import LoopMDM, diffusion, vocabulary
from loopmdm.model.modes import evaluating
from loopmdm.model.vocabulary import AnyHead
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm_kernels.types import RowRng, SampledRows


class Denoiser(Protocol):
    """What sampling needs of a model; `LoopMDM` has it. The model is also an `nn.Module`."""

    config: Any  # a LoopMDMConfig, or the fields of it that sampling and the FLOP ledger read

    @property
    def device(self) -> torch.device: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...
    def hidden(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        *,
        num_loops: int | Tensor | None = None,
        exit: ExitRule | None = None,
        min_loops: int = 1,
    ) -> Any: ...
    def head(self, sigma: Tensor | None = None) -> AnyHead: ...


class Draw(NamedTuple):
    """How tokens are drawn from a prediction."""

    temperature: float
    top_p: float
    top_k: int | None
    forbidden: Tensor  # token ids that are never drawn, int64
    seed: int


class Spent(NamedTuple):
    """What one network call spent on each of its b sequences, on the CPU."""

    loops: Tensor  # [b] int64
    exits: ExitCost | None  # of an exit rule


class Prediction(NamedTuple):
    """One network call on b sequences, on the CPU. sampled is None when no row was asked for."""

    sampled: SampledRows | None
    spent: Spent


class Network:
    """The network calls of one run. Heads that depend on nothing but the weights are made once."""

    def __init__(self, model: Denoiser, draw: Draw, *, needs_times: bool) -> None:
        self._model = model
        self._draw = draw
        self.needs_times = needs_times
        self._heads: dict[tuple[int, bool], AnyHead] = {}

    def model_of(self, compute: StepCompute) -> Denoiser:
        chosen: Denoiser = self._model if compute.model is None else compute.model
        return chosen

    def loops_of(self, compute: StepCompute) -> int:
        """Loops of a compute, at most: its own number, or the model's max_loops."""
        return compute.num_loops or int(self.model_of(compute).config.max_loops)

    @torch.inference_mode()
    def predict(
        self,
        tokens: Tensor,
        times: Tensor | None,
        compute: StepCompute,
        num_loops: int | Tensor,
        rows: Tensor,
        names: tuple[Tensor, Tensor, Tensor],
    ) -> Prediction:
        """Run `compute` on tokens [b, L] at times [b] and draw a token for each row of `rows` [R].

        num_loops is of all sequences or of each, int64 [b], in place of the one of `compute`. rows are flat
        indices b*L + l; names are the sequence id, step and position [R] of each row's random numbers. times
        may be None unless the model is conditioned on time.
        """
        hidden, spent, sigma = self.hidden(tokens, times, compute, num_loops)
        if not rows.numel():
            return Prediction(None, spent)
        model = self.model_of(compute)
        sampled = self.sample_rows(
            model, hidden, sigma, rows.to(model.device), [name.to(model.device) for name in names]
        )
        return Prediction(SampledRows(*(field.cpu() for field in sampled)), spent)

    def sample_rows(
        self, model: Denoiser, hidden: Tensor, sigma: Tensor | None, rows: Tensor, names: Sequence[Tensor]
    ) -> SampledRows:
        """A token for each row [R] of the residual stream [b, L, D]; all is on the model's device."""
        return vocabulary.sample_rows(
            hidden,
            self.head(model, sigma),
            rows,
            RowRng(self._draw.seed, *names),
            temperature=self._draw.temperature,
            top_p=self._draw.top_p,
            top_k=self._draw.top_k,
            compute_dtype=model.compute_dtype,
        )

    def hidden(
        self, tokens: Tensor, times: Tensor | None, compute: StepCompute, num_loops: int | Tensor
    ) -> tuple[Tensor, Spent, Tensor | None]:
        """One network call: residual stream [b, L, D], what it spent, sigma [b] or None."""
        model = self.model_of(compute)
        sigma = None
        if model.config.time_conditioning:
            assert times is not None
            sigma = diffusion.sigma(times).float().to(model.device)  # log1p: the same bits in any batch
        tokens = tokens.to(model.device)
        most = num_loops.to(model.device) if isinstance(num_loops, Tensor) else num_loops
        if compute.exit is None:
            hidden = model.hidden(tokens, sigma, num_loops=most)
            loops = num_loops if isinstance(num_loops, Tensor) else torch.full((len(tokens),), num_loops)
            return hidden, Spent(loops, None), sigma
        hidden, used = model.hidden(
            tokens, sigma, num_loops=most, exit=compute.exit, min_loops=compute.min_loops
        )
        loops = used.cpu()
        limits = num_loops if isinstance(num_loops, Tensor) else torch.full_like(loops, num_loops)
        return hidden, Spent(loops, compute.exit.cost(loops, limits, compute.min_loops)), sigma

    def head(self, model: Denoiser, sigma: Tensor | None) -> AnyHead:
        """The model's head, without the forbidden tokens."""
        # Hooks may come and go between two steps.
        key = (id(model), isinstance(model, LoopMDM) and model.head_is_called())
        if key not in self._heads:
            made = model.head(sigma)
            forbidden = self._draw.forbidden
            self._heads[key] = vocabulary.without_tokens(made, forbidden) if forbidden.numel() else made
        head = self._heads[key]
        return head if sigma is None else vocabulary.at_noise(head, model.head(sigma))


def checked_config(model: Any) -> Any:
    """The configuration of a model that can be sampled from; raises TypeError for anything else."""
    config = getattr(model, "config", None)
    missing = [name for name in ("hidden", "head", "device") if not hasattr(model, name)]
    if config is None or missing or not isinstance(model, nn.Module):
        hint = ": load it with LoopMDM.from_pretrained" if isinstance(model, (str, os.PathLike)) else ""
        raise TypeError(f"model must be a LoopMDM, got {type(model).__name__}{hint}")
    return config


def check_models(model: Any, plan: ComputePlan, context: int) -> list[Any]:
    """All models of a run; raises where one of the plan's cannot take the place of `model`."""
    for name, other in plan.models.items():
        for field in ("vocab_size", "mask_token_id"):
            expected, got = getattr(model.config, field), getattr(other.config, field)
            if expected != got:
                raise ValueError(
                    f"the plan's model {name} has {field} {got}, but the sampled model has {expected}"
                )
        if other.config.max_length < context:
            raise ValueError(
                f"the plan's model {name} has max_length {other.config.max_length}, below length {context}"
            )
        if other.device != model.device:
            raise ValueError(
                f"the plan's model {name} is on {other.device}, but the sampled model is on {model.device}"
            )
    for compute in plan.computes:
        most = (model if compute.model is None else compute.model).config.max_loops
        if compute.num_loops is None and compute.min_loops > most:
            raise ValueError(f"the plan {plan} has min_loops {compute.min_loops}, beyond max_loops {most}")
    return [model, *plan.models.values()]


@contextmanager
def sampled(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode and frozen weights inside; see `evaluating`."""
    models = list(models)
    with evaluating(models), ExitStack() as stack:
        for model in models:
            if isinstance(model, LoopMDM):
                stack.enter_context(model.frozen())
        yield
