"""Runs the table of the backward pass on the CPU: same tiles, buffers and counters, any legal interleaving.

Values are rounded where the kernel rounds them, that is where they become an operand of a product or a
record; sums, statistics and the stream are in the dtype of x.
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
from loopmdm_kernels.schedule.backward.accesses import OPERANDS
from loopmdm_kernels.schedule.backward.sums import RowSums, WeightSums, finish
from loopmdm_kernels.schedule.backward.table import ROW_PHASES, WEIGHT_PHASES, BackwardTable, P
from loopmdm_kernels.schedule.table import Instruction
from loopmdm_kernels.types import BlockWeights, Rotary


def interpret_backward(
    table: BackwardTable,
    grad: Tensor,
    tape: Tensor,
    blocks: Sequence[BlockWeights],
    modulation: Tensor,
    loops: Tensor,
    *,
    rotary: Rotary | None = None,
    key_mask: Tensor | None = None,
    num_blocks: int = 1,
    seed: int = 0,
) -> tuple[Tensor, list[BlockWeights], Tensor]:
    """Gradients of `looped_blocks` by the table, run by `num_blocks` blocks in an order drawn from `seed`.

    Args:
        grad: [B, L, D], gradient of H(S).
        tape: [S, B, L, D], the inputs of the loops.
        loops: [B], those that each sequence has taken.

    Returns:
        (gradient of x, of the blocks, of the modulation).

    Raises:
        RuntimeError: no block can proceed.
    """
    machine = _Machine(table, grad, tape, blocks, modulation, loops, rotary, key_mask)
    generator = random.Random(seed)
    place = list(range(num_blocks))
    running = list(range(num_blocks))
    while running:
        generator.shuffle(running)
        proceeded = False
        for block in list(running):
            step, item = table.position(place[block], len(tape))
            if item is None:
                running.remove(block)
                proceeded = True
            elif machine.ready(step, item):
                machine.execute(len(tape) - 1 - step, item)
                place[block] += num_blocks
                proceeded = True
        if not proceeded:
            raise RuntimeError(f"deadlock: blocks {sorted(running)} wait for counters that nobody will raise")
    return machine.grad, *finish(machine.rows, machine.weights, blocks, modulation)


class _Machine:
    """Buffers and counters. What nothing has written is NaN; sums are zero."""

    def __init__(
        self,
        table: BackwardTable,
        grad: Tensor,
        tape: Tensor,
        blocks: Sequence[BlockWeights],
        modulation: Tensor,
        loops: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
    ) -> None:
        self.table, self.tape, self.blocks, self.loops = table, tape, blocks, loops
        self.rotary, self.key_mask = rotary, key_mask
        self.dtype, self.grad = blocks[0].qkv.dtype, grad.clone()
        shape, wide_dtype = table.shape, grad.dtype
        layers, batch, length, hidden = shape.layers, shape.batch, shape.length, shape.hidden

        def unwritten(width: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.full((layers, batch, length, width), math.nan, dtype=dtype)

        self.values = {
            "middle": unwritten(hidden, wide_dtype),
            "state": unwritten(hidden, wide_dtype),
            "of_rows": unwritten(hidden, wide_dtype),
            "top": unwritten(shape.heads, wide_dtype),
            "inner": unwritten(shape.heads, wide_dtype),
        }
        for name in ("rows1", "mixed", "branch1", "rows2", "branch2", "of_branch1", "of_branch2", "of_mixed"):
            self.values[name] = unwritten(hidden)
        for name in ("before", "wide", "of_before"):
            self.values[name] = unwritten(shape.mlp)
        for name in ("qkv", "of_qkv"):
            self.values[name] = unwritten(3 * hidden)
        parts = table.row_tiles * table.parts
        self.rows = RowSums(
            torch.zeros(layers, 2, 2, batch, parts, hidden, dtype=wide_dtype),
            torch.zeros(layers, 2, batch, parts, hidden, dtype=wide_dtype),
            torch.zeros(layers, batch, parts, hidden, dtype=wide_dtype),
            torch.zeros(layers, batch, table.row_tiles, shape.mlp, dtype=wide_dtype),
        )
        self.weights = WeightSums(
            *(
                torch.zeros(layers, *getattr(blocks[0], name).shape, dtype=wide_dtype)
                for name in WeightSums._fields
            )
        )
        self.counters = table.initial_counters()
        wide = modulation.to(wide_dtype)
        scales = torch.stack([torch.stack((b.norm1, b.norm2)) for b in blocks]).to(wide_dtype)[:, None]
        self.gain = scales * (1 + wide[:, :, [1, 4]])
        self.shift, self.gate = wide[:, :, [0, 3]], wide[:, :, [2, 5]]

    def ready(self, step: int, item: Instruction) -> bool:
        return all(
            self.counters[counter] >= item.wait_count * (step + 1)
            for counter in range(item.wait, item.wait + item.wait_number)
        )

    def execute(self, loop: int, item: Instruction) -> None:
        phase, tiles = P(item.phase), self.table.tiles
        columns = slice(item.column * tiles.columns, (item.column + 1) * tiles.columns)
        if phase in WEIGHT_PHASES:
            self._weight(phase, loop, item, columns)
        elif loop < self.loops[item.sequence]:
            rows = slice(item.row * tiles.rows, (item.row + 1) * tiles.rows)
            if phase in ROW_PHASES:
                first = rows.start + item.column * tiles.part
                rows = slice(first, first + tiles.part)
            if rows.start < self.table.shape.length:
                getattr(self, f"_{phase.name.lower()}")(loop, item, rows, columns)
        self.counters[item.signal] += item.signal_count

    def _of(self, name: str, item: Instruction) -> Tensor:
        """The buffer [L, width] of this layer and sequence."""
        return self.values[name][item.layer, item.sequence]

    def _vector(self, vectors: Tensor, layer: int, item: Instruction, branch: int) -> Tensor:
        return vectors[layer, item.sequence if vectors.shape[1] > 1 else 0, branch]

    def _state(self, loop: int, item: Instruction) -> Tensor:
        """The stream before the layer."""
        return self._of("state", item) if item.layer else self.tape[loop, item.sequence]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        wide = self.grad.dtype
        return left.to(wide) @ right.to(wide)

    def _weight(self, phase: P, loop: int, item: Instruction, columns: slice) -> None:
        left, right = (self.values[name][item.layer] for name in OPERANDS[phase])
        rows = slice(item.row * self.table.tiles.rows, (item.row + 1) * self.table.tiles.rows)
        taking_part = (self.loops > loop).nonzero().flatten()
        total = sum(self._product(left[b, :, rows].T, right[b, :, columns]) for b in taking_part)
        getattr(self.weights, phase.name.removeprefix("WEIGHT_").lower())[item.layer, rows, columns] += total

    # The loop again.

    def _norm(self, x: Tensor, item: Instruction, branch: int) -> Tensor:
        normalized = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        gain, shift = (self._vector(v, item.layer, item, branch) for v in (self.gain, self.shift))
        return (normalized * gain + shift).to(self.dtype)

    def _norm1(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._of("rows1", item)[rows] = self._norm(self._state(loop, item)[rows], item, 0)

    def _norm2(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._of("rows2", item)[rows] = self._norm(self._of("middle", item)[rows], item, 1)

    def _rotate(self, product: Tensor, rows: slice, columns: slice, *, back: bool = False) -> Tensor:
        """Heads of q and k among the columns of q, k and v."""
        if self.rotary is None:
            return product
        shape = self.table.shape
        cos, sin = (angle[rows] for angle in self.rotary)
        heads = product.view(len(product), -1, shape.head_dim).transpose(0, 1)
        rotated = max(0, min(len(heads), (2 * shape.hidden - columns.start) // shape.head_dim))
        turned = apply_rotary(heads[:rotated], Rotary(cos, -sin if back else sin))
        return torch.cat((turned, heads[rotated:])).transpose(0, 1).flatten(1)

    def _qkv(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        product = self._product(self._of("rows1", item)[rows], self.blocks[item.layer].qkv[columns].T)
        self._of("qkv", item)[rows, columns] = self._rotate(product, rows, columns).to(self.dtype)

    def _heads(self, item: Instruction) -> tuple[slice, Tensor, Tensor, Tensor]:
        shape = self.table.shape
        head = slice(item.column * shape.head_dim, (item.column + 1) * shape.head_dim)
        q, k, v = self._of("qkv", item).to(self.grad.dtype).view(shape.length, 3, -1)[..., head].unbind(1)
        return head, q, k, v

    def _scores(self, q: Tensor, k: Tensor, item: Instruction, keys: slice) -> Tensor:
        scores = q @ k[keys].T / math.sqrt(self.table.shape.head_dim)
        if self.key_mask is not None:
            scores = scores.masked_fill(~self.key_mask[item.sequence, keys], -math.inf)
        return scores

    def _attention(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        head, q, k, v = self._heads(item)
        scores = self._scores(q[rows], k, item, slice(None))
        top = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = self._product(weights.to(self.dtype), v) / weights.sum(-1, keepdim=True)
        self._of("mixed", item)[rows, head] = mixed.to(self.dtype)
        self._of("top", item)[rows, item.column] = top

    def _attn_out(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        branch = self._product(self._of("mixed", item)[rows], self.blocks[item.layer].attn_out[columns].T)
        gate = self._vector(self.gate, item.layer, item, 0)[columns]
        self._of("branch1", item)[rows, columns] = branch.to(self.dtype)
        self._of("middle", item)[rows, columns] = self._state(loop, item)[rows, columns] + gate * branch

    def _mlp_in(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        weights = self.blocks[item.layer]
        before = self._product(self._of("rows2", item)[rows], weights.mlp_in[columns].T)
        before = before + weights.mlp_in_bias[columns].to(before.dtype)
        self._of("before", item)[rows, columns] = before.to(self.dtype)
        self._of("wide", item)[rows, columns] = F.gelu(before, approximate="tanh").to(self.dtype)

    def _mlp_out(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        weights = self.blocks[item.layer]
        branch = self._product(self._of("wide", item)[rows], weights.mlp_out[columns].T)
        branch = branch + weights.mlp_out_bias[columns].to(branch.dtype)
        self._of("branch2", item)[rows, columns] = branch.to(self.dtype)
        if item.layer + 1 < self.table.shape.layers:
            gate = self._vector(self.gate, item.layer, item, 1)[columns]
            after = self._of("middle", item)[rows, columns] + gate * branch
            self.values["state"][item.layer + 1, item.sequence, rows, columns] = after

    # Gradients.

    def _part(self, item: Instruction) -> int:
        return item.row * self.table.parts + item.column

    def _branch(self, item: Instruction, layer: int, branch: int, rows: slice) -> None:
        grad, number = self.grad[item.sequence, rows], branch + 1
        of_gate = grad * self.values[f"branch{number}"][layer, item.sequence, rows]
        gate = self._vector(self.gate, layer, item, branch)
        self.values[f"of_branch{number}"][layer, item.sequence, rows] = (grad * gate).to(self.dtype)
        self.rows.gates[layer, branch, item.sequence, self._part(item)] += of_gate.sum(0)
        if branch:
            self.rows.of_branch[layer, item.sequence, self._part(item)] += grad.sum(0)

    def _norm_backward(self, x: Tensor, item: Instruction, branch: int, rows: slice) -> None:
        grad, x = self.values["of_rows"][0, item.sequence, rows], x[rows]
        scale = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + NORM_EPS)
        normalized = (x - x.mean(-1, keepdim=True)) * scale
        sums = self.rows.norms[item.layer, branch, :, item.sequence, self._part(item)]
        sums[0] += (grad * normalized).sum(0)
        sums[1] += grad.sum(0)
        inner = grad * self._vector(self.gain, item.layer, item, branch)
        inner = (
            inner - inner.mean(-1, keepdim=True) - normalized * (inner * normalized).mean(-1, keepdim=True)
        )
        self.grad[item.sequence, rows] += inner * scale

    def _top(self, _: int, item: Instruction, rows: slice, columns: slice) -> None:
        self._branch(item, item.layer, 1, rows)

    def _middle(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._norm_backward(self._of("middle", item), item, 1, rows)
        self._branch(item, item.layer, 0, rows)

    def _bottom(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._norm_backward(self._state(loop, item), item, 0, rows)
        if item.layer:
            self._branch(item, item.layer - 1, 1, rows)

    def _grad_wide(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self._product(self._of("of_branch2", item)[rows], self.blocks[item.layer].mlp_out[:, columns])
        with torch.enable_grad():
            before = self._of("before", item)[rows, columns].to(grad.dtype).requires_grad_()
            (grad,) = torch.autograd.grad(F.gelu(before, approximate="tanh"), before, grad)
        self._of("of_before", item)[rows, columns] = grad.to(self.dtype)
        self.rows.wide_bias[item.layer, item.sequence, item.row, columns] += grad.sum(0)

    def _grad_norm2(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self._product(self._of("of_before", item)[rows], self.blocks[item.layer].mlp_in[:, columns])
        self.values["of_rows"][0, item.sequence, rows, columns] = grad

    def _grad_norm1(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self._product(self._of("of_qkv", item)[rows], self.blocks[item.layer].qkv[:, columns])
        self.values["of_rows"][0, item.sequence, rows, columns] = grad

    def _grad_mixed(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self._product(self._of("of_branch1", item)[rows], self.blocks[item.layer].attn_out[:, columns])
        grad = grad.to(self.dtype)
        self._of("of_mixed", item)[rows, columns] = grad
        size = self.table.shape.head_dim
        inner = grad.to(self.grad.dtype) * self._of("mixed", item)[rows, columns]
        heads = slice(columns.start // size, columns.stop // size)
        self._of("inner", item)[rows, heads] = inner.view(len(inner), -1, size).sum(-1)

    def _attention_gradient(self, item: Instruction, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Probabilities and gradients of scores of a block of queries by one of keys."""
        head, q, k, v = self._heads(item)
        scores = self._scores(q[rows], k, item, keys)
        weights = torch.exp(scores - self._of("top", item)[rows, item.column, None])
        of_weights = self._of("of_mixed", item)[rows, head].to(v.dtype) @ v[keys].T
        inner = self._of("inner", item)[rows, item.column, None]
        return weights, (weights * (of_weights - inner)).to(self.dtype)

    def _grad_queries(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        head, _q, k, _v = self._heads(item)
        _weights, of_scores = self._attention_gradient(item, rows, slice(None))
        grad = self._product(of_scores, k) / math.sqrt(self.table.shape.head_dim)
        self._of("of_qkv", item)[rows, head] = self._rotate(grad, rows, head, back=True).to(self.dtype)

    def _grad_keys(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        hidden = self.table.shape.hidden
        head, q, _k, _v = self._heads(item)
        weights, of_scores = self._attention_gradient(item, slice(None), rows)
        grad = self._product(of_scores.T, q) / math.sqrt(self.table.shape.head_dim)
        grad = self._rotate(grad, rows, head, back=True)
        of_values = self._product(weights.to(self.dtype).T, self._of("of_mixed", item)[:, head])
        for offset, value in ((hidden, grad), (2 * hidden, of_values)):
            span = slice(offset + head.start, offset + head.stop)
            self._of("of_qkv", item)[rows, span] = value.to(self.dtype)
