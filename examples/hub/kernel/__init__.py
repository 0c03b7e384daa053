"""Triton ops of looped masked diffusion language models, generated from loopmdm-kernels {version}."""

from . import layers
from .ops.attention import attention
from .ops.head_logits import head_logits
from .ops.looped_blocks import looped_blocks
from .ops.masked_cross_entropy import masked_cross_entropy
from .ops.sample_rows import sample_rows
from .types import BlockWeights, Head, Rotary, RowRng

__all__ = [
    "BlockWeights",
    "Head",
    "Rotary",
    "RowRng",
    "attention",
    "head_logits",
    "layers",
    "looped_blocks",
    "masked_cross_entropy",
    "sample_rows",
]
