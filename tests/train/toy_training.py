"""A model and data small enough to train in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.model import LossOutput, diffusion
from loopmdm.model.config import LoopMDMConfig

VOCAB, MASK, LENGTH = 7, 6, 8


class ToyModel(nn.Module):
    """An MLP applied S times; the interface of LoopMDM as the trainer uses it."""

    model_type = "toy"

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.config = LoopMDMConfig(
            VOCAB, MASK, hidden_size=width, num_heads=2, num_layers=3, loop_end=2, max_loops=4, dropout=0.0
        )
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

        self.embed, self.mix = weights(VOCAB, width), weights(LENGTH, LENGTH)
        self.loop, self.out = weights(width, width), weights(VOCAB, width)
        self.calls: list[tuple[int, int, Tensor]] = []  # (num_loops, seed, input_ids)
        self.poison_after: int | None = None  # number of calls after which the loss is not finite

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | None = None,
        seed: int | None = None,
        *,
        prompt_mask: Tensor | None = None,
        t: Tensor | None = None,
    ) -> LossOutput:
        assert num_loops is not None and seed is not None and t is None
        self.calls.append((num_loops, seed, input_ids))
        generator = torch.Generator().manual_seed(seed)
        t = diffusion.sample_t(input_ids.shape[0], generator)
        frozen = torch.zeros_like(input_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask
        counted = ~frozen if attention_mask is None else ~frozen & attention_mask.bool()
        masked = diffusion.draw_mask(t, ~counted, generator)
        hidden = self.embed[torch.where(masked, MASK, input_ids)]
        for _ in range(num_loops):
            hidden = torch.tanh(hidden + self.mix @ hidden @ self.loop)
        log_prob = torch.log_softmax((hidden @ self.out.T)[..., :MASK], -1)
        nll = -log_prob.gather(-1, input_ids[..., None])[..., 0]
        total = (nll * masked / t[:, None]).sum()
        if self.poison_after is not None and len(self.calls) > self.poison_after:
            total = total * float("nan")
        num_tokens = counted.sum()
        return LossOutput(total / num_tokens, total.detach(), num_tokens, t, num_loops)

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir(exist_ok=True)
        Path(path, "config.json").write_text(json.dumps(self.config.to_dict()))
        save_file(dict(self.state_dict()), Path(path, "model.safetensors"))


def batches(step: int, micro_step: int, rank: int, world_size: int, batch_size: int) -> Batch:
    """Counting sequences with a random start, a pure function of the arguments."""
    generator = torch.Generator().manual_seed(((step * 97 + micro_step) * 89 + rank) * 83 + world_size)
    start = torch.randint(0, MASK, (batch_size, 1), generator=generator)
    return Batch((start + torch.arange(LENGTH)) % MASK)
