"""The weights of a stack in one buffer, bf16, [n, out, in] for each matrix: one window of L2 spans them.

They are packed once, and again when a parameter's version says that it has changed or an optimizer has made
a step. Writes that neither shows (`p.data.copy_()`, the replay of a captured optimizer) are found on the
device: before its kernel each call compares fingerprints there and converts what differs, without a word to
the host (prepare.py).

Calls on several streams may share them. What they keep in L2 is given back with the last parameter that was
packed on a device, or by `clear`; an optimizer's step leaves it to the weights that are packed next.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from loopmdm_kernels.cuda import driver
from loopmdm_kernels.cuda.launch import drop_ended_graphs, keep_for_graphs
from loopmdm_kernels.cuda.refresh import Refresh, refresh_of
from loopmdm_kernels.cuda.streams import Shared
from loopmdm_kernels.types import BlockWeights

MATRICES = ("qkv", "attn_out", "mlp_in", "mlp_out")


class PackedWeights(NamedTuple):
    buffer: Tensor  # bf16, all matrices
    qkv: Tensor  # views of it, [n, out, in]
    attn_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    norms: Tensor  # fp32 [n, 2, D]
    mlp_in_bias: Tensor  # fp32 [n, F]
    mlp_out_bias: Tensor  # fp32 [n, D]
    refresh: Refresh | None = None  # None: they were packed for one call
    shared: Shared | None = None  # all their memory, and that of `refresh`

    def writing(self) -> AbstractContextManager[None]:
        """Inside, the current stream may bring them up to date."""
        return nullcontext() if self.shared is None else self.shared.writing()


class _Entry(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    packed: PackedWeights


_MOST_ENTRIES = 8
_known: dict[tuple[int, ...], _Entry] = {}
_owners: dict[int, int] = {}  # the first parameter of each stack that was packed, by its id: its device
_lock = threading.RLock()  # of both; a parameter may go while they are looked at


def clear() -> None:
    """Forget all packed weights, which are then packed again where they are needed, and give L2 back."""
    with _lock:
        _known.clear()
        devices = set(_owners.values())
    drop_ended_graphs()
    for device in devices:
        driver.release_l2(device)


def packed(blocks: Sequence[BlockWeights]) -> PackedWeights:
    """The weights, which `refresh` makes what the parameters are when the device comes to it."""
    tensors = tuple(tensor for weights in blocks for tensor in weights)
    key = tuple(map(id, tensors))
    state = tuple(
        (-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.dtype, t.device) for t in tensors
    )
    with _lock:
        entry = _known.get(key)
    # An id may be that of a tensor that has taken the place of a dead one.
    on_gpu = tensors[0].is_cuda
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if entry and entry.state == state and all(r() is t for r, t in zip(entry.tensors, tensors, strict=True)):
        keep_for_graphs(entry)
        return entry.packed
    fresh = _pack(blocks)
    refresh = None if capturing else refresh_of(_sources(blocks, fresh))
    if refresh is None:  # a graph packs at every replay into memory of its own
        return fresh
    _watch_optimizers()
    shared = Shared(fresh.buffer, fresh.norms, fresh.mlp_in_bias, fresh.mlp_out_bias, *refresh)
    fresh = fresh._replace(refresh=refresh, shared=shared)
    with _lock:
        _known.pop(key, None)
        while len(_known) >= _MOST_ENTRIES:
            _known.pop(next(iter(_known)))
        _known[key] = _Entry(tuple(map(weakref.ref, tensors)), state, fresh)
        if on_gpu and key[0] not in _owners:
            _owners[key[0]] = tensors[0].get_device()
            weakref.finalize(tensors[0], _gone, key[0]).atexit = False
    return fresh


def _gone(parameter: int) -> None:
    """Its stack's packed weights go too, and after the last one of a device what it keeps in L2."""
    with _lock:
        device = _owners.pop(parameter)
        for key in [key for key in _known if key[0] == parameter]:
            del _known[key]
        last = device not in _owners.values()
    if last and not torch.cuda.is_current_stream_capturing():
        driver.release_l2(device)


def _sources(blocks: Sequence[BlockWeights], packed: PackedWeights) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with its copy, the norms of all layers first."""
    norms = [
        (norm, copy)
        for weights, copies in zip(blocks, packed.norms, strict=True)
        for norm, copy in zip((weights.norm1, weights.norm2), copies, strict=True)
    ]
    rest = [
        (getattr(weights, name), getattr(packed, name)[layer])
        for layer, weights in enumerate(blocks)
        for name in (*MATRICES, "mlp_in_bias", "mlp_out_bias")
    ]
    return [*norms, *rest]


def _pack(blocks: Sequence[BlockWeights]) -> PackedWeights:
    with torch.no_grad():
        shapes = {name: (len(blocks), *getattr(blocks[0], name).shape) for name in MATRICES}
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        buffer = torch.empty(sum(sizes), dtype=torch.bfloat16, device=blocks[0].qkv.device)
        views = {
            name: part.view(shapes[name])
            for name, part in zip(MATRICES, torch.split(buffer, sizes), strict=True)
        }
        for name, view in views.items():
            for layer, weights in enumerate(blocks):
                view[layer].copy_(getattr(weights, name))

        def floats(name: str) -> Tensor:
            return torch.stack([getattr(weights, name).float() for weights in blocks])

        norms = torch.stack((floats("norm1"), floats("norm2")), dim=1)
        matrices = views["qkv"], views["attn_out"], views["mlp_in"], views["mlp_out"]
        return PackedWeights(buffer, *matrices, norms, floats("mlp_in_bias"), floats("mlp_out_bias"))


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(lambda *_: _known.clear())
