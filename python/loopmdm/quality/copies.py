"""The corrupted copies of texts that each method of `likelihood` reads, and what of them it scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.model import diffusion, vocabulary
from loopmdm.model import masks as token_masks
from loopmdm.model.seeds import derive_seed
from loopmdm.quality.reader import Reader
from loopmdm_kernels.values import meant, positive

METHODS = ("stratified", "mc", "chain_rule")
ORDERS = ("left_to_right", "random", "confidence")
_STREAM = 0x45564C  # "EVL": keeps these draws apart from those of training with the same seed
_ORDER_STREAM = 0x4F5244  # "ORD"


class Copies(NamedTuple):
    """Corrupted copies of the sequences of a batch, [N] in the order in which they are read, on the CPU."""

    sequence: Tensor  # [N] of the batch
    sample: Tensor  # [N] the estimate it belongs to
    t: Tensor  # [N] diffusion time
    scale: Tensor  # [N] float64, what its cross-entropy is divided by
    # Of copies by index [n]: masked tokens, and those of them that are scored, both bool [n, L].
    masks: Callable[[Tensor], tuple[Tensor, Tensor]]


def drawn(method: str, order: str | Tensor | None) -> bool:
    """Whether another seed gives another value."""
    return method != "chain_rule" or (isinstance(order, str) and order == "random")


def checked_samples(method: Any, order: Any, samples: Any) -> int:
    """How many estimates of each sequence there are, once method, order and number fit each other."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{meant(method, METHODS)}; expected {', '.join(METHODS)}")
    if order is not None and method != "chain_rule":
        raise ValueError(f"order: given with method {method!r}; it belongs to 'chain_rule'")
    if not (order is None or isinstance(order, Tensor) or (isinstance(order, str) and order in ORDERS)):
        raise ValueError(
            f"unknown order {order!r}{meant(order, ORDERS)}; expected {', '.join(ORDERS)} or positions [B, L]"
        )
    if samples is None:
        return 16 if drawn(method, order) else 1
    number = positive("samples", samples)
    if number > 1 and not drawn(method, order):
        raise ValueError(f"samples: got {number}, but in one order nothing is drawn; expected 1 or None")
    return number


def copies_of(
    reader: Reader,
    batch: Batch,
    method: str,
    order: str | Tensor | None,
    samples: int,
    seed: int,
    first: int = 0,
) -> Copies:
    """What `method` reads of the sequences from index `first` on; draws are functions of (seed, index)."""
    if method == "chain_rule":
        return _prefixes(_ranks(reader, batch, order, samples, seed, first))
    t, masked = corruption(batch, samples, seed, first, stratified=method == "stratified")
    sample, sequence = torch.cartesian_prod(torch.arange(samples), torch.arange(len(t))).unbind(1)

    def masks(part: Tensor) -> tuple[Tensor, Tensor]:
        chosen = masked[sequence[part], sample[part]]
        return chosen, chosen

    times = t.T.flatten()
    return Copies(sequence, sample, times, times.double(), masks)


def _prefixes(rank: Tensor) -> Copies:
    """A copy for each token, given its place in each order, rank [B, K, L]; -1: not counted."""
    sequence, sample, position = (rank >= 0).nonzero().unbind(1)
    known = rank[sequence, sample, position]
    counted = (rank >= 0).sum(2)[sequence, sample]

    def masks(part: Tensor) -> tuple[Tensor, Tensor]:
        own, before = rank[sequence[part], sample[part]], known[part, None]
        return own >= before, own == before

    share = (counted - known).double() / counted  # as `sample` has it in orders without a clock
    return Copies(sequence, sample, share, torch.ones_like(share), masks)


