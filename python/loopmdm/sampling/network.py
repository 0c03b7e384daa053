"""Runs the planned network on some sequences and draws a token for the rows that were asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from loopmdm.exits import ExitCost, ExitRule
from loopmdm.model import LoopMDM, diffusion, vocabulary
from loopmdm.model.modes import evaluating
from loopmdm.model.vocabulary import AnyHead
from loopmdm.plan import ComputePlan, StepCompute
from loopmdm.sampling.decoding import Decoding
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


class Spent(NamedTuple):
    """What one network call spent on each of its b sequences, on the CPU."""

    loops: Tensor  # [b] int64
    exits: ExitCost | None  # of an exit rule


class Prediction(NamedTuple):
    """One network call on b sequences, on the CPU. sampled is None when no row was asked for."""

    sampled: SampledRows | None
    spent: Spent


class Call(NamedTuple):
    """One network call on b sequences of a run; all is on the CPU."""

    compute: StepCompute
    num_loops: int | Tensor  # of all sequences or of each, int64 [b], in place of the one of `compute`
    sequences: Tensor  # [b] int64, rows of the run
    tokens: Tensor  # [b, L] int64, what the network reads of them
    times: Tensor | None  # [b]; None where no model is conditioned on time

    @property
    def limits(self) -> Tensor:
        """Loops of each sequence, at most, int64 [b]."""
        if isinstance(self.num_loops, Tensor):
            return self.num_loops
        return torch.full((len(self.tokens),), self.num_loops)

    def spent(self, used: Tensor | None) -> Spent:
        """What it cost where an exit rule used so many loops [b]; None: no rule was asked."""
        rule = self.compute.exit
        if rule is None or used is None:
            return Spent(self.limits, None)
        return Spent(used, rule.cost(used, self.limits, self.compute.min_loops))


class Network:
    """The network calls of one run. Heads that depend on nothing but the weights are made once.

    Raises:
        ValueError: a model of the plan cannot take the place of `model`.
    """

    def __init__(self, model: Any, decoding: Decoding, *, batch: int, context: int) -> None:
        """batch: sequences of the run; context: positions that a call reads, at most."""
        self.models = check_models(model, decoding.plan, context)
        self.config = model.config
        self.context = context
        self.max_batch = min(batch, decoding.max_batch or batch)
        self.needs_times = any(model.config.time_conditioning for model in self.models)
        self._decoding = decoding
        self._heads: dict[tuple[int, bool], AnyHead] = {}

    def model_of(self, compute: StepCompute) -> Denoiser:
        chosen: Denoiser = self.models[0] if compute.model is None else compute.model
        return chosen

    def loops_of(self, compute: StepCompute) -> int:
        """Loops of a compute, at most: its own number, or the model's max_loops."""
        return compute.num_loops or int(self.model_of(compute).config.max_loops)

    @torch.inference_mode()
    def predict(self, call: Call, rows: Tensor, names: Sequence[Tensor]) -> Prediction:
        """Run a call and draw a token for each row of `rows` [R].

        rows are flat indices b*L + l; names are the sequence id, step and position [R] of each row's random
        numbers.
        """
        hidden, spent, sigma = self.hidden(call)
        if not rows.numel():
            return Prediction(None, spent)
        return Prediction(self.draw(self.model_of(call.compute), hidden, sigma, rows, names), spent)

    def draw(
        self, model: Denoiser, hidden: Tensor, sigma: Tensor | None, rows: Tensor, names: Sequence[Tensor]
    ) -> SampledRows:
        """A token for each row [R] of the residual stream [b, L, D]; rows, names and tokens on the CPU."""
        sampled = self.sample_rows(
            model, hidden, sigma, rows.to(model.device), [name.to(model.device) for name in names]
        )
        return SampledRows(*(field.cpu() for field in sampled))

    def sample_rows(
        self, model: Denoiser, hidden: Tensor, sigma: Tensor | None, rows: Tensor, names: Sequence[Tensor]
    ) -> SampledRows:
        """A token for each row [R] of the residual stream [b, L, D]; all is on the model's device."""
        options = self._decoding
        return vocabulary.sample_rows(
            hidden,
            self.head(model, sigma),
            rows,
            RowRng(options.seed, *names),
            temperature=cast(float, options.temperature),
            top_p=cast(float, options.top_p),
            top_k=cast("int | None", options.top_k),
            compute_dtype=model.compute_dtype,
        )

    def sigma(self, call: Call) -> Tensor | None:
        """Noise level of each sequence, float32 [b] on the CPU, where the model is conditioned on time."""
        if not self.model_of(call.compute).config.time_conditioning:
            return None
        assert call.times is not None
        return diffusion.sigma(call.times).float()  # log1p: the same bits in any batch

    def hidden(self, call: Call) -> tuple[Tensor, Spent, Tensor | None]:
        """One network call: residual stream [b, L, D], what it spent, sigma [b] or None."""
        compute, model, sigma = call.compute, self.model_of(call.compute), self.sigma(call)
        tokens = call.tokens.to(model.device)
        sigma = None if sigma is None else sigma.to(model.device)
        most = call.num_loops.to(model.device) if isinstance(call.num_loops, Tensor) else call.num_loops
        if compute.exit is None:
            return model.hidden(tokens, sigma, num_loops=most), call.spent(None), sigma
        hidden, used = model.hidden(
            tokens, sigma, num_loops=most, exit=compute.exit, min_loops=compute.min_loops
        )
        return hidden, call.spent(used.cpu()), sigma

    def head(self, model: Denoiser, sigma: Tensor | None) -> AnyHead:
        """The model's head, without the forbidden tokens."""
        # Hooks may come and go between two steps.
        key = (id(model), isinstance(model, LoopMDM) and model.head_is_called())
        if key not in self._heads:
            made = model.head(sigma)
            forbidden = torch.tensor(self._decoding.forbidden, dtype=torch.int64)
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
