"""Buffers whose addresses do not change: what a step gives to a CUDA graph, and what the graph gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels import graphs
from loopmdm_kernels.types import SampledRows

_ROWS = 64  # rows are padded to multiples of it: what the vocabulary kernels take at once
_ALIGNMENT = 16  # elements; kernels are compiled for pointers that are multiples of 16 bytes


class Inputs(NamedTuple):
    """What a step gives to a graph, padded; views of one buffer."""

    tokens: Tensor  # [B, L] int64
    rows: Tensor  # [R] int64
    names: tuple[Tensor, Tensor, Tensor]  # [R] int64, sequence, step and position of the random numbers
    limits: Tensor  # [B] int64, loops at most
    sigma: Tensor  # [B] float64

    def fill(
        self,
        tokens: Tensor,
        rows: Tensor,
        names: Sequence[Tensor],
        limits: int | Tensor,
        padding_limit: int,
        sigma: Tensor | None,
    ) -> None:
        """Write b sequences and r rows; what is padded computes something and is thrown away."""
        batch, fields = len(tokens), (self.tokens, self.rows, *self.names)
        for field, value in zip(fields, (tokens, rows, *names), strict=True):
            field[: len(value)] = value
            field[len(value) :] = 0
        self.limits[:batch] = limits
        self.limits[batch:] = padding_limit
        self.sigma.zero_()
        if sigma is not None:
            self.sigma[:batch] = sigma


class Outputs(NamedTuple):
    """What a graph leaves behind; views of one buffer. float64 holds ids, counts and fp32 exactly."""

    sampled: Tensor  # [6, R] float64: the fields of SampledRows
    loops: Tensor  # [B] float64


class Layout(NamedTuple):
    """The padded sizes of a call, and where its inputs and outputs lie in buffers of 8-byte elements."""

    batch: int
    width: int
    rows: int

    @property
    def input_sizes(self) -> list[int]:
        return [self.batch * self.width, *[self.rows] * 4, self.batch, self.batch]

    @property
    def output_sizes(self) -> list[int]:
        return [len(SampledRows._fields) * self.rows, self.batch]

    def inputs(self, buffer: Tensor) -> Inputs:
        """Views of an int64 buffer."""
        tokens, rows, sequence, step, position, limits, sigma = _views(buffer, self.input_sizes)
        tokens = tokens.view(self.batch, self.width)
        return Inputs(tokens, rows, (sequence, step, position), limits, sigma.view(torch.float64))

    def outputs(self, buffer: Tensor) -> Outputs:
        """Views of a float64 buffer."""
        sampled, loops = _views(buffer, self.output_sizes)
        return Outputs(sampled.view(len(SampledRows._fields), self.rows), loops)


class Buffers:
    """The inputs and outputs of calls up to a size, on the host and on the device."""

    def __init__(self, largest: Layout, device: torch.device) -> None:
        pinned = device.type == "cuda"
        inputs, outputs = _end(largest.input_sizes), _end(largest.output_sizes)
        self._host_inputs = torch.zeros(inputs, dtype=torch.int64, pin_memory=pinned)
        self._host_outputs = torch.zeros(outputs, dtype=torch.float64, pin_memory=pinned)
        self._inputs = torch.zeros(inputs, dtype=torch.int64, device=device)
        self._outputs = torch.zeros(outputs, dtype=torch.float64, device=device)

    def send(self, layout: Layout, *values: Any) -> None:
        """Give the values of `Inputs.fill` to the device."""
        layout.inputs(self._host_inputs).fill(*values)
        used = _end(layout.input_sizes)
        self._inputs[:used].copy_(self._host_inputs[:used], non_blocking=True)

    def on_device(self, layout: Layout) -> tuple[Inputs, Outputs]:
        return layout.inputs(self._inputs), layout.outputs(self._outputs)

    def receive(self, layout: Layout, batch: int, num_rows: int) -> tuple[SampledRows, Tensor]:
        """Wait for the device; the draws of so many rows, and the loops of so many sequences, int64."""
        used = _end(layout.output_sizes)
        self._host_outputs[:used].copy_(self._outputs[:used])
        sampled, loops = layout.outputs(self._host_outputs)
        fields = (
            field[:num_rows].to(torch.int64 if name.endswith("token") else torch.float32)
            for name, field in zip(SampledRows._fields, sampled, strict=True)
        )
        return SampledRows(*fields), loops[:batch].long()


def padded_rows(count: int) -> int:
    return _ROWS * graphs.bucket(math.ceil(count / _ROWS)) if count else 0


def _aligned(size: int) -> int:
    return _ALIGNMENT * math.ceil(size / _ALIGNMENT)


def _end(sizes: list[int]) -> int:
    return sum(map(_aligned, sizes))


def _views(buffer: Tensor, sizes: list[int]) -> list[Tensor]:
    parts = torch.split(buffer[: _end(sizes)], [_aligned(size) for size in sizes])
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
