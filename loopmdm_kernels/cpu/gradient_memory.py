"""Memory of large weight gradients, which the next gradient of the same weight has again.

The C library returns what is freed beyond 32 MB to the system, which clears each fresh page before it gives
it out: for the weight of a vocabulary a tenth of the time of its loss. A weight keeps the memory of its last
gradient, until it dies or `release()`; while a tensor lies in that memory, a gradient gets memory of its own.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from functools import partial

import torch
from torch import Tensor

from loopmdm_kernels.cpu.packing import OWN_REFERENCES

_RETURNED_BYTES = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc: what is larger is never kept

_kept: dict[int, tuple[weakref.ref[Tensor], mmap.mmap]] = {}  # by id of the weight
_lock = threading.RLock()  # a collection inside may end the life of a weight


def gradient_memory(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the shape of `weight`, with any contents."""
    size = math.prod(weight.shape) * dtype.itemsize
    if size <= _RETURNED_BYTES:
        return torch.empty(weight.shape, dtype=dtype)
    key = id(weight)
    with _lock:
        memory = _unused(weight, size)
        if memory is None:
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _kept[key] = (weakref.ref(weight, partial(_forget, key)), memory)
        return torch.frombuffer(memory, dtype=dtype).view(weight.shape)


def release() -> None:
    """Return to the system what no gradient lies in."""
    with _lock:
        _kept.clear()


def _unused(weight: Tensor, size: int) -> mmap.mmap | None:
    """What is kept of the weight, if it has the size and nobody else holds it."""
    owner, memory = _kept.pop(id(weight), (None, None))
    if memory is None or owner is None or owner() is not weight or len(memory) != size:
        return None
    return memory if sys.getrefcount(memory) <= OWN_REFERENCES else None


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    with _lock:
        if _kept.get(key, (None,))[0] is owner:
            del _kept[key]
