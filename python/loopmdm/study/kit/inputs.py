"""Corrupted sequences z_t, what networks make of them, and a hash to show that two networks read the same."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.model import LoopMDM, diffusion, vocabulary
from loopmdm.model.seeds import derive_seed
from loopmdm.model.stages import Stages
from loopmdm.quality.copies import corruption, counted_tokens

_STREAM = 0x535459  # "STY": draws at fixed times, apart from those of evaluation


class Noisy(NamedTuple):
    """A batch at one time each, on the CPU."""

    clean: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool
    t: Tensor  # [B]
    attention_mask: Tensor | None

    def stages(self, model: LoopMDM) -> Stages:
        """One forward pass of `model`, cut at the loop."""
        config = model.config
        noisy = torch.where(self.masked, config.mask_token_id, self.clean).to(model.device)
        return model.stages(noisy, self.sigma(model), attention_mask=self.keys(model))

    def sigma(self, model: LoopMDM) -> Tensor | None:
        """The noise level the model is told, [B]."""
        return diffusion.sigma(self.t).to(model.device) if model.config.time_conditioning else None

    def keys(self, model: LoopMDM) -> Tensor | None:
        """The keys the model may attend to, [B, L]; None: all."""
        if self.attention_mask is None or not model.config.key_padding_mask:
            return None
        return self.attention_mask.to(model.device)


def stratified(batch: Batch, num_t: int, seed: int, first: int) -> list[Noisy]:
    """The corruptions `evaluate_nll` measures: one time of each sequence in each of `num_t` bins of t."""
    t, masked = corruption(batch, num_t, seed, first)
    return [Noisy(batch.input_ids, masked[:, j], t[:, j], batch.attention_mask) for j in range(num_t)]


def at_times(batch: Batch, times: Sequence[float], seed: int, first: int) -> list[Noisy]:
    """Corruptions at given times; what is masked at one time is masked at every later one.

    At t = 1 everything that may be masked is.
    """
    counted = counted_tokens(batch)
    uniform = torch.empty(counted.shape, dtype=torch.float32)
    generator = torch.Generator()
    for index, row in enumerate(uniform):
        generator.manual_seed(derive_seed(seed, _STREAM, first + index))
        row.copy_(torch.rand(row.shape, generator=generator, dtype=torch.float32))
    return [
        Noisy(
            batch.input_ids,
            (uniform < t) & counted,
            torch.full((len(uniform),), t, dtype=torch.float32),
            batch.attention_mask,
        )
        for t in times
    ]


def digest(tokens: Tensor) -> str:
    """A hash of the token ids a network was given."""
    return hashlib.blake2b(tokens.cpu().contiguous().numpy().data, digest_size=8).hexdigest()


def masked_log_probs(model: LoopMDM, hidden: Tensor, noisy: Noisy) -> Iterator[Tensor]:
    """log p(x0 | z_t) [R, V] in float64 at the masked positions of each sequence, the mask excluded (SUBS).

    One sequence at a time: no [B, L, V] tensor exists.
    """
    head = model.head(noisy.sigma(model))
    for index, masked in enumerate(noisy.masked.to(hidden.device)):
        rows = hidden[index, masked][None]
        if not rows.shape[1]:
            yield rows.new_empty(0, model.config.vocab_size, dtype=torch.float64)
            continue
        own = vocabulary.of_sequences(head, slice(index, index + 1))
        logits = vocabulary.head_logits(rows, own, compute_dtype=model.compute_dtype)
        logits = logits[0].double()
        logits[:, model.config.mask_token_id] = -torch.inf
        yield logits.log_softmax(-1)


def times(text: str) -> list[float]:
    """An option's times in (0, 1], each once, in order."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected times such as 0.25,0.5, each in (0, 1]")
    return values
