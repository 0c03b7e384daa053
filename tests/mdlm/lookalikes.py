"""Networks with the attributes of MDLM that compute something else, or the same in another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.mdlm.reference_dit import (
    DDiTBlock,
    EmbeddingLayer,
    FinalLayer,
    LayerNorm,
    ReferenceDIT,
    TimestepEmbedder,
)

Change = Callable[[Any], None]


class Block(DDiTBlock):
    """The reference's block in pieces, each to be replaced."""

    @staticmethod
    def score(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def act(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def allowed(query: Tensor, key: Tensor) -> Tensor:
        return torch.ones_like(query - key, dtype=torch.bool)

    @staticmethod
    def pieces(modulation: Tensor) -> Any:
        return modulation.chunk(6, 2)

    @staticmethod
    def normed(q: Tensor) -> Tensor:
        return q

    @staticmethod
    def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = qkv.chunk(2, dim=-1)
        return qkv * cos + torch.cat([-second, first], dim=-1) * sin

    def attend(self, h: Tensor, rotary: Any) -> Tensor:
        batch, length, dim = h.shape
        qkv = self.attn_qkv(h).view(batch, length, 3, self.n_heads, dim // self.n_heads)
        q, k, v = self.rotated(qkv, *rotary).permute(2, 0, 3, 1, 4)
        scores = self.score(self.normed(q) @ self.normed(k).transpose(-1, -2) / math.sqrt(q.shape[-1]))
        place = torch.arange(length)
        scores = scores.masked_fill(~self.allowed(place[:, None], place), -torch.inf)
        return self.attn_out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim))

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.mlp[2](self.act(self.mlp[0](h)))

    def forward(self, x: Tensor, rotary: Any, c: Tensor, seqlens: Any = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.pieces(self.adaLN_modulation(c)[:, None])
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


def pieces(index: int | None = None, **replaced: Any) -> Change:
    """`Block` with some pieces replaced, for one block or for all."""

    def change(net: Any) -> None:
        kind = type("OtherBlock", (Block,), replaced)
        for block in net.blocks if index is None else [net.blocks[index]]:
            block.__class__ = kind

    return change


def norms(forward: Callable[[Any, Tensor], Tensor], *names: str, bias: bool = False) -> Change:
    """Norms of another class in every block, of these names."""

    def change(net: Any) -> None:
        kind = type("OtherNorm", (LayerNorm,), {"forward": forward})
        for block in net.blocks:
            for name in names:
                norm = getattr(block, name)
                norm.__class__ = kind
                if bias:
                    norm.bias = nn.Parameter(torch.zeros_like(norm.weight))

    return change


def layer_norm(eps: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, getattr(self, "bias", None), eps)


def rms_norm(self: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


def of_class(attribute: str, kind: type[Any], **replaced: Any) -> Change:
    """A part of the network of a derived class."""

    def change(net: Any) -> None:
        part = net.get_submodule(attribute)
        part.__class__ = type("Other", (kind,), replaced)

    return change


BOTH = ("norm1", "norm2")


def parallel(self: Any, x: Tensor, rotary: Any, c: Tensor, seqlens: Any = None) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
    attended = gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, rotary)
    return x + attended + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


def norm_after(self: Any, x: Tensor, rotary: Any, c: Tensor, seqlens: Any = None) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
    x = x + gate1 * (self.norm1(self.attend(x, rotary)) * (1 + scale1) + shift1)
    return x + gate2 * (self.norm2(self.feed_forward(x)) * (1 + scale2) + shift2)


def silu_of_condition(self: Any, x: Tensor, rotary: Any, c: Tensor, seqlens: Any = None) -> Tensor:
    return Block.forward(self, x, rotary, F.silu(c))


def layer_scaled(net: Any) -> None:
    def feed_forward(self: Any, h: Tensor) -> Tensor:
        return self.gamma * Block.feed_forward(self, h)

    pieces(feed_forward=feed_forward)(net)
    for block in net.blocks:
        block.gamma = nn.Parameter(torch.ones(block.attn_out.weight.shape[0]))


def extra_branch(net: Any) -> None:
    """At zero when it is made."""

    def feed_forward(self: Any, h: Tensor) -> Tensor:
        return Block.feed_forward(self, h) + self.extra(h)

    pieces(2, feed_forward=feed_forward)(net)
    size = net.blocks[2].attn_out.weight.shape[0]
    net.blocks[2].extra = nn.Linear(size, size, bias=False)
    nn.init.zeros_(net.blocks[2].extra.weight)


def own_forward_of_an_instance(net: Any) -> None:
    block = net.blocks[3]
    block.forward = lambda x, *rest, **named: 0.5 * type(block).forward(block, x, *rest, **named)


def interleaved(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = qkv.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    half = cos.shape[-1] // 2
    cos, sin = (part[..., :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
    return qkv * cos + turned * sin


def values_too(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return Block.rotated(qkv, cos[:, :, :1], sin[:, :, :1])


# What blocks compute otherwise; each is wrong in the fused op.
OTHER_BLOCKS: dict[str, Change] = {
    "RMSNorm": norms(rms_norm, *BOTH),
    "norm with bias": norms(layer_norm(1e-5), *BOTH, bias=True),
    "eps 1e-6": norms(layer_norm(1e-6), *BOTH),
    "eps 1e-5 + 1e-7": norms(layer_norm(1.01e-5), *BOTH),
    "eps 0": norms(layer_norm(0.0), *BOTH),
    "norm weight + 1": norms(lambda self, x: F.layer_norm(x, x.shape[-1:]) * (1 + self.weight), *BOTH),
    "norm without weight": norms(lambda self, x: F.layer_norm(x, x.shape[-1:]), *BOTH),
    "unbiased variance": norms(
        lambda self, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * self.weight, *BOTH
    ),
    "ReLU": pieces(act=staticmethod(F.relu)),
    "SiLU": pieces(act=staticmethod(F.silu)),
    "exact GELU": pieces(act=staticmethod(F.gelu)),
    "quick GELU": pieces(act=staticmethod(lambda x: x * torch.sigmoid(1.702 * x))),
    "causal": pieces(allowed=staticmethod(lambda query, key: key <= query)),
    "causal in block 4": pieces(4, allowed=staticmethod(lambda query, key: key <= query)),
    "window": pieces(allowed=staticmethod(lambda query, key: (query - key).abs() < 4)),
    "wide window": pieces(allowed=staticmethod(lambda query, key: (query - key).abs() < 16)),
    "no diagonal": pieces(allowed=staticmethod(lambda query, key: key != query)),
    "ALiBi": pieces(score=staticmethod(lambda s: s - 0.01 * torch.arange(s.shape[-1]).abs().to(s.dtype))),
    "scores scaled": pieces(score=staticmethod(lambda s: 1.01 * s)),
    "scores capped": pieces(score=staticmethod(lambda s: 50 * torch.tanh(s / 50))),
    "queries normed": pieces(normed=staticmethod(lambda q: F.normalize(q, dim=-1))),
    "rotary interleaved": pieces(rotated=staticmethod(interleaved)),
    "rotary on values": pieces(rotated=staticmethod(values_too)),
    "no rotary": pieces(rotated=staticmethod(lambda qkv, cos, sin: qkv)),
    "rotary backwards": pieces(rotated=staticmethod(lambda qkv, cos, sin: Block.rotated(qkv, cos, -sin))),
    "order of modulation": pieces(
        pieces=staticmethod(lambda m: [m.chunk(6, 2)[i] for i in (3, 4, 5, 0, 1, 2)])
    ),
    "gates + 1": pieces(
        pieces=staticmethod(lambda m: [p + (i % 3 == 2) for i, p in enumerate(m.chunk(6, 2))])
    ),
    "no shift": pieces(
        pieces=staticmethod(lambda m: [p * (i % 3 != 0) for i, p in enumerate(m.chunk(6, 2))])
    ),
    "gates bounded": pieces(
        pieces=staticmethod(lambda m: [p.tanh() if i % 3 == 2 else p for i, p in enumerate(m.chunk(6, 2))])
    ),
    "parallel branches": pieces(forward=parallel),
    "norm after": pieces(forward=norm_after),
    "own forward": pieces(forward=lambda self, x, *rest, **named: 1.001 * Block.forward(self, x, *rest)),
    "silu twice": pieces(forward=silu_of_condition),
    "layer scale": layer_scaled,
    "extra branch": extra_branch,
    "dropout in eval": pieces(
        act=staticmethod(lambda x: F.dropout(F.gelu(x, approximate="tanh"), 0.1, True))
    ),
    "own forward of an instance": own_forward_of_an_instance,
}


def network(forward: Callable[..., Any]) -> Change:
    def change(net: Any) -> None:
        net.__class__ = type("OtherDIT", (ReferenceDIT,), {"forward": forward})

    return change


def through(
    embedded: Callable[[Any, Tensor], Tensor] = lambda net, x: x,
    condition: Callable[[Tensor], Tensor] = F.silu,
    order: Callable[[int], Any] = range,
    between: Callable[[int, list[Tensor]], Tensor] = lambda i, states: states[-1],
    fed: Callable[[int, Tensor], Tensor] = lambda i, c: c,
    out: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Change:
    """The reference's forward with something between its parts."""

    def forward(self: Any, indices: Tensor, sigma: Tensor) -> Tensor:
        states = [embedded(self, self.vocab_embed(indices))]
        c = condition(self.sigma_map(sigma))
        rotary = self.rotary_emb(states[0])
        for i in order(len(self.blocks)):
            states.append(self.blocks[i](between(i, states), rotary, fed(i, c), seqlens=None))
        return out(self.output_layer(states[-1], c))

    return network(forward)


def sines_first(self: Any, sigma: Tensor) -> Tensor:
    frequency = torch.exp(-math.log(1e4) * torch.arange(128, dtype=sigma.dtype) / 128)
    angle = sigma[:, None] * frequency
    return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.mlp[0].weight.dtype))


def of_log(self: Any, sigma: Tensor) -> Tensor:
    return TimestepEmbedder.forward(self, (sigma + 1e-3).log())


def without_one(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    return self.linear(self.norm_final(x) * scale + shift)


def mask_excluded(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([logits.shape[-1] - 1]), -torch.inf)


# What networks feed to their blocks, and in which order: wrong where the first block of a stage runs it all.
OTHER_ORDERS: dict[str, tuple[Change, str]] = {
    "twice": (through(order=lambda n: [*range(n), *range(n)]), r"order \[0, 1, 2, 3, 4, 0, "),
    "backwards": (through(order=lambda n: reversed(range(n))), r"order \[4, 3, 2, 1, 0\]"),
    "one left out": (through(order=lambda n: range(n - 1)), r"order \[0, 1, 2, 3\]"),
    "skip": (through(between=lambda i, s: s[-1] + s[1] if i == 4 else s[-1]), r"feeds blocks\.4 something"),
    "scaled": (through(between=lambda i, s: s[-1] * (1.01 if i == 2 else 1)), r"feeds blocks\.2 something"),
    "condition": (through(fed=lambda i, c: c + (i == 3)), r"feeds blocks\.3 another conditioning"),
}
# What the other parts compute otherwise: part that has to be named.
OTHER_PARTS: dict[str, tuple[Change, str]] = {
    "embedding scaled": (
        of_class("vocab_embed", EmbeddingLayer, forward=lambda self, ids: 4 * self.embedding[ids]),
        "vocab_embed",
    ),
    "embedding normed": (through(embedded=lambda net, x: F.layer_norm(x, x.shape[-1:])), "vocab_embed"),
    "positions": (
        through(embedded=lambda net, x: x + 0.01 * torch.arange(x.shape[1])[:, None].to(x)),
        "vocab_embed",
    ),
    "sines first": (of_class("sigma_map", TimestepEmbedder, forward=sines_first), "sigma_map"),
    "log of sigma": (of_class("sigma_map", TimestepEmbedder, forward=of_log), "sigma_map"),
    "no silu": (through(condition=lambda c: c), "sigma_map"),
    "final RMSNorm": (of_class("output_layer.norm_final", LayerNorm, forward=rms_norm), "output_layer"),
    "final eps": (of_class("output_layer.norm_final", LayerNorm, forward=layer_norm(1e-6)), "output_layer"),
    "final scale": (of_class("output_layer", FinalLayer, forward=without_one), "output_layer"),
    "logits capped": (through(out=lambda logits: 30 * torch.tanh(logits / 30)), "output_layer"),
    "mask excluded": (through(out=mask_excluded), "output_layer"),
    "log-probabilities": (through(out=lambda logits: logits.log_softmax(-1)), "output_layer"),
    "fewer logits": (through(out=lambda logits: logits[..., :-1]), "output_layer gives shape"),
    "several outputs": (through(out=lambda logits: {"logits": logits}), "output_layer gives dict"),
}


class Table(nn.Module):
    """Rotary tables that are kept from call to call, as buffers and as attributes."""

    def __init__(self, length: int, like: Any) -> None:
        super().__init__()
        self.register_buffer("inv_freq", like.inv_freq.clone())
        self.register_buffer("cos", like(torch.zeros(1, length))[0])
        self.register_buffer("sin", like(torch.zeros(1, length))[1])
        self.kept: Any = None
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Any:
        self.calls.append(x.shape[1])
        if self.kept is None or self.kept[0].shape[1] != x.shape[1]:
            self.kept = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        return self.kept


def tables(net: Any) -> None:
    net.rotary_emb = Table(64, net.rotary_emb)


def attention_in_bf16(self: Any, h: Tensor, rotary: Any) -> Tensor:
    batch, length, dim = h.shape
    qkv = self.attn_qkv(h).view(batch, length, 3, self.n_heads, dim // self.n_heads)
    q, k, v = self.rotated(qkv, *rotary).to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
    return self.attn_out(mixed.to(h.dtype))


def under_autocast(net: Any) -> None:
    net.trunk_dtype = torch.bfloat16


def checkpointed(self: Any, x: Tensor, rotary: Any, c: Tensor, seqlens: Any = None) -> Tensor:
    return checkpoint(partial(Block.forward, self), x, rotary, c, use_reentrant=False)


# The same as MDLM's, computed in another way.
ALIKE: dict[str, Change] = {
    "in pieces": pieces(),
    "checkpointed": pieces(forward=checkpointed),
    "weight in layer_norm": norms(layer_norm(1e-5), *BOTH),
    "norm in fp32": norms(lambda self, x: F.layer_norm(x.float(), x.shape[-1:]) * self.weight.float(), *BOTH),
    "rotary tables": tables,
    "attention in bf16": pieces(attend=attention_in_bf16),
    "under autocast": under_autocast,
}
