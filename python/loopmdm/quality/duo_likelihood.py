"""Likelihoods as Duo's lm-evaluation-harness computes them, with the random numbers that it draws.

A request is BOS, context, continuation, EOS. Its figure is minus the mean over `num_mc_samples` corrupted
copies of the mean over tokens of the weighted cross-entropy: nats a token, not of the text. In mode "full"
tokens of the context are masked and counted too; in "suffix" only the others, with the noise level that the
share of masked tokens stands for. Times are antithetic: one in each of equal parts of their range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.model import vocabulary
from loopmdm.model.modes import evaluating
from loopmdm.quality.reader import Reader

MODES = ("full", "suffix")
_EPS = 1e-3  # of the log-linear schedule, and the smallest t


@torch.no_grad()
def mean_nll(reader: Reader, prefix: Tensor, target: Tensor, num_samples: int, mode: str) -> float:
    """Duo's `eval_suffix_nll` of int64 ids [P] and [N] on the model's device; `reader.max_batch` is its
    `batch_size`.

    Random numbers are torch's of that device, drawn in Duo's order and sizes. A copy of mode "suffix" without
    a mask counts as 0; Duo divides by zero there.
    """
    batch = Batch(torch.cat([prefix, target])[None])
    length, losses = batch.input_ids.shape[1], []
    with evaluating([reader.model]):
        for t in torch.split(_times(num_samples, reader.device), reader.max_batch):
            move = 1 - (1 - (1 - _EPS) * t)  # as Duo rounds it
            masked = torch.rand(len(t), length, device=t.device, dtype=torch.float32) < move[:, None]
            scale, counted = (1 - _EPS) / move, length
            if mode == "suffix":
                masked[:, : len(prefix)] = False
                share = masked.float().mean(1)
                scale, t = (1 - _EPS) / share, share / (1 - _EPS)
                counted = len(target)
            nll = _cross_entropy(reader, batch, masked, t)
            weighted = torch.where(masked, nll * scale[:, None].double(), 0.0)
            losses.append(float(weighted.sum() / (counted * len(t))))
    return sum(losses) / len(losses)


@torch.no_grad()
def is_greedy(reader: Reader, prefix: Tensor, target: Tensor) -> bool:
    """Whether one call with all of the continuation masked, but its EOS known, predicts each token of it."""
    batch = Batch(torch.cat([prefix, target])[None])
    masked = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    masked[:, len(prefix) : -1] = True
    rows = masked.flatten().nonzero().squeeze(1)
    if not len(rows):
        return True
    with evaluating([reader.model]):
        none = torch.zeros(1, dtype=torch.int64, device=reader.device)
        hidden, head, dtype, used = reader.read(batch, none, masked, torch.zeros(1, device=reader.device))
        reader.count(masked, used, len(rows))
        found = vocabulary.most_probable(hidden, head, rows, compute_dtype=dtype).token
    return torch.equal(found, batch.input_ids.flatten()[rows])


def _times(count: int, device: torch.device) -> Tensor:
    """One t in each of `count` equal parts of [1e-3, 1)."""
    drawn = torch.rand(count, device=device, dtype=torch.float32)
    part = torch.arange(count, device=device) / count
    return (1 - _EPS) * ((drawn / count + part) % 1) + _EPS


def _cross_entropy(reader: Reader, batch: Batch, masked: Tensor, t: Tensor) -> Tensor:
    """Of the masked tokens of copies [b, L] of one text, float64 [b, L], 0 elsewhere."""
    copies = torch.zeros(len(masked), dtype=torch.int64, device=masked.device)
    rows = masked.flatten().nonzero().squeeze(1)
    hidden, head, dtype, used = reader.read(batch, copies, masked, t)
    reader.count(masked, used, len(rows))
    _, nll = vocabulary.masked_cross_entropy(
        hidden,
        head,
        batch.input_ids[copies],
        rows,
        torch.ones(len(rows), device=masked.device, dtype=torch.float32),
        compute_dtype=dtype,
    )
    out = torch.zeros(masked.numel(), dtype=torch.float64, device=masked.device)
    return out.index_put((rows,), nll.double()).view(masked.shape)
