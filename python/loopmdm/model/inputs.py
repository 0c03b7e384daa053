"""What callers give to a model, checked at its boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm.model.config import LoopMDMConfig
from loopmdm_kernels.tracing import can_read

IGNORED_LABEL = -100  # transformers' and PyTorch's mark of a label that does not count


def check(
    input_ids: Tensor,
    sigma: Tensor | None,
    attention_mask: Tensor | None,
    config: LoopMDMConfig,
    device: torch.device,
) -> None:
    """Raise a TypeError or ValueError unless these are tokens [B, L], noise levels [B] and a mask [B, L]."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64:
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: got {got}, expected an int64 tensor")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected [B, L], not empty")
    check_around("input_ids", input_ids, sigma, attention_mask, config, device)
    if not can_read(input_ids):
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"input_ids: got ids in {low}..{high}, expected 0..{config.vocab_size - 1}")


def check_embeds(
    inputs_embeds: Tensor,
    sigma: Tensor | None,
    attention_mask: Tensor | None,
    config: LoopMDMConfig,
    device: torch.device,
) -> None:
    """As `check`, for embeddings [B, L, D] in place of tokens."""
    if not isinstance(inputs_embeds, Tensor) or not inputs_embeds.is_floating_point():
        kind = inputs_embeds.dtype if isinstance(inputs_embeds, Tensor) else type(inputs_embeds).__name__
        raise TypeError(f"inputs_embeds: got {kind}, expected a floating-point tensor")
    fits = inputs_embeds.ndim == 3 and inputs_embeds.shape[-1] == config.hidden_size
    if not fits or not inputs_embeds.numel():
        got = tuple(inputs_embeds.shape)
        raise ValueError(f"inputs_embeds: got shape {got}, expected [B, L, {config.hidden_size}], not empty")
    check_around("inputs_embeds", inputs_embeds, sigma, attention_mask, config, device)


def check_around(
    name: str,
    given: Tensor,
    sigma: Tensor | None,
    attention_mask: Tensor | None,
    config: LoopMDMConfig,
    device: torch.device,
) -> None:
    """What goes with an input [B, L, ...] called `name`: its device and length, noise levels and a mask."""
    if device.type == "meta" and not given.is_meta:
        raise ValueError(
            "model: its weights are on the meta device: not loaded yet, or offloaded by accelerate, "
            "which brings a layer's weights when its forward is called; load the model whole"
        )
    if given.device != device:
        raise ValueError(f"{name}: on {given.device}, but the model is on {device}")
    if given.shape[1] > config.max_length:
        raise ValueError(f"{name}: length {given.shape[1]} is beyond max_length {config.max_length}")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: got {type(attention_mask).__name__}, expected a tensor [B, L]")
    if attention_mask is not None and attention_mask.shape != given.shape[:2]:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(given.shape[:2])}"
        )
    if sigma is not None and not isinstance(sigma, Tensor):
        raise TypeError(
            f"timesteps: got {type(sigma).__name__}, expected a tensor of noise levels [{len(given)}]"
        )
    if sigma is not None and sigma.shape != given.shape[:1]:
        raise ValueError(f"timesteps: got shape {tuple(sigma.shape)}, expected [{given.shape[0]}]")


def given_by_labels(labels: Tensor, input_ids: Tensor) -> Tensor:
    """Where labels [B, L] mark tokens as given; they hold the tokens themselves everywhere else.

    Raises:
        TypeError, ValueError: they are no such labels.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected an int64 tensor [B, L]")
    if labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, "
            f"expected int64 of shape {tuple(input_ids.shape)}"
        )
    given = labels == IGNORED_LABEL
    if can_read(labels) and not bool((given | (labels == input_ids)).all()):
        raise ValueError(
            f"labels: differ from input_ids where they are not {IGNORED_LABEL}; expected the same clean "
            "tokens in both: the loss masks them itself (DataCollatorForLanguageModeling: mlm=False)"
        )
    return given
