"""Runs the planned network on some sequences and draws a token for the rows that were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import loopmdm_kernels as lk
from loopmdm import diffusion
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm_kernels.types import Head, RowRng, SampledRows


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
        exit_threshold: float | None = None,
    ) -> Any: ...
    def head(self, sigma: Tensor | None = None) -> Head: ...


NEVER = -1e30  # logit of a forbidden token: finite, so that no difference of two is NaN


class Draw(NamedTuple):
    """How tokens are drawn from a prediction."""

    temperature: float
    top_p: float
    top_k: int | None
    forbidden: Tensor  # token ids that are never drawn, int64
    seed: int


class Prediction(NamedTuple):
    """One network call on b sequences, on the CPU. sampled is None when no row was asked for."""

    sampled: SampledRows | None
    loops: Tensor  # [b] int64


class Network:
    """The network calls of one run. Heads that depend on nothing but the weights are made once."""

    def __init__(self, model: Denoiser, draw: Draw, *, needs_times: bool) -> None:
        self._model = model
        self._draw = draw
        self.needs_times = needs_times
        self._heads: dict[int, Head] = {}

    def model_of(self, compute: StepCompute) -> Denoiser:
        chosen: Denoiser = self._model if compute.model is None else compute.model
        return chosen

    @torch.inference_mode()
    def predict(
        self,
        tokens: Tensor,
        times: Tensor | None,
        compute: StepCompute,
        rows: Tensor,
        names: tuple[Tensor, Tensor, Tensor],
    ) -> Prediction:
        """Run `compute` on tokens [b, L] at times [b] and draw a token for each row of `rows` [R].

        rows are flat indices b*L + l; names are the sequence id, step and position [R] of each row's random
        numbers. times may be None unless the model is conditioned on time.
        """
        model = self.model_of(compute)
        device = model.device
        hidden, loops, sigma = self.hidden(tokens, times, compute)
        if not rows.numel():
            return Prediction(None, loops)
        rng = RowRng(self._draw.seed, *(name.to(device) for name in names))
        sampled = lk.sample_rows(
            hidden,
            self.head(model, sigma),
            rows.to(device),
            rng,
            temperature=self._draw.temperature,
            top_p=self._draw.top_p,
            top_k=self._draw.top_k,
            compute_dtype=model.compute_dtype,
        )
        return Prediction(SampledRows(*(field.cpu() for field in sampled)), loops)

    def hidden(
        self, tokens: Tensor, times: Tensor | None, compute: StepCompute
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One network call: residual stream [b, L, D], loops spent [b] on the CPU, sigma [b] or None."""
        model = self.model_of(compute)
        sigma = None
        if model.config.time_conditioning:
            assert times is not None
            sigma = diffusion.sigma(times).float().to(model.device)
        num_loops = compute.num_loops or model.config.max_loops
        tokens = tokens.to(model.device)
        if compute.exit_threshold is None:
            hidden = model.hidden(tokens, sigma, num_loops=num_loops)
            return hidden, torch.full((tokens.shape[0],), num_loops), sigma
        hidden, loops = model.hidden(
            tokens, sigma, num_loops=num_loops, exit_threshold=compute.exit_threshold
        )
        return hidden, loops.cpu(), sigma

    def head(self, model: Denoiser, sigma: Tensor | None) -> Head:
        """The model's head, without the forbidden tokens."""
        if id(model) not in self._heads:
            self._heads[id(model)] = self._without_forbidden(model.head(sigma))
        head = self._heads[id(model)]
        return head if sigma is None else head._replace(modulation=model.head(sigma).modulation)

    def _without_forbidden(self, head: Head) -> Head:
        if not self._draw.forbidden.numel():
            return head
        forbidden = self._draw.forbidden.to(head.bias.device)
        return head._replace(bias=head.bias.detach().index_fill(0, forbidden, NEVER))


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
    return [model, *plan.models.values()]


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode is restored afterwards, also after an error."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
