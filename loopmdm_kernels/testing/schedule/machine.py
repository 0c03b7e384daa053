"""What the interpreters of both passes have in common: counters, folded modulation, rounding, rotary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loopmdm_kernels.reference.attention import apply_rotary
from loopmdm_kernels.schedule.table import Instruction, Table
from loopmdm_kernels.types import BlockWeights, Rotary


class Machine:
    """Counters and vectors. Operands are rounded to `dtype`, sums are in that of x, `exact`."""

    def __init__(
        self,
        table: Table,
        exact: torch.dtype,
        blocks: Sequence[BlockWeights],
        modulation: Tensor,
        rotary: Rotary | None,
        key_mask: Tensor | None,
    ) -> None:
        self.table, self.blocks, self.rotary, self.key_mask = table, blocks, rotary, key_mask
        self.exact, self.dtype = exact, blocks[0].qkv.dtype
        self.counters = table.initial_counters()
        # Norm scale and modulation fold into one gain and one shift, in the stream's dtype.
        vectors = modulation.to(exact)
        scales = torch.stack([torch.stack((b.norm1, b.norm2)) for b in blocks]).to(exact)[:, None]
        self.gain = scales * (1 + vectors[:, :, [1, 4]])
        self.shift, self.gate = vectors[:, :, [0, 3]], vectors[:, :, [2, 5]]

    def unwritten(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(sizes, math.nan, dtype=dtype or self.exact)

    def reached(self, loop: int, item: Instruction) -> bool:
        """Whether the counters it waits for are where they are to be."""
        return all(
            self.counters[counter] >= item.wait_count * (loop + 1)
            for counter in range(item.wait, item.wait + item.wait_number)
        )

    def signal(self, item: Instruction) -> None:
        if item.signal >= 0:
            self.counters[item.signal] += item.signal_count

    def rows_of(self, item: Instruction) -> slice:
        rows = self.table.tiles.rows
        return slice(item.row * rows, (item.row + 1) * rows)

    def vector(self, values: Tensor, layer: int, item: Instruction, branch: int) -> Tensor:
        """The vector [D] of a layer and the instruction's sequence."""
        return values[layer, item.sequence if values.shape[1] > 1 else 0, branch]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left.to(self.dtype).to(self.exact) @ right.to(self.exact)

    def rotate(self, product: Tensor, rows: slice, columns: slice, *, back: bool = False) -> Tensor:
        """Heads of q and k among the columns of q, k and v."""
        if self.rotary is None:
            return product
        shape = self.table.shape
        cos, sin = (angle[rows] for angle in self.rotary)
        heads = product.view(len(product), -1, shape.head_dim).transpose(0, 1)
        rotated = max(0, min(len(heads), (2 * shape.hidden - columns.start) // shape.head_dim))
        turned = apply_rotary(heads[:rotated], Rotary(cos, -sin if back else sin))
        return torch.cat((turned, heads[rotated:])).transpose(0, 1).flatten(1)

    def scores(self, q: Tensor, k: Tensor, item: Instruction, keys: slice = slice(None)) -> Tensor:
        """Of rows of queries by the keys `k`, which are these of the sequence."""
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.table.shape.head_dim)
        if self.key_mask is not None:
            scores = scores.masked_fill(~self.key_mask[item.sequence, keys], -math.inf)
        return scores
