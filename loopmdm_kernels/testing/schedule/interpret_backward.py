"""Runs the table of the backward pass on the CPU: same tiles, buffers and counters, any legal interleaving.

Values are rounded where the kernel rounds them, that is where they become an operand of a product or a
record; sums, statistics and the stream are in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.reference.looped_blocks import NORM_EPS
from loopmdm_kernels.schedule.backward import PHASES, Backward
from loopmdm_kernels.schedule.sums import RowSums, WeightSums, finish
from loopmdm_kernels.schedule.table import Instruction, Table
from loopmdm_kernels.testing.schedule.machine import Machine
from loopmdm_kernels.testing.schedule.order import interleave
from loopmdm_kernels.types import BlockWeights, Rotary

WHOLE_ROWS = (Backward.NORM1, Backward.NORM2, Backward.TOP, Backward.MIDDLE, Backward.BOTTOM)


def interpret_backward(
    table: Table,
    grad: Tensor,
    loop_inputs: Tensor,
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
        loop_inputs: [S, B, L, D].
        loops: [B], those that each sequence has taken.

    Returns:
        (gradient of x, of the blocks, of the modulation).

    Raises:
        RuntimeError: no block can proceed.
    """
    machine = _Machine(table, grad, loop_inputs, blocks, modulation, loops, rotary, key_mask)
    interleave(table, len(loop_inputs), num_blocks, seed, machine.reached, machine.execute)
    return machine.grad, *finish(machine.rows, machine.weights, blocks, modulation)


