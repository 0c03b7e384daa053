"""The ops on the vocabulary head as plain PyTorch computes them fastest: products in the weights' dtype.

The package's own reference multiplies in fp32 there, for accuracy, and is slower for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall, HeadCall, SampleCall
from loopmdm_kernels.reference.looped_blocks import norm_modulate
from loopmdm_kernels.types import Head


def _logits(call: HeadCall, rows: Tensor) -> Tensor:
    """[R, V] in the call's dtype, -inf at the excluded token; one modulation for all rows."""
    head, dtype = call.head, call.dtype
    shift, scale = head.modulation[0].to(dtype)
    assert head.norm is not None and isinstance(head, Head)
    h = norm_modulate(call.hidden.flatten(0, 1)[rows], head.norm, shift, scale).to(dtype)
    excluded = torch.tensor([head.excluded_token], device=head.bias.device)
    return F.linear(h, head.weight, head.bias.index_fill(0, excluded, float("-inf")))


def masked_cross_entropy(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    logits = _logits(call, call.rows)
    nll = F.cross_entropy(logits.float(), call.targets.flatten()[call.rows], reduction="none")
    return (nll * call.row_weights).sum(), nll


def sample_rows(call: SampleCall) -> Tensor:
    """MDLM's draw: the argmax of probabilities over exponential noise, without statistics of the row."""
    probabilities = torch.softmax(_logits(call, call.rows).float(), -1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


OF: Mapping[str, Callable[[Any], Any]] = {
    "masked_cross_entropy": masked_cross_entropy,
    "sample_rows": sample_rows,
}
