"""The modules of LoopMDM under the reference's names (MDLM's DIT).

The ops compute blocks and head from the weights in here. The forwards are for where an op is cut (see `cut`):
what is watched, replaced, or wrapped in more than LoRA's sum of weights is called as in the reference model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

import loopmdm_kernels as lk
from loopmdm.model.adapters import base_of, weight_of
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.cut import named, why_block, why_head
from loopmdm.model.flops import SIGMA_FEATURES
from loopmdm_kernels.cpu.gradient_memory import gradient_memory
from loopmdm_kernels.ops.library import LIBRARY, register
from loopmdm_kernels.reference.looped_blocks import BlockParts, Dropout, apply_block, layer_norm, modulate
from loopmdm_kernels.tracing import once_differentiable, traced, transformed
from loopmdm_kernels.types import BlockWeights, Rotary

ROTARY_BASE = 10_000.0


def by_row(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function(rows [B, ...]) where each row's bits are those it has alone, in any batch.

    PyTorch's products and some of its elementwise functions (silu, sigmoid) round by the number of rows. So
    each row is a call of its own, but with gradients or compiled, where speed counts and no sample is drawn.
    """
    if rows.shape[0] <= 1 or torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return function(rows)
    # Copies: memory of its own is aligned alike for every row.
    return torch.cat([function(row.clone()) for row in torch.split(rows, 1)])


class TokenEmbedding(nn.Module):
    def __init__(self, num: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num, hidden_size))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, indices: Tensor) -> Tensor:
        weight = self.embedding
        trains = torch.is_grad_enabled() and weight.requires_grad and weight.device.type == "cpu"
        if trains and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return cast(Tensor, torch.ops.loopmdm.rows_of(weight, indices))
        if not trains or type(weight) is not nn.Parameter or traced(weight) or transformed():
            return weight[indices]
        return cast(Tensor, _Rows.apply(weight, indices))  # type: ignore[no-untyped-call]


