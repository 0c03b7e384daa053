"""Inputs of head_logits, and its definition in float64."""

from __future__ import annotations

import torch

from loopmdm_kernels.testing import head_inputs
from loopmdm_kernels.types import Head

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def case(backend, size, dtype=None, *, per_sequence=True):
    """(hidden, head) of size (B, L, D, V)."""
    hidden, head = head_inputs(*size, per_sequence_modulation=per_sequence)
    dtype = dtype or (BF16 if backend.name == "cuda" else FLOAT)
    return hidden.float().to(backend.device), Head(*(t.to(backend.device, dtype) for t in head.tensors))


def exact_logits(hidden, head):
    x, (norm, weight, bias, modulation) = hidden.double(), (t.double() for t in head.tensors)
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    shift, scale = modulation[:, :, None].unbind(1)
    return (x * (1 + scale) + shift) @ weight.T + bias
