"""The positions to fill: where they are, what block they belong to, and which are still masked."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.philox import REVEAL_STREAM, uniform53


class Slots:
    """The N positions to fill, ordered by sequence, then by position, and their state. All on the CPU.

    A slot is masked until it is revealed, and again after it is masked again. It is closed when its sequence
    ended before it: the network still sees a mask there, but nothing will be revealed.
    """

    def __init__(
        self,
        canvas: Tensor,
        mask_token_id: int,
        sequence_ids: Tensor,
        block_length: int | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """canvas: [B, L], the mask at the positions to fill; sequence_ids, lengths: [B], None: all L."""
        masked = canvas == mask_token_id
        self.sequence, self.position = masked.nonzero(as_tuple=True)  # [N] row of the batch, position
        self.sequence_id = sequence_ids[self.sequence]  # [N] names the random numbers
        self.counts = masked.sum(dim=1)  # [B] slots of each sequence
        width = masked.shape[1]
        self.lengths = torch.full_like(self.counts, width) if lengths is None else lengths  # [B]
        self.masked = torch.ones_like(self.sequence, dtype=torch.bool)
        self.closed = torch.zeros_like(self.masked)
        self.first = self.counts.cumsum(0) - self.counts  # [B] first slot of each, or where it would be
        self.blocks = Blocks(self, block_length)

    @property
    def num_sequences(self) -> int:
        return self.counts.numel()

    def open(self) -> Tensor:
        """Slots that may still be revealed, ascending."""
        return (self.masked & ~self.closed).nonzero().squeeze(1)

    def masked_share(self) -> Tensor:
        """Masked slots of each sequence over all of them, float64 [B]; 0 without slots."""
        left = self.sequence[self.masked].bincount(minlength=self.num_sequences)
        return left.double() / self.counts.clamp_min(1)

    def close_after(self, sequence: Tensor, position: Tensor) -> None:
        """End sequences [R] at positions [R]: what lies behind is closed."""
        end = self.lengths.clone()
        end.scatter_reduce_(0, sequence, position, "amin")
        self.closed |= self.position > end[self.sequence]

    def uniforms(self, seed: int, word: int = 0, step: int = 0) -> Tensor:
        """One uniform number in [0, 1) for each slot, float64 [N], named by (seed, sequence id, position)."""
        stream = torch.full_like(self.position, REVEAL_STREAM | step)
        return uniform53(seed, torch.full_like(stream, word), self.position, stream, self.sequence_id)


class Blocks:
    """Runs of `length` positions that are filled one after the other; those without a slot are left out.

    They are counted from a sequence's first slot, so that a prompt takes none. Without a length every
    sequence is one block. Blocks are numbered over the whole batch.
    """

    def __init__(self, slots: Slots, length: int | None) -> None:
        sequence, position = slots.sequence, slots.position
        if length is None:
            raw = torch.zeros_like(position)
        else:
            raw = (position - position[slots.first[sequence]]) // length
        new = torch.ones_like(slots.masked)
        new[1:] = (raw[1:] != raw[:-1]) | (sequence[1:] != sequence[:-1])
        self.of_slot = new.cumsum(0) - 1  # [N]
        heads = new.nonzero().squeeze(1)  # first slot of each block
        self.sizes = self.of_slot.bincount(minlength=heads.numel())  # [G] slots of each block
        self.sequence = sequence[heads]  # [G]
        self.count = self.sequence.bincount(minlength=slots.num_sequences)  # [B] blocks of each sequence
        self.first = self.count.cumsum(0) - self.count  # [B] each sequence's first block
        self.index = torch.arange(heads.numel()) - self.first[self.sequence]  # [G] within the sequence
        self.before = heads - slots.first[self.sequence]  # [G] slots of the sequence in earlier blocks
        self.end = slots.lengths[self.sequence]  # [G] first position behind the block
        if length is not None:
            start = position[slots.first[self.sequence]]
            self.end = torch.minimum(start + (raw[heads] + 1) * length, self.end)
        self._heads = heads

    def rank(self, key: Tensor | None = None) -> Tensor:
        """Place of each slot among those of its block, [N]: by ascending key [N], then from the left."""
        if key is None:
            return torch.arange(self.of_slot.numel()) - self._heads[self.of_slot]
        order = key.argsort(stable=True)
        order = order[self.of_slot[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel()) - self._heads[self.of_slot[order]]
        return rank
