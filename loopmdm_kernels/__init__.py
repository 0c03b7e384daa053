"""Kernels for looped masked diffusion language models: five ops, one oracle, several backends."""

from loopmdm_kernels.backends import available_backends, use_backend
from loopmdm_kernels.ops.attention import attention
from loopmdm_kernels.ops.head_logits import head_logits
from loopmdm_kernels.ops.looped_blocks import looped_blocks
from loopmdm_kernels.ops.masked_cross_entropy import masked_cross_entropy
from loopmdm_kernels.ops.sample_rows import sample_rows
from loopmdm_kernels.qualification import qualify
from loopmdm_kernels.types import Head
from loopmdm_kernels.version import __version__

__all__ = [
    "Head",
    "__version__",
    "attention",
    "available_backends",
    "head_logits",
    "looped_blocks",
    "masked_cross_entropy",
    "qualify",
    "sample_rows",
    "use_backend",
]
