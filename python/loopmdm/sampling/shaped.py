"""A run whose rows are drawn in ways that no kernel has: from logits that are guided, processed or cut.

In this order: guidance, the logits processor, no end of sequence before its time; then the draw. What ratings
and events say of a prediction is of the logits before temperature, top_k, top_p and min_p.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.model import vocabulary
from loopmdm.sampling.canvas import Canvas
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.network import Call, Network, Prediction
from loopmdm.sampling.ordered import OrderedRun
from loopmdm.sampling.orders import Order
from loopmdm_kernels.calls import Draw
from loopmdm_kernels.reference.nucleus import draw_among, restriction
from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.types import RowRng, SampledRows

_ROWS = 64  # logits in memory at once


class _How(NamedTuple):
    """How the rows of a sequence are drawn."""

    temperature: float
    top_p: float
    top_k: int | None
    min_p: float


class ShapedRun(OrderedRun):
    """An `OrderedRun` whose options are of each sequence, or change logits."""

    def __init__(self, canvas: Canvas, order: Order, network: Network, decoding: Decoding) -> None:
        super().__init__(canvas, order, network, decoding)
        batch = len(canvas.tokens)
        columns = []
        for name in _How._fields:
            value: Any = getattr(decoding, name)
            columns.append(value if isinstance(value, tuple) else (value,) * batch)
        self._how = [_How(*values) for values in zip(*columns, strict=True)]
        self._given = canvas.tokens != network.config.mask_token_id  # [B, L]

    @torch.inference_mode()
    def predict(
        self, call: Call, rows: Tensor, names: tuple[Tensor, ...], slots: Tensor, start: Tensor
    ) -> Prediction:
        network = self.network
        model, width = network.model_of(call.compute), call.tokens.shape[1]
        hidden, spent, sigma = network.hidden(call)
        self.account(call, spent, rows.numel())
        unguided = None
        if self.decoding.cfg_scale:
            read = start[call.sequences, None] + torch.arange(width)
            known = self._given[call.sequences[:, None], read]
            tokens = call.tokens.masked_fill(known, network.config.mask_token_id)
            unguided, more, _ = network.hidden(call._replace(tokens=tokens))
            self.account(call, more, rows.numel())
        if not rows.numel():
            return Prediction(None, spent)
        head = network.head(model, sigma)
        numbers: dict[_How, list[int]] = {}
        for number, sequence in enumerate(call.sequences[rows // width].tolist()):
            numbers.setdefault(self._how[sequence], []).append(number)
        logits = partial(vocabulary.row_logits, head=head, compute_dtype=model.compute_dtype)
        drawn, places = [], []
        for how, alike in numbers.items():
            for place in torch.split(torch.tensor(alike), _ROWS):
                part = rows[place].to(model.device)
                scores = logits(hidden, rows=part)
                if unguided is not None:
                    other = logits(unguided, rows=part)
                    scores = other + (self.decoding.cfg_scale + 1) * (scores - other)
                scores = self._shaped(scores, call.tokens[rows[place] // width], slots[place])
                rng = RowRng(self.decoding.seed, *(name[place].to(model.device) for name in names))
                drawn.append(_draw(scores, head.excluded_token, rng, how))
                places.append(place)
        back = torch.cat(places).argsort()
        fields = (torch.cat(field)[back.to(model.device)].cpu() for field in zip(*drawn, strict=True))
        return Prediction(SampledRows(*fields), spent)

    def _shaped(self, scores: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        """Logits [R, V] as they are drawn from. tokens: [R, L], what the network read; slots: [R]."""
        decoding = self.decoding
        if decoding.logits_processor is not None:
            shape = scores.shape
            scores = decoding.logits_processor(tokens.to(scores.device), scores)
            if not isinstance(scores, Tensor) or scores.shape != shape:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(f"logits_processor: returned {got}, expected scores of shape {tuple(shape)}")
        if decoding.min_new_tokens is not None:
            assert decoding.eos_token_id is not None
            early = slots - self.slots.first[self.slots.sequence[slots]] < decoding.min_new_tokens
            column = scores[:, decoding.eos_token_id]
            banned = column.masked_fill(early.to(scores.device), -math.inf)
            scores = scores.index_copy(
                1, torch.tensor([decoding.eos_token_id]).to(scores.device), banned[:, None]
            )
        return scores


def _draw(scores: Tensor, excluded_token: int, rng: RowRng, how: _How) -> SampledRows:
    draw = Draw(rng, how.temperature, how.top_p, how.top_k)
    if how.min_p == 0 or how.temperature == 0:
        return sample_logits(scores, excluded_token, draw)

    def among(log_probs: Tensor, _: Draw) -> Tensor:
        """min_p is of the tempered distribution; a cut of the most probable, as top_k and top_p are."""
        least = log_probs.amax(dim=-1, keepdim=True) + how.temperature * math.log(how.min_p)
        allowed = log_probs >= least
        if draw.restricted:
            allowed &= restriction(log_probs, *draw.limits)
        return draw_among(log_probs, allowed, draw)

    # With a top_k there are always tokens that cannot be drawn, and `among` is asked.
    return sample_logits(scores, excluded_token, draw._replace(top_k=scores.shape[-1]), among)
