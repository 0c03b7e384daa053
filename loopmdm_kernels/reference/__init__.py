"""The ops in plain PyTorch: any dtype up to float64, differentiable. The oracle of every test."""

from loopmdm_kernels.reference.attention import attention
from loopmdm_kernels.reference.head_logits import head_logits, head_logits_backward
from loopmdm_kernels.reference.looped_blocks import looped_blocks
from loopmdm_kernels.reference.masked_cross_entropy import masked_cross_entropy
from loopmdm_kernels.reference.sample_rows import sample_rows

__all__ = [
    "attention",
    "head_logits",
    "head_logits_backward",
    "looped_blocks",
    "masked_cross_entropy",
    "sample_rows",
]
