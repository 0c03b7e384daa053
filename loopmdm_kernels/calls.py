"""A call of an op as one value: its arguments, checked by the op, and what follows from them.

`arguments` lists a call as its operator in the `loopmdm` library takes it, and `of` makes the call from that
list. `leaves` are the tensors that may have gradients, in the order in which kernels return these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.types import (
    FP8,
    BlockWeights,
    Fp8BlockWeights,
    Fp8Head,
    Fp8Weight,
    Head,
    Rotary,
    RowRng,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_TENSOR = object()  # in the place of a tensor that was taken out


@dataclass(frozen=True)
class Call(ABC):
    """What every op's call answers."""

    @property
    @abstractmethod
    def leaves(self) -> tuple[Tensor | None, ...]: ...

    @abstractmethod
    def arguments(self) -> tuple[Any, ...]: ...

    @classmethod
    @abstractmethod
    def of(cls, *arguments: Any) -> Self: ...

    @property
    @abstractmethod
    def first(self) -> Tensor:
        """The first argument: where it is, the others are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the operands of products."""

    @property
    def fp8(self) -> bool:
        """Whether matrices are e4m3."""
        return False

    @property
    def trains(self) -> bool:
        """Whether a gradient is wanted."""
        if self.fp8 or not torch.is_grad_enabled():
            return False
        return any([leaf is not None and leaf.requires_grad for leaf in self.leaves])