def _ranks(
    reader: Reader, batch: Batch, order: str | Tensor | None, samples: int, seed: int, first: int
) -> Tensor:
    """Which counted token is known how early: places [B, K, L] from 0 in each order; -1: not counted."""
    counted = counted_tokens(batch)
    size, length = counted.shape
    if isinstance(order, str) and order == "confidence":
        return _confidence(reader, batch, counted)[:, None]
    if isinstance(order, str) and order == "random":
        generator = torch.Generator()
        drawn_orders = []
        for index in range(first, first + size):
            generator.manual_seed(derive_seed(seed, _ORDER_STREAM, index))
            drawn_orders += [torch.randperm(length, generator=generator) for _ in range(samples)]
        positions = torch.stack(drawn_orders).view(size, samples, length)
    else:
        positions = _positions(order, size, length).expand(size, 1, length)
    inside = counted[:, None].expand(positions.shape).gather(2, positions)
    place = (inside.cumsum(2) - 1).masked_fill(~inside, -1)
    return torch.empty_like(place).scatter(2, positions, place)


def _positions(order: object, size: int, length: int) -> Tensor:
    """An order as a caller gives it, [1 or B, 1, L]."""
    if not isinstance(order, Tensor):
        return torch.arange(length)[None, None]
    if order.dtype != torch.int64 or order.shape not in ((length,), (size, length)):
        raise ValueError(
            f"order: got {order.dtype} of shape {tuple(order.shape)}, expected int64 positions [{length}] or"
            f" [{size}, {length}]"
        )
    order = order.cpu().view(-1, 1, length)
    if not bool((order.sort(2).values == torch.arange(length)).all()):
        raise ValueError(f"order: expected every position 0..{length - 1} once in each row")
    return order


@torch.no_grad()
def _confidence(reader: Reader, batch: Batch, counted: Tensor) -> Tensor:
    """Ranks [B, L] of the counted tokens, the surest prediction first, the lowest position on ties."""
    batch, masked = batch.to(reader.device), counted.clone()
    rank, total = torch.full(counted.shape, -1), counted.sum(1)
    for place in range(int(total.max())):
        for part in reader.calls(masked.any(1).nonzero().squeeze(1)):
            share = masked[part].sum(1).double() / total[part]
            inputs = (tensor.to(reader.device) for tensor in (part, masked[part], share))
            hidden, head, dtype, used = reader.read(batch, *inputs)
            rows = masked[part].flatten().nonzero().squeeze(1)
            reader.count(masked[part], used, len(rows))
            found = vocabulary.most_probable(hidden, head, rows.to(reader.device), compute_dtype=dtype)
            sure = torch.full(masked[part].shape, -1.0, dtype=torch.float64)
            sure[masked[part]] = found.top1_prob.double().cpu()
            best = (sure == sure.amax(1, keepdim=True)).int().argmax(1)
            rank[part, best] = place
            masked[part, best] = False
    return rank


def corruption(
    batch: Batch, num_t: int, seed: int, first: int, *, stratified: bool = True
) -> tuple[Tensor, Tensor]:
    """Times [B, num_t] and masks [B, num_t, L] of the sequences from index `first` on.

    Functions of (seed, index of the sequence): one time in each of `num_t` equal parts of [1e-3, 1), or all
    anywhere in it.
    """
    size, length = batch.input_ids.shape
    counted = counted_tokens(batch)
    jitter, uniform = (
        torch.empty(size, num_t, dtype=torch.float32),
        torch.empty(size, num_t, length, dtype=torch.float32),
    )
    generator = torch.Generator()
    for index in range(size):
        generator.manual_seed(derive_seed(seed, _STREAM, first + index))
        jitter[index] = torch.rand(num_t, generator=generator, dtype=torch.float32)
        uniform[index] = torch.rand(num_t, length, generator=generator, dtype=torch.float32)
    if stratified:
        t = diffusion.MIN_TIME + (1 - diffusion.MIN_TIME) * (torch.arange(num_t) + jitter) / num_t
    else:
        t = diffusion.MIN_TIME + (1 - diffusion.MIN_TIME) * jitter
    masked = (uniform < diffusion.mask_probability(t)[..., None]) & counted[:, None]
    return t, masked


def counted_tokens(batch: Batch) -> Tensor:
    """Which tokens may be masked and count: neither padding nor prompt, bool [B, L] on the CPU."""
    return token_masks.counted_tokens(*batch).cpu()
