"""Runs an instruction table on the CPU: same tiles, same buffers, same counters, any legal interleaving.

Values are rounded where the kernel rounds them, that is where they become an operand of a product; sums,
statistics and the stream are in the dtype of x.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.reference.attention import apply_rotary
from loopmdm_kernels.reference.looped_blocks import NORM_EPS
from loopmdm_kernels.schedule.table import (
    FINAL,
    BlockShape,
    Instruction,
    Phase,
    Table,
    qkv_slot,
    stream_slot,
)
from loopmdm_kernels.types import BlockWeights, Rotary


def interpret(
    table: Table,
    x: Tensor,
    blocks: Sequence[BlockWeights],
    modulation: Tensor,
    num_loops: int | Tensor,
    *,
    rotary: Rotary | None = None,
    key_mask: Tensor | None = None,
    exit_threshold: float | None = None,
    num_blocks: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The op `looped_blocks` by the table, run by `num_blocks` thread blocks in an order drawn from `seed`.

    Returns:
        (H(S) [B, L, D], loops of each sequence [B]).

    Raises:
        RuntimeError: no block can proceed.
    """
    machine = _Machine(table, x, blocks, modulation, num_loops, rotary, key_mask, exit_threshold)
    longest = int(machine.stop.max())
    generator = random.Random(seed)
    shares = [table.share(block, num_blocks, longest) for block in range(num_blocks)]
    current = [next(share, None) for share in shares]
    running = list(range(num_blocks))
    while running:
        generator.shuffle(running)
        proceeded = False
        for block in list(running):
            at = current[block]
            if at is None:
                running.remove(block)
                proceeded = True
            elif machine.ready(*at):
                machine.execute(*at)
                current[block] = next(shares[block], None)
                proceeded = True
        if not proceeded:
            raise RuntimeError(f"deadlock: blocks {sorted(running)} wait for counters that nobody will raise")
    return machine.out, machine.stop


