"""Runs an instruction table on the CPU: same tiles, same buffers, same counters, any legal interleaving.

Values are rounded where the kernel rounds them, that is where they become an operand of a product; sums,
statistics and the stream are in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.reference.looped_blocks import NORM_EPS
from loopmdm_kernels.schedule.forward import Forward
from loopmdm_kernels.schedule.table import FINAL, Instruction, Table, qkv_slot, stream_slot
from loopmdm_kernels.testing.schedule.machine import Machine
from loopmdm_kernels.testing.schedule.order import interleave
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
    interleave(table, int(machine.stop.max()), num_blocks, seed, machine.ready, machine.execute)
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


class _Machine(Machine):
    """Buffers. What nothing has written is NaN."""

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
        super().__init__(table, x.dtype, blocks, modulation, rotary, key_mask)
        self.x, self.exit_threshold = x, exit_threshold
        shape, tiles = table.shape, table.tiles
        batch, length, hidden = shape.batch, shape.length, shape.hidden
        self.stream = self.unwritten(2, batch, length, hidden)
        self.qkv = self.unwritten(2, batch, length, 3 * hidden, dtype=self.dtype)
        self.mixed = self.unwritten(batch, length, hidden, dtype=self.dtype)
        self.gelu = self.unwritten(batch, length, shape.mlp, dtype=self.dtype)
        self.rows = self.unwritten(batch, length, hidden, dtype=self.dtype)
        self.partial = self.unwritten(tiles.mlp_out_tiles, batch, length, hidden)
        self.statistics1 = self.unwritten(batch, length, hidden // tiles.mlp_out, 2)
        self.statistics2 = self.unwritten(batch, length, hidden // tiles.attn_out, 2)
        changes = tiles.rows // tiles.sum_rows if tiles.sum_rows else hidden // tiles.mlp_out
        self.change = self.unwritten(batch, table.row_tiles, changes, 2)
        self.out = self.unwritten(batch, length, hidden)
        self.stop = torch.as_tensor(num_loops).expand(batch).clone()
        self.progress = [0 if table.adaptive else FINAL] * batch

    def ready(self, loop: int, item: Instruction) -> bool:
        progress = self.progress[item.sequence]
        if item.phase == Forward.LEAVE:
            if progress != FINAL:
                return False
            loop = int(self.stop[item.sequence])
        elif item.phase not in (Forward.ENTER, Forward.EXIT) and progress < loop + 1:
            return False
        stop = self.stop[item.sequence]
        nothing_to_do = loop > stop or (loop == stop and item.phase != Forward.LEAVE)
        return bool(nothing_to_do) or self.reached(loop, item)

    def execute(self, loop: int, item: Instruction) -> None:
        phase = Forward(item.phase)
        if phase is Forward.LEAVE:
            loop = int(self.stop[item.sequence])
        elif phase is not Forward.ENTER and loop >= self.stop[item.sequence]:
            return
        getattr(self, f"_{phase.name.lower()}")(loop, item, self.rows_of(item))
        self.signal(item)

    def _columns(self, item: Instruction, width: int) -> slice:
        return slice(item.column * width, (item.column + 1) * width)

    def _normalized(self, loop: int, item: Instruction, rows: slice, branch: int) -> Tensor:
        x = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows]
        parts = (self.statistics1, self.statistics2)[branch][item.sequence, rows]
        mean, scale = merge_statistics(parts, x.shape[-1] // parts.shape[1])
        gain, shift = (self.vector(values, item.layer, item, branch) for values in (self.gain, self.shift))
        return (x - mean) * scale * gain + shift

    def _update(
        self, loop: int, item: Instruction, rows: slice, width: int, branch: int, value: Tensor
    ) -> Tensor:
        columns = self._columns(item, width)
        old = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows, columns]
        new = old + self.vector(self.gate, item.layer, item, branch)[columns] * value
        self.stream[stream_slot(item.write_slot, loop), item.sequence, rows, columns] = new
        statistics = (self.statistics2, self.statistics1)[branch]
        statistics[item.sequence, rows, item.column] = column_statistics(new)
        return new

    def _enter(self, loop: int, item: Instruction, rows: slice) -> None:
        x = self.x[item.sequence, rows]
        self.stream[stream_slot(item.write_slot, loop), item.sequence, rows] = x
        tiles = x.view(len(x), -1, self.table.tiles.mlp_out)
        self.statistics1[item.sequence, rows] = column_statistics(tiles)
        if self.table.tiles.sum_rows:
            self._normalize_whole(x, item, item.layer, rows)

    def _norm1(self, loop: int, item: Instruction, rows: slice) -> None:
        self._norm(loop, item, rows, 0)

    def _norm2(self, loop: int, item: Instruction, rows: slice) -> None:
        self._norm(loop, item, rows, 1)

    def _together(self, item: Instruction, rows: slice, number: int) -> slice:
        first = rows.start + item.column * number
        return slice(first, min(first + number, self.table.shape.length))

    def _norm(self, loop: int, item: Instruction, rows: slice, branch: int) -> None:
        own = self._together(item, rows, self.table.tiles.part)
        self.rows[item.sequence, own] = self._normalized(loop, item, own, branch).to(self.dtype)

    def _left(self, loop: int, item: Instruction, rows: slice, branch: int) -> Tensor:
        """Operand of a product that has a norm before it."""
        if self.table.tiles.part or (branch == 0 and self.table.tiles.normalised):
            return self.rows[item.sequence, rows]
        return self._normalized(loop, item, rows, branch)

    def _qkv(self, loop: int, item: Instruction, rows: slice) -> None:
        columns = self._columns(item, self.table.tiles.qkv)
        weight = self.blocks[item.layer].qkv[columns]
        product = self.rotate(self.product(self._left(loop, item, rows, 0), weight.T), rows, columns)
        slot = qkv_slot(item.write_slot, loop, self.table.shape.layers)
        self.qkv[slot, item.sequence, rows, columns] = product.to(self.dtype)

    def _attention(self, loop: int, item: Instruction, rows: slice) -> None:
        shape = self.table.shape
        heads = self._columns(item, self.table.tiles.heads)
        qkv = self.qkv[qkv_slot(item.read_slot, loop, shape.layers), item.sequence].to(self.exact)
        q, k, v = qkv.view(shape.length, 3, shape.heads, shape.head_dim)[:, :, heads].permute(1, 2, 0, 3)
        scores = self.scores(q[:, rows], k, item)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = self.product(weights, v) / weights.sum(-1, keepdim=True)
        columns = self._columns(item, self.table.tiles.heads * shape.head_dim)
        self.mixed[item.sequence, rows, columns] = mixed.transpose(0, 1).flatten(1).to(self.dtype)

    def _attn_out(self, loop: int, item: Instruction, rows: slice) -> None:
        width = self.table.tiles.attn_out
        weight = self.blocks[item.layer].attn_out[self._columns(item, width)]
        branch = self.product(self.mixed[item.sequence, rows], weight.T)
        self._update(loop, item, rows, width, 0, branch)

    def _mlp_in(self, loop: int, item: Instruction, rows: slice) -> None:
        weights, columns = self.blocks[item.layer], self._columns(item, self.table.tiles.mlp_in)
        value = self.product(self._left(loop, item, rows, 1), weights.mlp_in[columns].T)
        value = F.gelu(value + weights.mlp_in_bias[columns].to(value.dtype), approximate="tanh")
        self.gelu[item.sequence, rows, columns] = value.to(self.dtype)

    def _mlp_out(self, loop: int, item: Instruction, rows: slice) -> None:
        columns, parts = self._columns(item, self.table.tiles.mlp_out), self.table.tiles.mlp_out_tiles
        width = self.table.shape.mlp // parts
        inner = slice(item.part * width, (item.part + 1) * width)
        weight = self.blocks[item.layer].mlp_out[columns, inner]
        product = self.product(self.gelu[item.sequence, rows, inner], weight.T)
        if self.table.tiles.sum_rows:
            self.partial[item.part, item.sequence, rows, columns] = product
        else:
            self._finish_mlp(loop, item, rows, product)

    def _finish_mlp(self, loop: int, item: Instruction, rows: slice, product: Tensor) -> None:
        weights, width = self.blocks[item.layer], self.table.tiles.mlp_out
        columns = self._columns(item, width)
        branch = product + weights.mlp_out_bias[columns].to(product.dtype)
        self._changed(loop, item, rows, columns, self._update(loop, item, rows, width, 1, branch))

    def _mlp_sum(self, loop: int, item: Instruction, rows: slice) -> None:
        rows = self._together(item, rows, self.table.tiles.sum_rows)
        sums = self.partial[:, item.sequence, rows].sum(0)
        branch = sums + self.blocks[item.layer].mlp_out_bias.to(sums.dtype)
        stream = self.stream[stream_slot(item.read_slot, loop), item.sequence, rows]
        new = stream + self.vector(self.gate, item.layer, item, 1) * branch
        self.stream[stream_slot(item.write_slot, loop), item.sequence, rows] = new
        self._normalize_whole(new, item, (item.layer + 1) % self.table.shape.layers, rows)
        self._changed(loop, item, rows, slice(None), new)

    def _normalize_whole(self, x: Tensor, item: Instruction, layer: int, rows: slice) -> None:
        """Rows for the product that a layer begins with."""
        gain, shift = (self.vector(values, layer, item, 0) for values in (self.gain, self.shift))
        mean, scale = merge_statistics(column_statistics(x)[:, None], x.shape[-1])
        self.rows[item.sequence, rows] = ((x - mean) * scale * gain + shift).to(self.dtype)

    def _changed(self, loop: int, item: Instruction, rows: slice, columns: slice, new: Tensor) -> None:
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
