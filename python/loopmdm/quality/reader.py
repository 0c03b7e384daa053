"""A network as likelihoods read it: corrupted copies of texts in, a residual stream and its head out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.exits import ExitRule
from loopmdm.model import LoopMDM, diffusion, vocabulary
from loopmdm.model.flops import SamplingLedger
from loopmdm_kernels.values import positive

_TOKENS_A_CALL = 2**14


def copies_a_call(length: int, max_batch: int | None) -> int:
    """How many copies of so many tokens a network call reads; None: as many as have 16384."""
    return max(1, _TOKENS_A_CALL // length) if max_batch is None else positive("max_batch", max_batch)


@dataclass(frozen=True)
class Reader:
    """A network as it reads corrupted texts."""

    model: Any
    num_loops: int
    max_batch: int  # copies in a network call
    exit: ExitRule | None = None
    min_loops: int = 1
    ledger: SamplingLedger = field(default_factory=lambda: SamplingLedger(1))  # lengths come with each call

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def calls(self, copies: Tensor) -> Iterable[Tensor]:
        """Copies [N] in parts that one network call reads."""
        return torch.split(copies, self.max_batch) if len(copies) else ()

    def count(self, masked: Tensor, used: Tensor, rows: int) -> None:
        """Count a call of `read` with masks [N, L], which used so many loops [N], and projected rows.

        Of a module that is no LoopMDM nothing is counted: what it executes is not known.
        """
        if not isinstance(self.model, LoopMDM):
            return
        config, length = self.model.config, masked.shape[1]
        self.ledger.record(config, used.tolist(), rows, length=length)
        if self.exit is not None:
            spent = self.exit.cost(used.cpu(), torch.full((len(used),), self.num_loops), self.min_loops)
            self.ledger.record_tails(config, int(spent.tails.sum()), length=length)
            self.ledger.record_rows(config, int((spent.projections * masked.sum(1).cpu()).sum()))

    def read(
        self, batch: Batch, sequence: Tensor, masked: Tensor, t: Tensor
    ) -> tuple[Tensor, vocabulary.AnyHead, torch.dtype | None, Tensor]:
        """Residual stream [N, L, D], its head and dtype, loops used [N], of sequences with masks [N, L]."""
        model, config = self.model, self.model.config
        noisy = torch.where(masked, config.mask_token_id, batch.input_ids[sequence])
        sigma = diffusion.sigma(t).float() if config.time_conditioning else None
        keys = None
        if config.key_padding_mask and batch.attention_mask is not None:
            keys = batch.attention_mask[sequence]
        used = torch.full((len(t),), self.num_loops)
        options: Any = {"num_loops": self.num_loops, "attention_mask": keys}
        if not isinstance(model, LoopMDM):
            logits = model(noisy, sigma, **options)
            shared = torch.zeros(1, 1, device=logits.device)
            return logits, vocabulary.CalledHead(lambda x, _: x, shared, config.mask_token_id), None, used
        if self.exit is None:
            hidden = model.hidden(noisy, sigma, **options)
        else:
            hidden, used = model.hidden(noisy, sigma, exit=self.exit, min_loops=self.min_loops, **options)
        return hidden, model.head(sigma), model.compute_dtype, used
