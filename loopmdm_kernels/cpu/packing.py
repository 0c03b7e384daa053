"""Weights in the layout the kernels read, packed once and kept while the weight does not change.

A weight counts as changed when it is another tensor, or its version counter, address, shape, dtype or
fingerprint has changed, or an optimizer has stepped over it. The fingerprint is there for what leaves the
version counter alone: writes through `.data` or numpy, fused optimizers on a CPU, inference tensors. It is of
every byte of a weight of up to 1 MB: any write to one is seen. Of a larger one it reads one cache line of
every KB (of every 16 KB beyond 16 MB), a different one from KB to KB. There, a write through `.data` or numpy
that touches less than 2 KB in a row (32 KB beyond 16 MB), such as a single row of a matrix, can pass unseen:
after it, call `clear()` or `torch.autograd.graph.increment_version(weight)`. In-place operations on the
weight itself are always seen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class _State(NamedTuple):
    version: int
    address: int
    fingerprint: int
    shape: torch.Size
    dtype: torch.dtype


_PAGE_WORDS = 2**21 // 4  # 32-bit words of a large page


_ByOptions = dict[tuple[Any, ...], Tensor]  # of packing, and the instruction set


class _Packs(NamedTuple):
    weight: weakref.ref[Tensor]
    state: _State | None  # None: an optimizer has stepped over the weight
    packed: _ByOptions
    stale: _ByOptions  # of an earlier state, kept for their memory: fresh pages cost as much as packing


# By id of the weight. An entry dies with its weight, and is replaced, never changed, when the weight changes:
# a thread that has the old one computes with weights that were valid when it asked.
_known: dict[int, _Packs] = {}


def clear() -> None:
    """Forget all packed weights, which are then packed again where they are needed."""
    _known.clear()


def release_stale_memory() -> None:
    """Return to the system the memory of what was packed of weights that have changed since."""
    for packs in list(_known.values()):
        packs.stale.clear()


def packed_linear(
    weight: Tensor, *, bf16: bool, heads: int = 0, parts: int = 1, transposed: bool = False
) -> Tensor:
    """The weight [N, K] as 32-bit words in panels; see `csrc/cpu/linear/linear.h`. Not to be written to.

    `heads` > 0: its rows are `parts` times `heads` heads. `transposed`: the panels of its transpose.
    A weight that is not contiguous is packed at each call.
    """
    if not weight.is_contiguous():
        return _pack(weight.detach().contiguous(), bf16, heads, parts, transposed)
    options = (bf16, heads, parts, transposed)
    return _kept(weight, options, lambda memory: _pack(weight, *options, memory))


def quantized_head(weight: Tensor, *, bf16: bool) -> Tensor:
    """The contiguous weight [V, D] in bytes, with what bounds their error; see `csrc/cpu/head/token_race.h`.

    bf16: of the products whose results it bounds.
    """
    return _kept(weight, ("bytes", bf16), lambda memory: _quantize(weight, bf16, memory))


def _kept(weight: Tensor, options: tuple[Any, ...], make: Callable[[Tensor | None], Tensor]) -> Tensor:
    """What is made of a weight, once while it does not change. `make` gets what was made before, or None."""
    from loopmdm_kernels import _C

    # Read before packing: a write by another thread meanwhile is seen by the next call.
    state = _State(
        -1 if weight.is_inference() else weight._version,
        weight.data_ptr(),
        _C.fingerprint(weight, torch.get_num_threads()),
        weight.shape,
        weight.dtype,
    )
    key = id(weight)
    known = _known.get(key)
    if known is None or known.weight() is not weight or known.state != state:
        _watch_optimizers()
        known = _Packs(weakref.ref(weight, partial(_known.pop, key)), state, {}, _stale(known))
        _known[key] = known
    options = (*options, _C.cpu_isa())
    packed = known.packed.get(options)
    if packed is None:
        old = known.stale.pop(options, None)
        if old is not None and sys.getrefcount(old) > OWN_REFERENCES:  # somebody computes with it
            old = None
        packed = known.packed[options] = make(old)
    return packed


def _own_references() -> int:
    """What getrefcount says of a value with one name; interpreters differ in what they count."""
    alone = object()
    return sys.getrefcount(alone)


OWN_REFERENCES = _own_references()


def _stale(known: _Packs | None) -> _ByOptions:
    """What may be overwritten when the weight of `known` is packed again."""
    return {} if known is None else known.stale | known.packed


def _pack(
    weight: Tensor, bf16: bool, heads: int, parts: int, transposed: bool, memory: Tensor | None = None
) -> Tensor:
    """Into `memory`, if that has the size."""
    from loopmdm_kernels import _C

    columns, depth = reversed(weight.shape) if transposed else weight.shape
    packed, fresh = _memory_of(_C.packed_size(columns, depth, heads, parts, bf16), memory)
    _C.pack_linear(weight, heads, parts, bf16, transposed, torch.get_num_threads(), packed, fresh)
    return packed


def _quantize(weight: Tensor, bf16: bool, memory: Tensor | None) -> Tensor:
    from loopmdm_kernels import _C

    quantized, fresh = _memory_of(_C.quantized_size(*weight.shape), memory)
    _C.quantize_head(weight, bf16, torch.get_num_threads(), quantized, fresh)
    return quantized


def _memory_of(words: int, memory: Tensor | None) -> tuple[Tensor, bool]:
    """int32 [words], and whether it is new: `memory`, if that has the size."""
    if memory is not None and memory.numel() == words:
        return memory, False
    return _on_large_pages(words), True


def _on_large_pages(words: int) -> Tensor:
    """int32 [words]; from the beginning of a large page on, if it fills one."""
    if words < _PAGE_WORDS:
        return torch.empty(words, dtype=torch.int32)
    memory = torch.empty(words + _PAGE_WORDS, dtype=torch.int32)
    return memory[-memory.data_ptr() // 4 % _PAGE_WORDS :][:words]


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_forget_stepped)


def _forget_stepped(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (known := _known.get(id(weight))) is not None and known.weight() is weight:
                _known[id(weight)] = known._replace(state=None, packed={}, stale=_stale(known))