def apart(arguments: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among `Call.arguments`, and what is left, for `together`."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensors.append(value)
            rest.append(_TENSOR)
        elif isinstance(value, list | tuple):
            tensors += value
            rest.append([_TENSOR] * len(value))
        else:
            rest.append(value)
    return tensors, rest


def together(tensors: Sequence[Tensor], rest: Sequence[Any]) -> list[Any]:
    """The arguments of which `apart` made this."""
    left = iter(tensors)
    return [
        next(left) if value is _TENSOR else [next(left) for _ in value] if isinstance(value, list) else value
        for value in rest
    ]


@dataclass(frozen=True)
class AttentionCall(Call):
    q: Tensor  # [B, H, L, K], as k and v
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    rotary: Rotary | None = None

    @property
    def first(self) -> Tensor:
        return self.q

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.key_mask, *(self.rotary or (None, None))

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        q, k, v, key_mask, cos, sin = arguments
        return cls(q, k, v, key_mask, _rotary(cos, sin))


def _rotary(cos: Tensor | None, sin: Tensor | None) -> Rotary | None:
    return None if cos is None or sin is None else Rotary(cos, sin)


@dataclass(frozen=True)
class LoopedCall(Call):
    x: Tensor  # [B, L, D]
    blocks: Sequence[BlockWeights | Fp8BlockWeights]
    modulation: Tensor  # [n, 1 or B, 6, D]
    num_loops: int | Tensor  # int64 [B]: one of each sequence
    num_heads: int
    max_loops: int | None = None
    rotary: Rotary | None = None
    key_mask: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    dropout: float = 0.0
    dropout_seed: int | Tensor = 0
    exit_threshold: float | None = None
    recompute: bool = False

    @property
    def first(self) -> Tensor:
        return self.x

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """x, all weights and modulation; of fp8 weights only what is no matrix."""
        return self.x, *self.weights, self.modulation

    @property
    def plain_blocks(self) -> list[BlockWeights]:
        """Those without fp8 weights."""
        return [block for block in self.blocks if isinstance(block, BlockWeights)]

    @property
    def weights(self) -> list[Tensor]:
        """Of all blocks, one after the other; the scale of an fp8 matrix after its values."""
        values: list[Any] = [value for block in self.blocks for value in block]
        if not self.fp8:
            return values
        return [t for value in values for t in (value if isinstance(value, Fp8Weight) else (value,))]

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.blocks[0].qkv.dtype

    @property
    def fp8(self) -> bool:
        return isinstance(self.blocks[0], Fp8BlockWeights)

    @property
    def same_loops(self) -> bool:
        """Whether all sequences take the same number of loops, known before."""
        return self.exit_threshold is None and not isinstance(self.num_loops, Tensor)

    @property
    def head_dim(self) -> int:
        return self.x.shape[-1] // self.num_heads

    def arguments(self) -> tuple[Any, ...]:
        loops, own_loops = (
            (1, self.num_loops) if isinstance(self.num_loops, Tensor) else (self.num_loops, None)
        )
        drawn = isinstance(self.dropout_seed, Tensor)
        seed, drawn_seed = (0, self.dropout_seed) if drawn else (self.dropout_seed, None)
        return (
            *(self.x, self.weights, self.modulation, loops, own_loops, self.num_heads),
            *(self.rotary or (None, None)),
            *(self.key_mask, self.dtype, self.dropout, seed, self.exit_threshold, drawn_seed),
        )

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        """Less `max_loops`, and with `recompute`: an operator's backward pass computes again."""
        x, weights, modulation, loops, own_loops, heads, cos, sin, *rest = arguments
        key_mask, dtype, dropout, seed, threshold, drawn_seed = rest
        return cls(
            *(x, _blocks(weights), modulation, loops if own_loops is None else own_loops, heads, None),
            *(_rotary(cos, sin), key_mask, dtype, dropout, seed if drawn_seed is None else drawn_seed),
            exit_threshold=threshold,
            recompute=True,
        )

    def read(self) -> LoopedCall:
        """With numbers where a tensor [1] on the CPU held one."""
        loops, seed = self.num_loops, self.dropout_seed
        if isinstance(loops, Tensor) and loops.shape == (1,) and loops.device.type == "cpu":
            loops = int(loops)
        if loops is self.num_loops and not isinstance(seed, Tensor):
            return self
        return replace(self, num_loops=loops, dropout_seed=int(seed))


def _blocks(weights: Sequence[Tensor]) -> list[BlockWeights] | list[Fp8BlockWeights]:
    """Of `LoopedCall.weights`."""
    count = len(BlockWeights._fields)
    if weights[1].dtype != FP8:  # the first matrix; all are e4m3 or none
        return [BlockWeights(*weights[i : i + count]) for i in range(0, len(weights), count)]
    rest = iter(weights)
    values: list[Any] = [Fp8Weight(t, next(rest)) if t.dtype == FP8 else t for t in rest]
    return [Fp8BlockWeights(*values[i : i + count]) for i in range(0, len(values), count)]


@dataclass(frozen=True)
class HeadCall(Call):
    """What the calls of all ops on the vocabulary head share, and a call of `head_logits`."""

    hidden: Tensor  # [B, L, D]
    head: Head | Fp8Head
    compute_dtype: torch.dtype | None

    @property
    def first(self) -> Tensor:
        return self.hidden

    @property
    def leaves(self) -> tuple[Any, ...]:
        """hidden, norm, weight, bias, modulation."""
        return self.hidden, *self.head[:4]

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.head.weight.dtype

    @property
    def fp8(self) -> bool:
        return isinstance(self.head, Fp8Head)

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def arguments(self) -> tuple[Any, ...]:
        norm, weight, bias, modulation, _ = self.head
        values, scale = weight if isinstance(weight, Fp8Weight) else (weight, None)
        return self.hidden, norm, values, scale, bias, modulation, self.dtype

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        hidden, norm, weight, scale, bias, modulation, dtype = arguments
        return cls(hidden, _head(norm, weight, scale, bias, modulation), dtype)


def _head(norm: Tensor | None, weight: Tensor, scale: Tensor | None, *rest: Any) -> Head | Fp8Head:
    return Head(norm, weight, *rest) if scale is None else Fp8Head(norm, Fp8Weight(weight, scale), *rest)


@dataclass(frozen=True)
class LogitsBackwardCall(HeadCall):
    """A call of `head_logits_backward`: gradients of the leaves, where wanted, from those of the logits."""

    grad: Tensor  # [B, L, V]
    wanted: Sequence[bool]


@dataclass(frozen=True)
class CrossEntropyCall(HeadCall):
    targets: Tensor  # int64 [B, L]
    rows: Tensor  # int64 [R]; or bool [B, L] for the public op and its operator
    row_weights: Tensor  # like rows

    @property
    def leaves(self) -> tuple[Any, ...]:
        """hidden, norm, weight, bias, modulation, row_weights."""
        return self.hidden, *self.head[:4], self.row_weights

    def arguments(self) -> tuple[Any, ...]:
        return self.hidden, *self.head, self.targets, self.rows, self.row_weights, self.dtype

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        hidden, *head, targets, rows, row_weights, dtype = arguments
        return cls(hidden, Head(*head), dtype, targets, rows, row_weights)


class Draw(NamedTuple):
    """How a token is drawn from the logits of each row."""

    rng: RowRng
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    statistics: bool = True  # wanted besides the token

    @property
    def limits(self) -> tuple[float, float, int | None]:
        """Temperature, top_p and top_k."""
        return self.temperature, self.top_p, self.top_k

    @property
    def restricted(self) -> bool:
        """Whether not every token can be drawn, so that a row's logits are needed together."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k is not None)

    def of_rows(self, part: slice) -> Draw:
        return self._replace(rng=RowRng(self.rng.seed, *(name[part] for name in self.rng[1:])))


@dataclass(frozen=True)
class SampleCall(HeadCall):
    rows: Tensor  # int64 [R]
    draw: Draw

    def arguments(self) -> tuple[Any, ...]:
        *leaves, dtype = super().arguments()
        return *leaves, self.head.excluded_token, self.rows, *self.draw.rng, *self.draw[1:], dtype

    @classmethod
    def of(cls, *arguments: Any) -> Self:
        hidden, norm, weight, scale, bias, modulation, excluded_token, rows, *draw, dtype = arguments
        head = _head(norm, weight, scale, bias, modulation, excluded_token)
        return cls(hidden, head, dtype, rows, Draw(RowRng(*draw[:4]), *draw[4:]))
