"""A stand-in for MDLM's modules: the reference's names, call structure and return forms, in plain PyTorch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingLayer(nn.Module):
    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding[indices]


class TimestepEmbedder(nn.Module):
    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        frequency = torch.exp(-math.log(1e4) * torch.arange(128, dtype=dtype) / 128)
        angle = sigma[:, None].to(dtype) * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(x.shape[1]).type_as(self.inv_freq), self.inv_freq)
        angle = torch.cat([angle, angle], dim=-1)[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
        cos, sin = angle.cos(), angle.sin()
        cos[:, :, 2], sin[:, :, 2] = 1.0, 0.0
        return cos, sin


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(x, x.shape[-1:]) * self.weight


class DDiTBlock(nn.Module):
    def __init__(self, dim: int, n_heads: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.dropout2 = nn.Dropout(dropout)
        self.dropout = dropout
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self, x: Tensor, rotary_cos_sin: tuple[Tensor, Tensor], c: Tensor, seqlens: Any = None
    ) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[
            :, None
        ].chunk(6, 2)
        batch, length, dim = x.shape
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale_msa) + shift_msa)
        qkv = qkv.view(batch, length, 3, self.n_heads, dim // self.n_heads)
        cos, sin = (part.to(qkv.dtype) for part in rotary_cos_sin)
        first, second = qkv.chunk(2, dim=-1)
        q, k, v = (qkv * cos + torch.cat([-second, first], dim=-1) * sin).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + gate_msa * F.dropout(self.attn_out(mixed), self.dropout, self.training)
        branch = self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return x + gate_mlp * F.dropout(branch, self.dropout, self.training)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, vocab_size: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, vocab_size)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * dim)
        for zero in (*self.linear.parameters(), *self.adaLN_modulation.parameters()):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class ReferenceDIT(nn.Module):
    """For tests, `order` lists the blocks to run, by default each once, and `trunk_dtype` is what they are
    autocast to, as the reference does on a GPU."""

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        model = config.model
        self.vocab_embed = EmbeddingLayer(model.hidden_size, vocab_size)
        self.sigma_map = TimestepEmbedder(model.cond_dim)
        self.rotary_emb = Rotary(model.hidden_size // model.n_heads)
        self.blocks = nn.ModuleList(
            DDiTBlock(model.hidden_size, model.n_heads, model.cond_dim, model.dropout)
            for _ in range(model.n_blocks)
        )
        self.output_layer = FinalLayer(model.hidden_size, vocab_size, model.cond_dim)
        self.order = list(range(model.n_blocks))
        self.trunk_dtype: torch.dtype | None = None

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        rotary_cos_sin = self.rotary_emb(x)
        with torch.autocast("cpu", self.trunk_dtype, enabled=self.trunk_dtype is not None):
            for i in self.order:
                x = self.blocks[i](x, rotary_cos_sin, c, seqlens=None)
            return self.output_layer(x, c)


class HubBackbone(ReferenceDIT):
    """The network inside the hub form: also returns the states."""

    def forward(  # type: ignore[override]
        self, indices: Tensor, sigma: Tensor, output_hidden_states: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.vocab_embed(indices)
        states = [x] if output_hidden_states else []
        c = F.silu(self.sigma_map(sigma))
        rotary_cos_sin = self.rotary_emb(x)
        for i in self.order:
            x = self.blocks[i](x, rotary_cos_sin, c, seqlens=None)
            if output_hidden_states:
                states.append(x)
        return self.output_layer(x, c), states


class Diffusion(nn.Module):
    """The reference's outer module, as far as its state_dict and its averaged weights are concerned."""

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.backbone = ReferenceDIT(config, vocab_size)
        self.ema: Any = None


def reference_config(**changes: Any) -> SimpleNamespace:
    model = {"hidden_size": 16, "cond_dim": 8, "length": 32, "n_blocks": 5, "n_heads": 2, "dropout": 0.1}
    model |= {"scale_by_sigma": True, "tie_word_embeddings": False, "name": "tiny-test"}
    return SimpleNamespace(model=SimpleNamespace(**{**model, **changes}))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values: adaLN and the head start at zero, which makes tests vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if name.endswith(("norm1.weight", "norm2.weight", "norm_final.weight")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 2 and "embedding" not in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(0.3 * noise)
