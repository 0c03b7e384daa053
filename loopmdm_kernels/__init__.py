"""Kernels for looped masked diffusion language models: three fused ops, one oracle, several backends."""

from loopmdm_kernels.backends import available_backends, use_backend
from loopmdm_kernels.ops import attention, head_logits, looped_blocks, masked_cross_entropy, sample_rows
from loopmdm_kernels.version import __version__

__all__ = [
    "__version__",
    "attention",
    "available_backends",
    "head_logits",
    "looped_blocks",
    "masked_cross_entropy",
    "sample_rows",
    "use_backend",
]
