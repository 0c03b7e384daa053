"""Tile sizes: a pure function of the kernel, its shape, its dtype and the processor; nothing is tuned.

A tuned table takes precedence: a JSON file named by LOOPMDM_TRITON_TILES, as `tuning` writes it,
{"linear 90 bfloat16 1024x3072x768": [128, 128, 64, 8, 3], ...}, keys as `key` makes them. The kernels of the
vocabulary look at V and D only, so that what a row gives does not depend on how many rows there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from loopmdm_kernels.triton.launch import Processor
from loopmdm_kernels.values import ceil_div, parse_json


class Tiles(NamedTuple):
    """Rows, columns and depth of a program's tile; warps; stages of the load pipeline."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def options(self, sizes: str = "MNK") -> dict[str, int]:
        """What a kernel is launched with, whose sizes have these letters."""
        blocks = {f"BLOCK_{letter}": size for letter, size in zip(sizes, self, strict=False)}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


PRODUCTS = ("linear", "norm_linear", "residual_linear", "weight_gradient")
KERNELS = (*PRODUCTS, "vocabulary", "sample", "attention")
_trial: ContextVar[dict[str, Tiles] | None] = ContextVar("trial", default=None)
_INTERPRETED = Tiles(32, 64, 32, 1, 1)
# Large and small tiles of narrow operands. The rows of a norm_linear are loaded in fp32, a residual_linear
# holds a tile of the residual beside that of its sums: more of either would be spilled.
_PRODUCTS = {
    "linear": (Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 4)),
    "norm_linear": (Tiles(128, 128, 32, 8, 3), Tiles(64, 64, 64, 4, 3)),
    "residual_linear": (Tiles(128, 64, 64, 8, 4), Tiles(64, 64, 64, 4, 4)),
    "weight_gradient": (Tiles(128, 128, 32, 8, 4), Tiles(64, 64, 64, 4, 4)),
}


def key(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> str:
    return f"{kernel} {arch} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"


def tiles(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, processor: Processor) -> Tiles:
    """Shapes: (rows, columns, depth) of products, (V, D) of vocabulary and sample, (L, K, backward)."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(KERNELS)}")
    table = _trial.get() or _tuned(os.environ.get("LOOPMDM_TRITON_TILES"))
    tuned = table.get(key(kernel, shape, dtype, processor.arch)) if table else None
    return tuned or default_tiles(kernel, shape, dtype, processor)


def default_tiles(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, processor: Processor) -> Tiles:
    if processor.arch == 0:
        return _INTERPRETED
    narrow = dtype != torch.float32
    if kernel == "attention":
        return _attention(shape[1], bool(shape[2]), narrow, processor.arch)
    # Where rows of a result are no multiple of a vector, each number stored needs an address in registers.
    uneven = kernel == "linear" and shape[1] % 16 != 0
    if not narrow:  # products of fp32 without tensor cores: accumulators and operands live in registers
        return Tiles(32, 64, 16, 8, 3) if kernel == "sample" else Tiles(64, 32 if uneven else 64, 16, 4, 3)
    if kernel == "vocabulary":
        return Tiles(64, 128, 64, 4, 3)
    if kernel == "sample":  # the race and its statistics need registers beside the sums
        return Tiles(64, 64, 64, 8, 4)
    rows, columns, _ = shape
    large, small = _PRODUCTS[kernel]
    if uneven:
        large = large._replace(n=64)
    if processor.arch < 90:
        large = large._replace(k=32)
    # Large tiles move least through L2; they are worth it once they fill the multiprocessors.
    full = ceil_div(rows, large.m) * ceil_div(columns, large.n) >= processor.multiprocessors
    return large if full else small


def _attention(head_dim: int, backward: bool, narrow: bool, arch: int) -> Tiles:
    """Rows are queries (keys where keys are the outer loop), columns the other; k is not used."""
    if not narrow or head_dim > 128:
        return Tiles(32, 32, 0, 8 if backward else 4, 1)
    if arch < 90:  # operands of mma.sync are in registers, those of wgmma in shared memory
        return Tiles(64, 32, 0, 4, 2) if backward else Tiles(64, 64, 0, 4, 3)
    if backward:
        return Tiles(64, 64, 0, 4, 2) if head_dim <= 64 else Tiles(64, 32, 0, 4, 2)
    if head_dim <= 64:
        return Tiles(128, 64, 0, 4, 3)
    return Tiles(128, 64, 0, 8, 2)


@contextmanager
def trying(table: dict[str, Tiles]) -> Iterator[None]:
    """Inside, a table of its own takes precedence."""
    token = _trial.set(table)
    try:
        yield
    finally:
        _trial.reset(token)


def read_table(path: str | Path) -> dict[str, Tiles]:
    try:
        table = parse_json(Path(path).read_text())
        return {name: Tiles(*map(int, sizes)) for name, sizes in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from error


@cache
def _tuned(path: str | None) -> dict[str, Tiles]:
    if not path:
        return {}
    try:
        return read_table(path)
    except ValueError as error:
        raise ValueError(f"LOOPMDM_TRITON_TILES: {error}") from error