def column_statistics(tile: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each row: [..., 2]."""
    mean = tile.mean(-1, keepdim=True)
    return torch.cat((mean, (tile - mean).square().sum(-1, keepdim=True)), dim=-1)


def merge_statistics(parts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation) of rows, from parts [rows, parts, 2] of `width` columns each."""
    means, deviations = parts.unbind(-1)
    mean = means.mean(-1, keepdim=True)
    total = deviations.sum(-1, keepdim=True) + width * (means - mean).square().sum(-1, keepdim=True)
    return mean, torch.rsqrt(total / (width * means.shape[-1]) + NORM_EPS)


class _Machine:
    """Buffers and counters. What nothing has written is NaN."""

    def __init__(
        self,
        table: Table,
        x: Tensor,
        blocks: Sequence[BlockWeights],
        modulation: Tensor,
        num_loops: int | Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
        exit_threshold: float | None,
    ) -> None:
        self.table, self.x, self.blocks = table, x, blocks
        self.rotary, self.key_mask, self.exit_threshold = rotary, key_mask, exit_threshold
        self.dtype = blocks[0].qkv.dtype
        shape = table.shape

        def unwritten(*sizes: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.full(sizes, math.nan, dtype=dtype)

        batch, length, hidden = shape.batch, shape.length, shape.hidden
        self.stream = unwritten(2, batch, length, hidden)
        self.qkv = unwritten(2, batch, length, 3 * hidden, dtype=self.dtype)
        self.mixed = unwritten(batch, length, hidden, dtype=self.dtype)
        self.wide = unwritten(batch, length, shape.mlp, dtype=self.dtype)
        self.partial = unwritten(table.tiles.mlp_out_parts, batch, length, hidden)
        self.statistics1 = unwritten(batch, length, hidden // table.tiles.mlp_out, 2)
        self.statistics2 = unwritten(batch, length, hidden // table.tiles.attn_out, 2)
        self.change = unwritten(batch, table.row_tiles, hidden // table.tiles.mlp_out, 2)
        self.out = unwritten(batch, length, hidden)
        self.stop = torch.as_tensor(num_loops).expand(batch).clone()
        self.counters = [0] * table.num_counters
        self.progress = [0 if table.adaptive else FINAL] * batch
        # Norm scale and modulation fold into one gain and one shift, in the stream's dtype.
        wide = modulation.to(x.dtype)
        scales = torch.stack([torch.stack((b.norm1, b.norm2)) for b in blocks]).to(x.dtype)[:, None]
        self.gain = scales * (1 + wide[:, :, [1, 4]])
        self.shift, self.gate = wide[:, :, [0, 3]], wide[:, :, [2, 5]]

    def ready(self, loop: int, item: Instruction) -> bool:
        progress = self.progress[item.sequence]
        if item.phase == Phase.LEAVE:
            if progress != FINAL:
                return False
            loop = int(self.stop[item.sequence])
        elif item.phase not in (Phase.ENTER, Phase.EXIT) and progress < loop + 1:
            return False
        if loop > self.stop[item.sequence] or (
            loop == self.stop[item.sequence] and item.phase != Phase.LEAVE
        ):
            return True  # nothing to do
        return all(
            self.counters[counter] >= item.wait_count * (loop + 1)
            for counter in range(item.wait, item.wait + item.wait_number)
        )

    def execute(self, loop: int, item: Instruction) -> None:
        phase = Phase(item.phase)
        if phase is Phase.LEAVE:
            loop = int(self.stop[item.sequence])
        elif phase is not Phase.ENTER and loop >= self.stop[item.sequence]:
            return
        rows = slice(item.row * self.table.tiles.rows, (item.row + 1) * self.table.tiles.rows)
        getattr(self, f"_{phase.name.lower()}")(loop, item, rows)
        if item.signal >= 0:
            self.counters[item.signal] += item.signal_count

    def _columns(self, item: Instruction, width: int) -> slice:
        return slice(item.column * width, (item.column + 1) * width)

    def _of(self, values: Tensor, item: Instruction, branch: int) -> Tensor:
        """The vector [D] of this layer and sequence."""
        return values[item.layer, item.sequence if values.shape[1] > 1 else 0, branch]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return left.to(self.dtype).to(self.x.dtype) @ right.to(self.x.dtype).T

    def _normalized(self, loop: int, item: Instruction, rows: slice, branch: int) -> Tensor:
        x = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows]
        parts = (self.statistics1, self.statistics2)[branch][item.sequence, rows]
        mean, scale = merge_statistics(parts, x.shape[-1] // parts.shape[1])
        return (x - mean) * scale * self._of(self.gain, item, branch) + self._of(self.shift, item, branch)

    def _update(
        self, loop: int, item: Instruction, rows: slice, width: int, branch: int, value: Tensor
    ) -> Tensor:
        columns = self._columns(item, width)
        old = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows, columns]
        new = old + self._of(self.gate, item, branch)[columns] * value
        self.stream[stream_slot(item.write_slot, loop), item.sequence, rows, columns] = new
        statistics = (self.statistics2, self.statistics1)[branch]
        statistics[item.sequence, rows, item.column] = column_statistics(new)
        return new

    def _enter(self, loop: int, item: Instruction, rows: slice) -> None:
        x = self.x[item.sequence, rows]
        self.stream[stream_slot(item.write_slot, loop), item.sequence, rows] = x
        tiles = x.view(len(x), -1, self.table.tiles.mlp_out)
        self.statistics1[item.sequence, rows] = column_statistics(tiles)

    def _qkv(self, loop: int, item: Instruction, rows: slice) -> None:
        shape, columns = self.table.shape, self._columns(item, self.table.tiles.qkv)
        product = self._product(self._normalized(loop, item, rows, 0), self.blocks[item.layer].qkv[columns])
        if self.rotary is not None:
            angles = Rotary(*(angle[rows] for angle in self.rotary))
            heads = product.view(len(product), -1, shape.head_dim).transpose(0, 1)
            rotated = max(0, min(len(heads), (2 * shape.hidden - columns.start) // shape.head_dim))
            heads = torch.cat((apply_rotary(heads[:rotated], angles), heads[rotated:]))
            product = heads.transpose(0, 1).flatten(1)
        self.qkv[qkv_slot(item.write_slot, loop, shape.layers), item.sequence, rows, columns] = product.to(
            self.dtype
        )

    def _attention(self, loop: int, item: Instruction, rows: slice) -> None:
        shape: BlockShape = self.table.shape
        heads = slice(item.column * self.table.tiles.heads, (item.column + 1) * self.table.tiles.heads)
        qkv = self.qkv[qkv_slot(item.read_slot, loop, shape.layers), item.sequence].to(self.x.dtype)
        q, k, v = qkv.view(shape.length, 3, shape.heads, shape.head_dim)[:, :, heads].permute(1, 2, 0, 3)
        scores = q[:, rows] @ k.transpose(1, 2) / math.sqrt(shape.head_dim)
        if self.key_mask is not None:
            scores = scores.masked_fill(~self.key_mask[item.sequence], -math.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = weights.to(self.dtype).to(self.x.dtype) @ v / weights.sum(-1, keepdim=True)
        width = self.table.tiles.heads * shape.head_dim
        columns = self._columns(item, width)
        self.mixed[item.sequence, rows, columns] = mixed.transpose(0, 1).flatten(1).to(self.dtype)

    def _attn_out(self, loop: int, item: Instruction, rows: slice) -> None:
        width = self.table.tiles.attn_out
        weight = self.blocks[item.layer].attn_out[self._columns(item, width)]
        branch = self._product(self.mixed[item.sequence, rows], weight)
        self._update(loop, item, rows, width, 0, branch)

    def _mlp_in(self, loop: int, item: Instruction, rows: slice) -> None:
        weights, columns = self.blocks[item.layer], self._columns(item, self.table.tiles.mlp_in)
        value = self._product(self._normalized(loop, item, rows, 1), weights.mlp_in[columns])
        value = F.gelu(value + weights.mlp_in_bias[columns].to(value.dtype), approximate="tanh")
        self.wide[item.sequence, rows, columns] = value.to(self.dtype)

    def _mlp_out(self, loop: int, item: Instruction, rows: slice) -> None:
        columns, parts = self._columns(item, self.table.tiles.mlp_out), self.table.tiles.mlp_out_parts
        width = self.table.shape.mlp // parts
        inner = slice(item.part * width, (item.part + 1) * width)
        weight = self.blocks[item.layer].mlp_out[columns, inner]
        product = self._product(self.wide[item.sequence, rows, inner], weight)
        if parts > 1:
            self.partial[item.part, item.sequence, rows, columns] = product
        else:
            self._finish_mlp(loop, item, rows, product)

    def _mlp_sum(self, loop: int, item: Instruction, rows: slice) -> None:
        columns = self._columns(item, self.table.tiles.mlp_out)
        self._finish_mlp(loop, item, rows, self.partial[:, item.sequence, rows, columns].sum(0))

    def _finish_mlp(self, loop: int, item: Instruction, rows: slice, product: Tensor) -> None:
        weights, width = self.blocks[item.layer], self.table.tiles.mlp_out
        columns = self._columns(item, width)
        branch = product + weights.mlp_out_bias[columns].to(product.dtype)
        new = self._update(loop, item, rows, width, 1, branch)
        if self.table.adaptive and item.layer == self.table.shape.layers - 1:
            old = self.stream[stream_slot(0, loop), item.sequence, rows, columns]
            self.change[item.sequence, item.row, item.column, 0] = (new - old).square().sum()
            self.change[item.sequence, item.row, item.column, 1] = new.square().sum()

    def _exit(self, loop: int, item: Instruction, rows: slice) -> None:
        sequence, going = item.sequence, loop + 1 < int(self.stop[item.sequence])
        if loop > 0 and self.exit_threshold is not None:
            change, size = self.change[sequence].sum((0, 1)).sqrt()
            if change / size < self.exit_threshold:
                self.stop[sequence], going = loop, False
        self.progress[sequence] = loop + 1 if going else FINAL

    def _leave(self, loop: int, item: Instruction, rows: slice) -> None:
        self.out[item.sequence, rows] = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows]
