"""attention, forward and backward, beside torch's scaled_dot_product_attention, on a GPU each kind of it.

And beside FlashAttention-3, where it is installed.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import loopmdm_kernels as lk
from bench.roofline import native_dtype
from bench.run import BF16, Calls, Run

GPU_KINDS = (
    *(SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
)


def by_torch(kind: SDPBackend, *qkv: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(*qkv)


def gpu_calls(run: Run, batch: int, length: int) -> Calls:
    """Ours, and of torch what takes these tensors on this device."""
    shape = (batch, run.sizes.heads, length, run.sizes.hidden // run.sizes.heads)
    qkv = torch.randn(3, *shape, device=run.device, dtype=BF16).unbind()
    theirs, _ = run.tried({kind.name.lower(): partial(by_torch, kind, *qkv) for kind in GPU_KINDS})
    if find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_func

        theirs["FA3"] = partial(flash_attn_func, *(t.transpose(1, 2) for t in qkv))
    return {"ours": partial(lk.attention, *qkv), **theirs}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"),
    [(1, 12, 1024, 64), (1, 12, 256, 64), (128, 4, 81, 32)],
    ids=["12x1024x64", "12x256x64", "512x81x32"],
)
def test_attention(compare, batch, heads, length, head_dim, backward):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3)]

    def variant(function, dtype):
        tensors = [t.to(dtype).requires_grad_(backward) for t in exact]

        def run():
            out = function(*tensors)
            if backward:
                torch.autograd.grad(out, tensors, out.detach())

        return run

    forward = 4.0 * batch * heads * length**2 * head_dim
    native = native_dtype()
    compare(
        variant(lk.attention, native),
        {
            "sdpa fp32": variant(F.scaled_dot_product_attention, torch.float32),
            "sdpa bf16": variant(F.scaled_dot_product_attention, torch.bfloat16),
        },
        flops=forward * (3 if backward else 1),
        dtype=native,
    )
