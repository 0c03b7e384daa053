"""Denoisers with known predictions; only their hidden state is made up, the draw is the real one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.sampling import SampleResult, fused
from loopmdm_kernels.types import Head

NORM_EPS = 1e-5


class TableDenoiser(nn.Module):
    """Logits table[context] at every position, context being any function of the tokens.

    The hidden state is the one-hot context. Its layer norm is affine, so some head returns the table.
    """

    compute_dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, table: Tensor, context: Callable[[Tensor], Tensor], length: int) -> None:
        super().__init__()
        num_contexts, num_tokens = table.shape
        self.config = LoopMDMConfig(
            num_tokens + 1, num_tokens, hidden_size=2, num_heads=1, max_length=length, max_loops=5
        )
        table = torch.cat((table, torch.zeros(num_contexts, 1)), dim=1)  # the mask's logit, never used
        deviation = math.sqrt((1 - 1 / num_contexts) / num_contexts + NORM_EPS)
        self._head = Head(
            torch.ones(num_contexts),
            (table * deviation).T.contiguous(),
            table.mean(dim=0),
            torch.zeros(1, 2, num_contexts),
            num_tokens,
        )
        self._context = context
        self._num_contexts = num_contexts
        self.calls: list[dict[str, Any]] = []

    def hidden(self, input_ids: Tensor, sigma: Tensor | None = None, *, num_loops: int) -> Tensor:
        self.calls.append({"tokens": input_ids.clone(), "num_loops": num_loops})
        context = self._context(input_ids)
        return torch.zeros(*context.shape, self._num_contexts).scatter_(2, context[..., None], 1.0)

    def head(self, sigma: Tensor | None = None) -> Head:
        return self._head


def exact_posterior(law: Tensor) -> TableDenoiser:
    """The denoiser whose prediction is the posterior p(x_l | unmasked tokens) of a joint law [V] * L."""
    length, num_tokens = law.ndim, law.shape[0]
    contexts = torch.zeros((num_tokens + 1) ** length * length, dtype=torch.int64)
    table = []
    for state in itertools.product(range(num_tokens + 1), repeat=length):
        index = tuple(slice(None) if token == num_tokens else slice(token, token + 1) for token in state)
        given = law[index]
        code = 0
        for token in state:
            code = code * (num_tokens + 1) + token
        for position in range(length):
            marginal = given.sum(dim=[axis for axis in range(length) if axis != position])
            if marginal.numel() == num_tokens:
                contexts[code * length + position] = len(table)
                table.append((marginal / marginal.sum()).log())

    def context(tokens: Tensor) -> Tensor:
        powers = (num_tokens + 1) ** torch.arange(length - 1, -1, -1)
        return contexts[(tokens * powers).sum(dim=1, keepdim=True) * length + torch.arange(length)]

    return TableDenoiser(torch.stack(table), context, length)


def fixed_logits(logits: Tensor) -> TableDenoiser:
    """The denoiser that predicts logits [L, V] whatever the tokens are."""
    length = logits.shape[0]
    return TableDenoiser(logits, lambda tokens: torch.arange(length).expand(tokens.shape), length)


def random_model(**overrides: Any) -> LoopMDM:
    """A small LoopMDM, all parameters random, scaled so that predictions depend on the other tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 12,
        "mask_token_id": 11,
        "hidden_size": 16,
        "num_heads": 2,
        "num_layers": 4,
        "cond_dim": 8,
        "max_length": 20,
        "dropout": 0.1,
        "max_loops": 3,
        **overrides,
    }
    model = LoopMDM(LoopMDMConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        model.output_layer.norm_final.weight.add_(2)
        for block in model.blocks:
            block.attn_out.weight.mul_(4)
            for gain in (block.norm1.weight, block.norm2.weight, block.adaLN_modulation.bias):
                gain.add_(1)
    return model


def reveal_steps(out: SampleResult) -> Tensor:
    """The step that revealed each position [B, L], -1 where none did."""
    assert out.history is not None
    steps = torch.full(out.tokens.shape, -1)
    for event in out.history:
        steps[event.sequence, event.positions] = event.step
    return steps


@pytest.fixture
def seen_sigmas(monkeypatch: pytest.MonkeyPatch) -> Callable[[LoopMDM], list[Tensor]]:
    """Watches a model: the noise levels of its calls from now on."""

    def watch(model: LoopMDM) -> list[Tensor]:
        seen: list[Tensor] = []
        hidden = model.hidden
        monkeypatch.setattr(
            model, "hidden", lambda ids, sigma, **k: seen.append(sigma) or hidden(ids, sigma, **k)
        )
        return seen

    return watch


@pytest.fixture
def make_posterior() -> Callable[[Tensor], TableDenoiser]:
    return exact_posterior


@pytest.fixture
def make_fixed() -> Callable[[Tensor], TableDenoiser]:
    return fixed_logits


@pytest.fixture
def make_model() -> Callable[..., LoopMDM]:
    return random_model


@pytest.fixture
def model() -> LoopMDM:
    return random_model()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are `OrderedRun`s: Python between the network calls, and the ops called one by one."""
    monkeypatch.setattr(fused, "_can_fuse", lambda *_: False)