class _Machine(Machine):
    """Buffers. What nothing has written is NaN; sums are zero."""

    def __init__(
        self,
        table: Table,
        grad: Tensor,
        loop_inputs: Tensor,
        blocks: Sequence[BlockWeights],
        modulation: Tensor,
        loops: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
    ) -> None:
        super().__init__(table, grad.dtype, blocks, modulation, rotary, key_mask)
        self.loop_inputs, self.loops, self.grad = loop_inputs, loops, grad.clone()
        shape = table.shape
        layers, batch, length, hidden = shape.layers, shape.batch, shape.length, shape.hidden
        self.values = {
            name: self.unwritten(layers, batch, length, width, dtype=dtype)
            for width, dtype, names in (
                (hidden, grad.dtype, ("middle", "state", "grad_rows")),
                (shape.heads, grad.dtype, ("log_sum_exp", "inner")),
                (hidden, self.dtype, ("rows1", "mixed", "branch1", "rows2", "branch2")),
                (hidden, self.dtype, ("grad_branch1", "grad_branch2", "grad_mixed")),
                (shape.mlp, self.dtype, ("mlp_in", "gelu", "grad_mlp_in")),
                (3 * hidden, self.dtype, ("qkv", "grad_qkv")),
            )
            for name in names
        }
        self.parts: int = table.tiles.rows // table.tiles.part  # of a row tile
        parts = table.row_tiles * self.parts
        self.rows = RowSums(
            grad.new_zeros(layers, 2, 2, batch, parts, hidden),
            grad.new_zeros(layers, 2, batch, parts, hidden),
            grad.new_zeros(layers, batch, parts, hidden),
            grad.new_zeros(layers, batch, table.row_tiles, shape.mlp),
        )
        self.weights = WeightSums(
            *(grad.new_zeros(layers, *getattr(blocks[0], name).shape) for name in WeightSums._fields)
        )

    def execute(self, step: int, item: Instruction) -> None:
        phase, tiles = Backward(item.phase), self.table.tiles
        loop = len(self.loop_inputs) - 1 - step
        columns = slice(item.column * tiles.columns, (item.column + 1) * tiles.columns)
        rows = self.rows_of(item)
        if phase.name.startswith("WEIGHT"):
            self._weight(phase, loop, item, rows, columns)
        elif loop < self.loops[item.sequence]:
            if phase in WHOLE_ROWS:
                first = rows.start + item.column * tiles.part
                rows = slice(first, first + tiles.part)
            if rows.start < self.table.shape.length:
                getattr(self, f"_{phase.name.lower()}")(loop, item, rows, columns)
        self.signal(item)

    def _of(self, name: str, item: Instruction) -> Tensor:
        """The buffer [L, width] of this layer and sequence."""
        return self.values[name][item.layer, item.sequence]

    def _state(self, loop: int, item: Instruction) -> Tensor:
        """The stream before the layer."""
        return self._of("state", item) if item.layer else self.loop_inputs[loop, item.sequence]

    def _weight(self, phase: Backward, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        left, right = (self.values[region.buffer][item.layer] for region in PHASES[phase].reads)
        taking_part = (self.loops > loop).nonzero().flatten()
        total = sum(self.product(left[b, :, rows].T, right[b, :, columns]) for b in taking_part)
        getattr(self.weights, phase.name.removeprefix("WEIGHT_").lower())[item.layer, rows, columns] += total

    # The loop again.

    def _norm(self, x: Tensor, item: Instruction, branch: int) -> Tensor:
        normalized = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        gain, shift = (self.vector(v, item.layer, item, branch) for v in (self.gain, self.shift))
        return (normalized * gain + shift).to(self.dtype)

    def _norm1(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._of("rows1", item)[rows] = self._norm(self._state(loop, item)[rows], item, 0)

    def _norm2(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        self._of("rows2", item)[rows] = self._norm(self._of("middle", item)[rows], item, 1)

    def _qkv(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        product = self.product(self._of("rows1", item)[rows], self.blocks[item.layer].qkv[columns].T)
        self._of("qkv", item)[rows, columns] = self.rotate(product, rows, columns).to(self.dtype)

    def _heads(self, item: Instruction) -> tuple[slice, Tensor, Tensor, Tensor]:
        shape = self.table.shape
        head = slice(item.column * shape.head_dim, (item.column + 1) * shape.head_dim)
        q, k, v = self._of("qkv", item).to(self.exact).view(shape.length, 3, -1)[..., head].unbind(1)
        return head, q, k, v

    def _attention(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        head, q, k, v = self._heads(item)
        scores = self.scores(q[rows], k, item)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = self.product(weights, v) / weights.sum(-1, keepdim=True)
        self._of("mixed", item)[rows, head] = mixed.to(self.dtype)
        self._of("log_sum_exp", item)[rows, item.column] = torch.logsumexp(scores, -1)

    def _attn_out(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        branch = self.product(self._of("mixed", item)[rows], self.blocks[item.layer].attn_out[columns].T)
        gate = self.vector(self.gate, item.layer, item, 0)[columns]
        self._of("branch1", item)[rows, columns] = branch.to(self.dtype)
        self._of("middle", item)[rows, columns] = self._state(loop, item)[rows, columns] + gate * branch

    def _mlp_in(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        weights = self.blocks[item.layer]
        before = self.product(self._of("rows2", item)[rows], weights.mlp_in[columns].T)
        before = before + weights.mlp_in_bias[columns].to(before.dtype)
        self._of("mlp_in", item)[rows, columns] = before.to(self.dtype)
        self._of("gelu", item)[rows, columns] = F.gelu(before, approximate="tanh").to(self.dtype)

    def _mlp_out(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        weights = self.blocks[item.layer]
        branch = self.product(self._of("gelu", item)[rows], weights.mlp_out[columns].T)
        branch = branch + weights.mlp_out_bias[columns].to(branch.dtype)
        self._of("branch2", item)[rows, columns] = branch.to(self.dtype)
        if item.layer + 1 < self.table.shape.layers:
            gate = self.vector(self.gate, item.layer, item, 1)[columns]
            after = self._of("middle", item)[rows, columns] + gate * branch
            self.values["state"][item.layer + 1, item.sequence, rows, columns] = after

    # Gradients.

    def _part(self, item: Instruction) -> int:
        return item.row * self.parts + item.column

    def _branch(self, item: Instruction, layer: int, branch: int, rows: slice) -> None:
        grad, number = self.grad[item.sequence, rows], branch + 1
        grad_gate = grad * self.values[f"branch{number}"][layer, item.sequence, rows]
        gate = self.vector(self.gate, layer, item, branch)
        self.values[f"grad_branch{number}"][layer, item.sequence, rows] = (grad * gate).to(self.dtype)
        self.rows.gates[layer, branch, item.sequence, self._part(item)] += grad_gate.sum(0)
        if branch:
            self.rows.grad_branch[layer, item.sequence, self._part(item)] += grad.sum(0)

    def _norm_backward(self, x: Tensor, item: Instruction, branch: int, rows: slice) -> None:
        grad, x = self.values["grad_rows"][0, item.sequence, rows], x[rows]
        scale = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + NORM_EPS)
        normalized = (x - x.mean(-1, keepdim=True)) * scale
        sums = self.rows.norms[item.layer, branch, :, item.sequence, self._part(item)]
        sums[0] += (grad * normalized).sum(0)
        sums[1] += grad.sum(0)
        inner = grad * self.vector(self.gain, item.layer, item, branch)
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

    def _grad_mlp_in(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self.product(self._of("grad_branch2", item)[rows], self.blocks[item.layer].mlp_out[:, columns])
        with torch.enable_grad():
            before = self._of("mlp_in", item)[rows, columns].to(grad.dtype).requires_grad_()
            (grad,) = torch.autograd.grad(F.gelu(before, approximate="tanh"), before, grad)
        self._of("grad_mlp_in", item)[rows, columns] = grad.to(self.dtype)
        self.rows.grad_mlp_in_bias[item.layer, item.sequence, item.row, columns] += grad.sum(0)

    def _grad_norm2(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self.product(self._of("grad_mlp_in", item)[rows], self.blocks[item.layer].mlp_in[:, columns])
        self.values["grad_rows"][0, item.sequence, rows, columns] = grad

    def _grad_norm1(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        grad = self.product(self._of("grad_qkv", item)[rows], self.blocks[item.layer].qkv[:, columns])
        self.values["grad_rows"][0, item.sequence, rows, columns] = grad

    def _grad_mixed(self, loop: int, item: Instruction, rows: slice, columns: slice) -> None:
        weight = self.blocks[item.layer].attn_out[:, columns]
        grad = self.product(self._of("grad_branch1", item)[rows], weight).to(self.dtype)
        self._of("grad_mixed", item)[rows, columns] = grad
        size = self.table.shape.head_dim
        inner = grad.to(self.exact) * self._of("mixed", item)[rows, columns]
        heads = slice(columns.start // size, columns.stop // size)
        self._of("inner", item)[rows, heads] = inner.view(len(inner), -1, size).sum(-1)

    def _attention_gradient(self, item: Instruction, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Probabilities and gradients of scores of a block of queries by one of keys."""
        head, q, k, v = self._heads(item)
        scores = self.scores(q[rows], k[keys], item, keys)
        weights = torch.exp(scores - self._of("log_sum_exp", item)[rows, item.column, None])
        grad_weights = self._of("grad_mixed", item)[rows, head].to(v.dtype) @ v[keys].T
        inner = self._of("inner", item)[rows, item.column, None]
        return weights, (weights * (grad_weights - inner)).to(self.dtype)

    def _grad_queries(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        head, _q, k, _v = self._heads(item)
        _weights, grad_scores = self._attention_gradient(item, rows, slice(None))
        grad = self.product(grad_scores, k) / math.sqrt(self.table.shape.head_dim)
        self._of("grad_qkv", item)[rows, head] = self.rotate(grad, rows, head, back=True).to(self.dtype)

    def _grad_keys(self, loop: int, item: Instruction, rows: slice, _: slice) -> None:
        hidden = self.table.shape.hidden
        head, q, _k, _v = self._heads(item)
        weights, grad_scores = self._attention_gradient(item, slice(None), rows)
        grad = self.product(grad_scores.T, q) / math.sqrt(self.table.shape.head_dim)
        grad = self.rotate(grad, rows, head, back=True)
        grad_values = self.product(weights.T, self._of("grad_mixed", item)[:, head])
        for offset, value in ((hidden, grad), (2 * hidden, grad_values)):
            span = slice(offset + head.start, offset + head.stop)
            self._of("grad_qkv", item)[rows, span] = value.to(self.dtype)
