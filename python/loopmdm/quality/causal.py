"""A small autoregressive transformer: the scorer that samples of diffusion models are measured with.

Pre-norm blocks with rotary positions and causal attention, in plain PyTorch; the vocabulary head is the op of
`LoopMDM`. A sequence is opened with the mask token, which no data contains, so that all L tokens have a
probability, the first one too: log p(x) is that of the whole sequence, on the tokens that the NELBO counts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loopmdm.model import vocabulary
from loopmdm.model.checkpoint import Trainable
from loopmdm.model.config import check_layers, from_fields
from loopmdm.model.cut import named, say, why_global, why_linear, why_norm
from loopmdm.model.masks import counted_tokens
from loopmdm.model.modules import RotaryEmbedding, TokenEmbedding
from loopmdm.model.vocabulary import CalledHead
from loopmdm_kernels.types import Head, Rotary
from loopmdm_kernels.values import integer


@dataclass(frozen=True)
class CausalConfig:
    """Configuration of a `CausalLM`; the fields mean what they mean in `LoopMDMConfig`."""

    vocab_size: int
    mask_token_id: int
    hidden_size: int = 768
    num_heads: int = 12
    num_layers: int = 12
    mlp_ratio: int = 4
    max_length: int = 1024

    # What the FLOP ledger and the trainer ask of any model: nothing is looped, nothing conditions. The ledger
    # counts attention in full, as if it were not causal.
    loop_start: ClassVar[int] = 0
    loop_end: ClassVar[int] = 1
    max_loops: ClassVar[int] = 1
    cond_dim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = integer(field.name, value)
            object.__setattr__(self, field.name, number)
            if number < 1 and field.name != "mask_token_id":
                raise ValueError(f"{field.name}: got {value}, expected at least 1")
        check_layers(self.num_layers)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id: got {self.mask_token_id}, expected 0..{self.vocab_size - 1}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, "
                f"expected a multiple of 2 * num_heads = {2 * self.num_heads}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CausalConfig:
        return from_fields(cls, values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class CausalLoss(NamedTuple):
    loss: Tensor  # scalar, nats per counted token: nll_sum / num_tokens
    nll_sum: Tensor  # scalar, summed over the counted tokens
    num_tokens: Tensor  # scalar int64


class CausalBlock(nn.Module):
    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(hidden, bias=False)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.LayerNorm(hidden, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, config.mlp_ratio * hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * hidden, hidden),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.attn_qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        q, k = (_rotated(part, cos, sin).to(v.dtype) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(attended.transpose(1, 2).reshape(batch, length, hidden))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CausalLM(Trainable):
    """p(x) = prod over i of p(x_i | x_<i); trained by `loopmdm.train.Trainer` as a `LoopMDM` is."""

    model_type: ClassVar[str] = "loopmdm-causal"
    config_class: ClassVar[type[CausalConfig]] = CausalConfig
    config: CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config.hidden_size // config.num_heads)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.hidden_size, bias=False)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def device(self) -> torch.device:
        return self.vocab_embed.embedding.device

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Residual stream [B, L, D]; position i has read the tokens before i of input_ids [B, L] int64."""
        opened = torch.full_like(input_ids[:, :1], self.config.mask_token_id)
        x: Tensor = self.vocab_embed(torch.cat([opened, input_ids[:, :-1]], dim=1))
        rotary: Rotary = self.rotary_emb(input_ids.shape[1])
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, *rotary, use_reentrant=False))
            else:
                x = block(x, *rotary)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def head(self) -> Head | CalledHead:
        """The vocabulary head; the mask has probability 0."""
        whys = {
            "norm_final": why_norm(self.norm_final, nn.LayerNorm.forward),
            "linear": why_linear(self.linear, bias=True),
        }
        reasons = [named(name, why) for name, why in whys.items() if why is not None]
        if (why := why_global()) is not None or reasons:
            say(self, reasons if why is None else [why])
            condition = self.vocab_embed.embedding.new_zeros(1, 1)  # there is none

            def logits(x: Tensor, _: Tensor) -> Tensor:
                out: Tensor = self.linear(self.norm_final(x.to(condition.dtype)))
                return out

            return CalledHead(logits, condition, self.config.mask_token_id)
        weight = self.linear.weight
        modulation = weight.new_zeros(1, 2, self.config.hidden_size)
        return Head(self.norm_final.weight, weight, self.linear.bias, modulation, self.config.mask_token_id)

    def token_nll(self, input_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """-log p(x_i | x_<i) in nats, [B, L]; 0 where `counted` [B, L] bool is False.

        input_ids: [B, L] int64. An id that is not counted is still read by the positions after it.

        Raises:
            TypeError, ValueError: ids that are no tokens of the model, or its mask.
        """
        config = self.config
        if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.ndim != 2:
            raise TypeError(f"input_ids: got {input_ids!r}, expected an int64 tensor [B, L]")
        low, high = (int(end) for end in torch.aminmax(input_ids))
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"input_ids: got ids in {low}..{high}, expected 0..{config.vocab_size - 1}")
        if bool((input_ids == config.mask_token_id).any()):
            raise ValueError(
                f"input_ids: contains the mask token {config.mask_token_id}; expected clean data"
            )
        if counted is None:
            rows = torch.arange(input_ids.numel(), device=input_ids.device)
        else:
            rows = counted.flatten().nonzero().squeeze(1)
        device = self.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        _, nll = vocabulary.masked_cross_entropy(
            self.hidden(input_ids),
            self.head(),
            input_ids,
            rows,
            torch.ones(len(rows), device=rows.device, dtype=torch.float32),
            compute_dtype=dtype,
        )
        return nll.new_zeros(input_ids.numel()).index_put((rows,), nll).view(input_ids.shape)

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | None = None,
        seed: int | None = None,
        *,
        prompt_mask: Tensor | None = None,
    ) -> CausalLoss:
        """Cross-entropy of a batch; the call the trainer makes of a `LoopMDM`.

        Args:
            input_ids: [B, L] int64, clean tokens; the mask token may not occur.
            attention_mask: [B, L], True or 1 at real tokens; only these are counted. Padding is at the end.
            num_loops, seed: nothing is looped and nothing is drawn, so they change nothing.
            prompt_mask: [B, L], True at given tokens, which are not counted.
        """
        counted = counted_tokens(input_ids, attention_mask, prompt_mask)
        num_tokens = counted.sum()
        if not int(num_tokens):
            raise ValueError("attention_mask, prompt_mask: no token is left to count")
        nll_sum = self.token_nll(input_ids, counted).sum()
        return CausalLoss(nll_sum / num_tokens, nll_sum.detach(), num_tokens)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, L, K] turned by the angles [L, K/2], halves of K being the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
