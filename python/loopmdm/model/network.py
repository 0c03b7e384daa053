"""The network of a LoopMDM: its modules, and their weights as the ops take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.model.adapters import base_of, weight_of
from loopmdm.model.between import Between
from loopmdm.model.checkpoint import Trainable
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.cut import named, say, why_global
from loopmdm.model.modules import (
    DDiTBlock,
    OutputLayer,
    RotaryEmbedding,
    SigmaEmbedding,
    TokenEmbedding,
    by_row,
)
from loopmdm.model.vocabulary import AnyHead, CalledHead
from loopmdm_kernels.tracing import can_read, not_compiled, traced, transformed, without_autocast
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Head, Fp8Weight, Head

T = TypeVar("T")
_NOTHING: dict[int, dict[Any, Any]] = {}
# What is kept of each model by id; of a context, so that threads do not end each other's.
_FROZEN: ContextVar[dict[int, dict[Any, Any]]] = ContextVar("frozen")


class Network(Trainable):
    """Embeddings, blocks and the vocabulary head; `stages` runs them."""

    config: LoopMDMConfig

    def __init__(self, config: LoopMDMConfig) -> None:
        super().__init__(config)
        self._fp8_blocks = self._fp8_head = False
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embed = TokenEmbedding(config.max_length, config.hidden_size)
        self.sigma_map = SigmaEmbedding(config.cond_dim)
        self.rotary_emb = RotaryEmbedding(config.head_dim)
        self.blocks = nn.ModuleList(DDiTBlock(config) for _ in range(config.num_layers))
        self.output_layer = OutputLayer(config)
        if config.learns_between_loops:
            self.between = Between(config)

    @property
    def device(self) -> torch.device:
        return self.vocab_embed.embedding.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matrix products: autocast's if it is on, else the parameters'."""
        if self.device.type != "meta" and torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.vocab_embed.embedding.dtype

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keep only loop inputs for backward (`recompute`); of transformers' name, for its Trainer."""
        self.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.recompute = False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, no weight may change: without gradients, what depends on them alone is computed once."""
        token = _FROZEN.set({**_FROZEN.get(_NOTHING), id(self): {}})
        try:
            yield
        finally:
            _FROZEN.reset(token)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """make(), or what it returned before for this key where weights are `frozen`."""
        if traced() or transformed() or torch.is_grad_enabled():
            return make()
        kept = _FROZEN.get(_NOTHING).get(id(self))
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        value: T = kept[key]
        return value

    def use_fp8_weights(self, *, blocks: bool = True, head: bool = True) -> None:
        """Multiply by matrices rounded to e4m3, without gradients; both False: as before.

        The parameters, and with them `state_dict`, stay what they are: the rounded matrices are made from
        them, once where weights are `frozen`, as in `sample`. Only the Triton kernels load them as e4m3; the
        reference computes the same with matrices of the compute dtype.

        Args:
            blocks: of the blocks.
            head: of the vocabulary projection.
        """
        self._fp8_blocks, self._fp8_head = blocks, head

    def block_weights(self, start: int, end: int) -> list[BlockWeights | Fp8BlockWeights]:
        """Of blocks start..end - 1, as the ops take them."""

        def made() -> list[BlockWeights | Fp8BlockWeights]:
            weights = [cast(DDiTBlock, self.blocks[i]).weights() for i in range(start, end)]
            return [Fp8BlockWeights.of(w) if self._fp8_blocks else w for w in weights]

        return self.once(("weights", start, self._fp8_blocks), made)

    def condition(self, sigma: Tensor | None) -> Tensor:
        """silu(sigma_map(sigma)) [1 or B, cond_dim], in the parameters' precision.

        Without gradients a row's bits do not depend on the others (see `by_row`); equal noise levels are one
        row.
        """

        def embedded(noise: Tensor) -> Tensor:
            with without_autocast(self.device):
                return F.silu(self.sigma_map(noise))

        if sigma is not None and self.config.time_conditioning:
            if not torch.is_grad_enabled() and can_read(sigma) and bool((sigma == sigma[0]).all()):
                sigma = sigma[:1]
            return by_row(embedded, sigma)
        return self.once(
            ("condition",), lambda: embedded(torch.zeros(1, device=self.device, dtype=torch.float32))
        )

    def cuts(self) -> list[str]:
        """Why parts of the model run module by module instead of in the fused ops; empty: none does.

        It is so where modules are watched (hooks), replaced, or wrapped in more than a sum of weights; LoRA
        adapters are such a sum.
        """
        why = why_global()
        if why is not None:
            return [why]
        reasons = {f"blocks.{i}": DDiTBlock.why_called(cast(DDiTBlock, b)) for i, b in enumerate(self.blocks)}
        reasons["output_layer"] = OutputLayer.why_called(self.output_layer)
        return [named(name, why) for name, why in reasons.items() if why is not None]

    def head_is_called(self) -> bool:
        """Whether `head` is one of modules that are called."""
        return why_global() is not None or OutputLayer.why_called(self.output_layer) is not None

    @not_compiled
    def say_cuts(self) -> None:
        """Warn once of each reason in `cuts`."""
        say(self, self.cuts())

    def head(self, sigma: Tensor | None = None) -> AnyHead:
        """The vocabulary head for noise levels sigma [B] (unused without time conditioning)."""
        out = self.output_layer
        if self.head_is_called():
            self.say_cuts()
            if self._fp8_head:
                raise ValueError(f"use_fp8_weights: not of a head that has to be called ({self.cuts()[-1]})")
            return CalledHead(out, self.condition(sigma), self.config.mask_token_id)
        modulation = by_row(out.adaLN_modulation, self.condition(sigma))
        modulation = modulation.view(-1, 2, self.config.hidden_size)
        weight = self.once(("head weight",), lambda: weight_of(out.linear))
        norm, bias = out.norm_final.weight, base_of(out.linear).bias
        if self._fp8_head:
            rounded = self.once(("fp8 head",), lambda: Fp8Weight.of(weight))
            return Fp8Head(norm, rounded, bias, modulation, self.config.mask_token_id)
        return Head(norm, weight, bias, modulation, self.config.mask_token_id)
