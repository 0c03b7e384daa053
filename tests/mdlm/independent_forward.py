"""The specified forward in numpy float64, written from the specification alone.

Embedding; condition silu(mlp(sinusoid(sigma))); pre-norm adaLN blocks with rotary attention and a GELU(tanh)
MLP; modulated final norm; vocabulary projection with bias. Blocks loop[0]..loop[1]-1 run num_loops times.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, weight: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight


def linear(x: Array, state: dict[str, Array], name: str, bias: bool = True) -> Array:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if bias else out


def condition(state: dict[str, Array], sigma: Array) -> Array:
    frequency = np.exp(-np.log(10_000.0) * np.arange(128) / 128)
    angle = sigma[:, None] * frequency
    features = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    return silu(linear(silu(linear(features, state, "sigma_map.mlp.0")), state, "sigma_map.mlp.2"))


def rotate(x: Array, inv_freq: Array) -> Array:
    """x [B, L, H, K]: pairs (i, i + K/2) turn by position * inv_freq[i]."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * inv_freq
    cos, sin = np.cos(angle)[None, :, None, :], np.sin(angle)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(qkv: Array, inv_freq: Array) -> Array:
    batch, length, width = qkv.shape
    hidden = width // 3
    head_dim = 2 * len(inv_freq)
    q, k, v = (
        qkv[..., i * hidden : (i + 1) * hidden].reshape(batch, length, hidden // head_dim, head_dim)
        for i in range(3)
    )
    scores = np.einsum("blhd,bmhd->bhlm", rotate(q, inv_freq), rotate(k, inv_freq)) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhd->blhd", weights, v).reshape(batch, length, hidden)


def block(x: Array, c: Array, state: dict[str, Array], name: str) -> Array:
    modulation = linear(c, state, f"{name}.adaLN_modulation")[:, None, :]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = np.split(modulation, 6, axis=-1)
    h = layer_norm(x, state[f"{name}.norm1.weight"]) * (1 + scale_msa) + shift_msa
    mixed = attention(linear(h, state, f"{name}.attn_qkv", bias=False), state["rotary_emb.inv_freq"])
    x = x + gate_msa * linear(mixed, state, f"{name}.attn_out", bias=False)
    h = layer_norm(x, state[f"{name}.norm2.weight"]) * (1 + scale_mlp) + shift_mlp
    h = gelu_tanh(linear(h, state, f"{name}.mlp.0"))
    return x + gate_mlp * linear(h, state, f"{name}.mlp.2")


def forward(
    state: dict[str, Array],
    indices: NDArray[np.int64],
    sigma: Array,
    *,
    loop: tuple[int, int],
    num_loops: int,
    time_conditioning: bool,
) -> Array:
    """Logits [B, L, V] from a state dict under the reference's names."""
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    c = condition(state, sigma if time_conditioning else np.zeros_like(sigma))
    x = state["vocab_embed.embedding"][indices]
    order = [*range(loop[0]), *list(range(*loop)) * num_loops, *range(loop[1], num_layers)]
    for index in order:
        x = block(x, c, state, f"blocks.{index}")
    shift, scale = np.split(linear(c, state, "output_layer.adaLN_modulation")[:, None, :], 2, axis=-1)
    h = layer_norm(x, state["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return linear(h, state, "output_layer.linear")
