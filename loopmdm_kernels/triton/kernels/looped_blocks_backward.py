"""`looped_blocks`, backward: the gate and dropout of a branch."""

import triton.language as tl

from loopmdm_kernels.triton.kernels.common import launched, rounded
from loopmdm_kernels.triton.kernels.modulated_rows import add_to
from loopmdm_kernels.triton.kernels.philox import dropout_keep


@launched
def branch_backward_kernel(
    grad_ptr,  # [T, D] fp32, of x + gate * dropout(branch)
    branch_ptr,  # [T, D], after dropout
    gate_ptr,  # gate of sequence b at b * modulation_stride
    used_ptr,  # [B] int64, or None: sequences that did not take this loop have no gradient
    grad_branch_ptr,  # [T, D] in the dtype of branch, of the branch before dropout
    grad_gate_ptr,  # [B, parts, D] fp32, partial sums over rows, added to
    size,
    length,
    modulation_stride,
    loop,
    dropout_seed: tl.uint64,
    application,
    dropout_threshold: tl.int64,
    inverse_kept,
    BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    parts = tl.cdiv(length, PART)
    sequence = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    col = tl.arange(0, BLOCK_D)
    col_exists = col < size
    gate = tl.load(gate_ptr + sequence * modulation_stride + col, mask=col_exists, other=0.0)
    gate = gate.to(tl.float32)
    taken = 1.0
    if used_ptr is not None:
        taken = (tl.load(used_ptr + sequence) > loop).to(tl.float32)
    of_gate = tl.zeros((BLOCK_D,), tl.float32)
    first = part * PART
    for i in range(first, tl.minimum(first + PART, length)):
        row = sequence * length + i
        at = row * size + col
        grad = tl.load(grad_ptr + at, mask=col_exists, other=0.0) * taken
        of_gate += grad * tl.load(branch_ptr + at, mask=col_exists, other=0.0).to(tl.float32)
        into = grad * gate
        if DROPOUT:
            rows = tl.zeros((1,), tl.int64) + row
            keep = dropout_keep(dropout_seed, application, BRANCH, dropout_threshold, rows, 0, size, BLOCK_D)
            into = tl.where(tl.reshape(keep, (BLOCK_D,)), into * inverse_kept, 0.0)
        tl.store(grad_branch_ptr + at, rounded(into, grad_branch_ptr.dtype.element_ty), mask=col_exists)
    add_to(grad_gate_ptr + (sequence * parts + part) * size + col, of_gate, col_exists)
