"""A training step of MDLM's own loop, where only the network is ours: SUBS and the loss stay outside of it.

Beside the reference's module in plain PyTorch, alone compiled and with the loop around it. "ours, fused loss"
is what the same step takes with `DIT.loss`, which has no logits in memory. Few blocks, so that compiling the
reference takes seconds; and only in the dtype of the processor's fastest product, in which peers are fastest.

Tensors as large as the logits are given back to the system when they are freed, so each step pays for fresh
pages. MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=30000000000 in the environment makes the C
library keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.model import training_step
from bench.peers import compiled
from bench.roofline import NAMES, native_dtype
from loopmdm.mdlm import DIT
from loopmdm.model import diffusion
from loopmdm.model.flops import TRAINING_FACTOR, head_flops, layer_flops
from tests.mdlm.reference_dit import ReferenceDIT, randomise, reference_config

MASKED_OUT = -1e6  # MDLM's log-probability of what cannot be
SMALL = {"hidden_size": 768, "n_heads": 12, "n_blocks": 4, "cond_dim": 128, "length": 1024, "dropout": 0.0}
VOCAB = 50258
Loss = Callable[[Any], Tensor]


def subs(logits: Tensor, noisy: Tensor, mask_token_id: int) -> Tensor:
    """Log-probabilities [B, L, V] by the reference's operations, in place where its own are."""
    logits[..., mask_token_id] += MASKED_OUT
    logits = logits - logits.logsumexp(-1, keepdim=True)
    known = noisy != mask_token_id
    logits[known] = MASKED_OUT
    logits[known, noisy[known]] = 0
    return logits


def reference_loss(network: Any, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """MDLM's loss without time conditioning, in nats a token."""
    logits = network(noisy, torch.zeros_like(t))
    log_probs = subs(logits, noisy, logits.shape[-1] - 1)
    chosen = log_probs.gather(-1, tokens[..., None]).squeeze(-1)
    return (-chosen * diffusion.loss_weight(t)[:, None]).mean()


def step(network: Any, loss: Loss, *, autocast: bool, call: Any = None) -> Callable[[], None]:
    """One step that calls `call`, by default the network itself, in its loss."""
    run = training_step(network, lambda model: loss(model if call is None else call), autocast)

    def cast_again() -> None:  # as the reference does around its blocks
        network.trunk_dtype = torch.bfloat16 if autocast else None
        run()

    return cast_again


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_drop_in(compare: Callable[..., None], batch: int = 2, length: int = 256) -> None:
    config = reference_config(**SMALL)
    theirs = ReferenceDIT(config, VOCAB)
    randomise(theirs)
    ours = DIT(config, VOCAB)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB - 1, (batch, length), generator=generator)
    t = (torch.arange(batch) + 0.5) / batch
    masked = diffusion.draw_mask(t, torch.zeros_like(tokens, dtype=torch.bool), generator)
    noisy = tokens.masked_fill(masked, VOCAB - 1)
    loop = partial(reference_loss, tokens=tokens, noisy=noisy, t=t)
    compiled_loop = partial(compiled(reference_loss), tokens=tokens, noisy=noisy, t=t)

    native = native_dtype()
    narrow = native == torch.bfloat16

    def fused(network: Any) -> Tensor:
        loss: Tensor = network.loss(tokens, seed=0, t=t).loss
        return loss

    variants = {
        "ours, compiled loop": step(ours, compiled_loop, autocast=narrow),
        "ours, fused loss": step(ours, fused, autocast=narrow),
        f"eager {NAMES[native]}": step(theirs, loop, autocast=narrow),
        f"compiled {NAMES[native]}": step(theirs, loop, autocast=narrow, call=compiled(theirs)),
        f"compiled loop {NAMES[native]}": step(theirs, compiled_loop, autocast=narrow),
    }
    rows = int(masked.sum())
    dims = ours.config
    blocks = TRAINING_FACTOR * batch * length * dims.num_layers * layer_flops(dims, length)
    logits = (batch * length + 2 * rows) * head_flops(dims)  # gradients of the masked rows' alone
    compare(step(ours, loop, autocast=narrow), variants, flops=blocks + logits, dtype=native, rows=rows)