class _Rows(Function):
    """weight[indices], where the weight's gradient may lie in the memory of its last one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.weight = weight  # for its shape alone: it may change before the backward pass
        ctx.save_for_backward(indices)
        return weight[indices]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, (indices,) = ctx.weight, ctx.saved_tensors
        rows, values = indices.flatten(), grad.flatten(0, -2)
        if torch.is_grad_enabled():  # for gradients of gradients
            return torch.zeros_like(weight).index_add(0, rows, values), None
        # Not index_put_, which adds in any order on several threads: other bits every time.
        return gradient_memory(weight, weight.dtype).zero_().index_add_(0, rows, values), None


def _add_rows(values: Tensor, rows: Tensor, num: int) -> Tensor:
    return values.new_zeros(num, values.shape[1]).index_add_(0, rows, values)


def _keep_rows(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    weight, indices = inputs
    ctx.num = weight.shape[0]
    ctx.save_for_backward(indices)


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.loopmdm.add_rows(grad.flatten(0, -2), indices.flatten(), ctx.num), None


# weight[indices], whose gradient a compiler does not make into an addition in any order.
register(
    "rows_of(Tensor weight, Tensor indices) -> Tensor",
    lambda weight, indices: weight[indices],
    lambda weight, indices: weight.new_empty(*indices.shape, weight.shape[1]),
)
register(
    "add_rows(Tensor values, Tensor rows, int num) -> Tensor",
    _add_rows,
    lambda values, rows, num: values.new_empty(num, values.shape[1]),
)
torch.library.register_autograd(
    "loopmdm::rows_of", once_differentiable(_rows_backward), setup_context=_keep_rows, lib=LIBRARY
)


class SigmaEmbedding(nn.Module):
    """Noise level -> conditioning vector: sinusoid of 256 features, then two linears."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SIGMA_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        half = SIGMA_FEATURES // 2
        weight = cast(nn.Linear, self.mlp[0]).weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        frequency = torch.exp(
            -math.log(10_000.0) / half * torch.arange(half, device=sigma.device, dtype=wide)
        )
        angle = sigma.to(wide)[:, None] * frequency
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(weight.dtype)
        out: Tensor = self.mlp(features)
        return out


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        # Computed on the CPU: a division on the meta device takes seconds to import its decomposition.
        self.register_buffer("inv_freq", frequencies(head_dim // 2, "cpu").to(torch.get_default_device()))

    def forward(self, length: int) -> Rotary:
        return rotary_angles(self.inv_freq, length, self.inv_freq.device)

    def _apply(self, *args: Any, **options: Any) -> RotaryEmbedding:
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        self.inv_freq = _unrounded(self.inv_freq)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.inv_freq = _unrounded(self.inv_freq)


def _unrounded(inv_freq: Tensor) -> Tensor:
    """Frequencies that were rounded with a model, and loaded or cast back since then, as they were before."""
    if inv_freq.is_meta or torch.finfo(inv_freq.dtype).bits < 32:
        return inv_freq
    exact = frequencies(len(inv_freq), inv_freq.device)
    rounded = (inv_freq == exact.bfloat16()) | (inv_freq == exact.half())
    return torch.where(rounded, exact.to(inv_freq.dtype), inv_freq)


def frequencies(count: int, device: torch.device | str) -> Tensor:
    exponent = torch.arange(0, 2 * count, 2, dtype=torch.float32, device=device) / (2 * count)
    return 1.0 / ROTARY_BASE**exponent


def check_frequencies(inv_freq: Tensor, stored: torch.dtype, source: str) -> None:
    """Refuse frequencies of another base than the reference's 1e4, which point to a foreign model.

    stored: the dtype to which they were rounded.
    """
    exact = frequencies(len(inv_freq), inv_freq.device)
    error = float((inv_freq.double() / exact.double() - 1).abs().max())
    if error > max(torch.finfo(stored).eps, 1e-5):
        raise ValueError(
            f"{source}: rotary_emb.inv_freq is {error:.2g} (relative) away from the reference's base"
            f" {ROTARY_BASE:g}"
        )


def rotary_angles(inv_freq: Tensor, length: int, device: torch.device) -> Rotary:
    """Angles [L, K/2] of positions 0..L - 1, in fp32 or wider whatever the parameters' dtype.

    Frequencies that were cast to half precision with the model are computed anew: rounded ones, and positions
    counted in bf16, give neighbours the same angle.
    """
    if torch.finfo(inv_freq.dtype).bits < 32:
        inv_freq = frequencies(len(inv_freq), device)
    positions = torch.arange(length, device=device, dtype=inv_freq.dtype)
    angle = torch.outer(positions, inv_freq.to(device))
    return Rotary(angle.cos(), angle.sin())


class ScaleNorm(nn.Module):
    """Layer norm without bias."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight)


def _zero_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def weights_of(block: Any) -> BlockWeights:
    """What `looped_blocks` reads of a block with the names of the reference's."""
    return BlockWeights(
        block.norm1.weight,
        weight_of(block.attn_qkv),
        weight_of(block.attn_out),
        block.norm2.weight,
        weight_of(block.mlp[0]),
        base_of(block.mlp[0]).bias,
        weight_of(block.mlp[2]),
        base_of(block.mlp[2]).bias,
    )


class DDiTBlock(nn.Module):
    def __init__(self, cfg: LoopMDMConfig) -> None:
        super().__init__()
        hidden = cfg.hidden_size
        self.num_heads = cfg.num_heads
        self.norm1 = ScaleNorm(hidden)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = ScaleNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, cfg.mlp_ratio * hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(cfg.mlp_ratio * hidden, hidden),
        )
        self.adaLN_modulation = _zero_linear(cfg.cond_dim, 6 * hidden)
        if cfg.gate_init:
            with torch.no_grad():
                self.adaLN_modulation.bias.view(6, hidden)[[2, 5]] = cfg.gate_init

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        c: Tensor,
        *,
        key_mask: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """The block module by module, for the residual stream x [B, L, D] and c [1 or B, cond_dim].

        rotary: angles [L, K/2], or None. key_mask: [B, L] bool, True at keys that may be attended; None: all.
        dropout: None: none.
        """
        parts = BlockParts(self.norm1, self.attn_qkv, self.attn_out, self.norm2, self.mlp)
        modulation = self.adaLN_modulation(c).unflatten(-1, (6, x.shape[-1]))
        attend = partial(lk.attention, key_mask=key_mask, rotary=rotary)
        return apply_block(x, parts, modulation, self.num_heads, attend, dropout or Dropout())

    def why_called(self) -> str | None:
        """Why the block is not what `weights` alone make it; None: it is."""
        return why_block(self, DDiTBlock.forward, ScaleNorm.forward)

    def weights(self) -> BlockWeights:
        """For `looped_blocks`.

        Raises:
            ValueError: a module of the block has to be called (`why_called`).
        """
        why = self.why_called()
        if why is not None:
            raise ValueError(
                f"{named('block', why)}, so its weights alone are not what it computes; call the block"
            )
        return weights_of(self)

    def around(self, run: Callable[[Tensor], Any], inputs: deque[Tensor]) -> Any:
        """run(x) for the one tensor of `inputs`: what `loopmdm.model.parallel` makes a forward of FSDP2."""
        return run(inputs[0])


class OutputLayer(nn.Module):
    def __init__(self, cfg: LoopMDMConfig) -> None:
        super().__init__()
        self.norm_final = ScaleNorm(cfg.hidden_size)
        self.linear = _zero_linear(cfg.hidden_size, cfg.vocab_size)
        self.adaLN_modulation = _zero_linear(cfg.cond_dim, 2 * cfg.hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Logits [B, L, V] of the residual stream x [B, L, D] for c [1 or B, cond_dim], module by module."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        logits: Tensor = self.linear(modulate(self.norm_final(x), shift, scale).to(shift.dtype))
        return logits

    def why_called(self) -> str | None:
        """As `DDiTBlock.why_called`."""
        return why_head(self, OutputLayer.forward, ScaleNorm.forward)
