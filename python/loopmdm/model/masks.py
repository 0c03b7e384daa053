"""Masks over tokens as callers give them."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.tracing import can_read, traced, transformed


def boolean(name: str, mask: Tensor) -> Tensor:
    """A mask of True and False, or of 1 and 0, as bool.

    Raises:
        ValueError: it holds other values, as an additive mask does (0 at tokens, a large negative number at
            padding), which would be read upside down. Integers on a device are taken as they are, since
            looking at them would wait for it.
    """
    worth_waiting = mask.is_floating_point() and not (traced(mask) or transformed())
    if worth_waiting or can_read(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if other.numel():
            raise ValueError(
                f"{name}: got values other than 0 and 1, such as {other[0].item():g}, as an "
                "additive mask holds; expected True or 1 at tokens that are meant, False or 0 at others"
            )
    return mask.bool()


def counted_tokens(input_ids: Tensor, attention_mask: Tensor | None, prompt_mask: Tensor | None) -> Tensor:
    """Which tokens of [B, L] may be masked and count: neither padding nor prompt, bool."""
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        counted = counted & boolean("attention_mask", attention_mask)
    if prompt_mask is not None:
        counted = counted & ~boolean("prompt_mask", prompt_mask)
    return counted
