"""The public ops: one file each, with its checks, dispatch, operator registration and autograd."""

from loopmdm_kernels.ops.attention import attention
from loopmdm_kernels.ops.head_logits import head_logits
from loopmdm_kernels.ops.looped_blocks import looped_blocks
from loopmdm_kernels.ops.masked_cross_entropy import masked_cross_entropy
from loopmdm_kernels.ops.sample_rows import sample_rows

__all__ = ["attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows"]
