"""Every Triton kernel once, on small tensors of odd sizes: what compute-sanitizer looks at.

python -m bench.gpu_small
"""

from __future__ import annotations

import torch

import loopmdm_kernels as lk
from bench.gpu_cases import TINY, apply_loops, head_on, in_fp8, looped_on, names_on, rows_on


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, length = 2, 5
    with lk.use_backend("triton"):
        inputs = looped_on(device, TINY, batch, length, torch.bfloat16, grad=True)
        apply_loops(lk.looped_blocks, inputs, 2, recompute=True).sum().backward()
        apply_loops(lk.looped_blocks, inputs, 1, dropout=0.1).sum().backward()
        with torch.no_grad():
            apply_loops(lk.looped_blocks, inputs, 2, exit_threshold=0.5)
        hidden, head = head_on(device, TINY, batch, length, torch.bfloat16, grad=True)
        targets, rows, weights = rows_on(device, TINY, batch, length)
        lk.masked_cross_entropy(hidden, head, targets, rows, weights)[0].backward()
        with torch.no_grad():
            lk.sample_rows(hidden, head, rows, names_on(device, rows.shape[0]))
            lk.sample_rows(hidden, head, rows, names_on(device, rows.shape[0]), top_k=3)
            lk.head_logits(hidden, head)
            blocks, narrow = in_fp8(inputs, head)
            apply_loops(lk.looped_blocks, inputs._replace(blocks=blocks), 2, compute_dtype=torch.bfloat16)
            lk.head_logits(hidden, narrow, compute_dtype=torch.bfloat16)
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        mask[0, 1] = False
        q = torch.randn(batch, 2, length, 24, device=device, requires_grad=True)
        lk.attention(q, q, q, key_mask=mask).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
