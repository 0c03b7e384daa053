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


class Draw(NamedTuple):
    """How tokens are drawn from a prediction."""

    temperature: float
    top_p: float
    seed: int


class Prediction(NamedTuple):
    """One network call on b sequences, on the CPU. sampled is None when no row was asked for."""

    sampled: SampledRows | None
    loops: Tensor  # [b] int64


class Network:
    """The network calls of one run. Heads that depend on nothing but the weights are made once."""

    def __init__(self, model: Denoiser, draw: Draw) -> None:
        self._model = model
        self._draw = draw
        self._heads: dict[int, Head] = {}

    def model_of(self, compute: StepCompute) -> Denoiser:
        chosen: Denoiser = self._model if compute.model is None else compute.model
        return chosen

    @torch.inference_mode()
    def predict(
        self,
        tokens: Tensor,
        times: Tensor,
        compute: StepCompute,
        rows: Tensor,
        names: tuple[Tensor, Tensor, Tensor],
    ) -> Prediction:
        """Run `compute` on tokens [b, L] at times [b] and draw a token for each row of `rows` [R].

        rows are flat indices b*L + l; names are the sequence id, step and position [R] of each row's random
        numbers.
        """
        model = self.model_of(compute)
        device = model.device
        sigma = diffusion.sigma(times).float().to(device) if model.config.time_conditioning else None
        num_loops = compute.num_loops or model.config.max_loops
        if compute.exit_threshold is None:
            hidden = model.hidden(tokens.to(device), sigma, num_loops=num_loops)
            loops = torch.full((tokens.shape[0],), num_loops)
        else:
            hidden, loops = model.hidden(
                tokens.to(device), sigma, num_loops=num_loops, exit_threshold=compute.exit_threshold
            )
        if not rows.numel():
            return Prediction(None, loops.cpu())
        rng = RowRng(self._draw.seed, *(name.to(device) for name in names))
        sampled = lk.sample_rows(
            hidden,
            self._head(model, sigma),
            rows.to(device),
            rng,
            temperature=self._draw.temperature,
            top_p=self._draw.top_p,
            compute_dtype=model.compute_dtype,
        )
        return Prediction(SampledRows(*(field.cpu() for field in sampled)), loops.cpu())

    def _head(self, model: Denoiser, sigma: Tensor | None) -> Head:
        if sigma is not None:
            return model.head(sigma)
        if id(model) not in self._heads:
            self._heads[id(model)] = model.head()
        return self._heads[id(model)]


def check_models(model: Any, plan: ComputePlan, length: int) -> list[Any]:
    """All models of a run; raises where one of the plan's cannot take the place of `model`."""
    for name, other in plan.models.items():
        for field in ("vocab_size", "mask_token_id"):
            expected, got = getattr(model.config, field), getattr(other.config, field)
            if expected != got:
                raise ValueError(
                    f"the plan's model {name} has {field} {got}, but the sampled model has {expected}"
                )
        if other.config.max_length < length:
            raise ValueError(
                f"the plan's model {name} has max_length {other.config.max_length}, below length {length}"
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
