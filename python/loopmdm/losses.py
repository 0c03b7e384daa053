"""Losses of masked diffusion training from hidden states and the head, where others take logits [B, L, V].

The classes have the names, the arguments and the values of NeMo Automodel's, and `mdlm_loss` those of the
loss in dllm's `MDLMTrainer`; `hidden` and `head` stand in the place of `logits`. Logits are computed for
the positions that count, and not all of them at once (`loopmdm_kernels.masked_cross_entropy`). The
projection's operands are in the dtype of the head's weight, sums in float32 or wider.

`head` is a weight [V, D], an `nn.Linear`, which is read and not called, or a `loopmdm_kernels.Head`, which
has a norm and a modulation too. Hidden states in half precision are widened. As in torch's cross-entropy, a
target of -100 counts nothing.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from loopmdm_kernels import Head, masked_cross_entropy
from loopmdm_kernels.ops import checks

AnyHead: TypeAlias = Head | nn.Linear | Tensor

_IGNORED = -100
_LEAST_PROBABILITY = 1e-8  # what NeMo Automodel divides by at least
_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *checks.FLOATS)
_NUMBERS = (*checks.FLOATS, torch.int64)


class DLLMLossOutput(NamedTuple):
    """What the losses of NeMo Automodel return."""

    total_loss: Tensor  # scalar, for backward
    dllm_loss: Tensor  # scalar, the diffusion loss alone, detached
    draft_correct_per_pos: Tensor | None = None  # of draft models, which there are none of here
    draft_count_per_pos: Tensor | None = None


class MDLMLoss(NamedTuple):
    loss: Tensor  # scalar, for backward
    token_nll: Tensor  # [B, L] weighted, 0 where a token is not masked, detached: what dllm's meter takes


class MDLMCrossEntropyLoss(nn.Module):
    """sum over masked and supervised tokens of -log p(x0) / p_mask (MDLM, Eq. 10, where p_mask = t).

    fp32_upcast is accepted as in NeMo Automodel; sums are never narrower than float32.
    """

    def __init__(self, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_hidden: Tensor | None = None,
    ) -> DLLMLossOutput:
        """The loss; the arguments of an autoregressive part are accepted and not used.

        Args:
            hidden: [B, L, D], what the head would be called with.
            head: see the module.
            target_ids: [B, L] int64 clean tokens.
            noise_mask: [B, L] bool, True at masked tokens.
            p_mask: [B, L] float, the probability with which each was masked.
            loss_mask: [B, L], not 0 at supervised tokens.
            num_diffusion_tokens: divides the sum, if it is at least 1.

        Raises:
            TypeError, ValueError: naming the argument, what was got and what is accepted.
        """
        loss = _denoising(hidden, head, target_ids, noise_mask, p_mask, loss_mask)
        loss = _divided(loss, num_diffusion_tokens)
        return DLLMLossOutput(loss, loss.detach().clone())


class BlockDiffusionCrossEntropyLoss(nn.Module):
    """The mean of -log p(x0) over supervised tokens, masked or not: of uniform noise, without weights.

    fp32_upcast is accepted as in NeMo Automodel; sums are never narrower than float32.
    """

    def __init__(self, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_hidden: Tensor | None = None,
    ) -> DLLMLossOutput:
        """As `MDLMCrossEntropyLoss.forward`; noise_mask and p_mask are accepted and not used.

        num_diffusion_tokens: divides the sum; None: the number of supervised tokens in this batch.
        """
        supervised = _mask("loss_mask", loss_mask, hidden)
        loss, _ = _cross_entropy(hidden, head, target_ids, supervised, None)
        if num_diffusion_tokens is None:
            loss = loss / supervised.sum().clamp_min(1)
        else:
            loss = _divided(loss, num_diffusion_tokens)
        return DLLMLossOutput(loss, loss.detach().clone())


class HybridDiffusionLLMLoss(nn.Module):
    """alpha times the loss of `MDLMCrossEntropyLoss`, and that of next tokens where they are given.

    fp32_upcast is accepted as in NeMo Automodel; sums are never narrower than float32.
    """

    def __init__(self, alpha: float = 1.0, fp32_upcast: bool = True) -> None:
        super().__init__()
        self.alpha = alpha
        self.fp32_upcast = fp32_upcast

    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        target_ids: Tensor,
        noise_mask: Tensor,
        p_mask: Tensor,
        loss_mask: Tensor,
        loss_mask_ar: Tensor | None = None,
        num_diffusion_tokens: int | None = None,
        num_ar_tokens: int | None = None,
        causal_hidden: Tensor | None = None,
    ) -> DLLMLossOutput:
        """As `MDLMCrossEntropyLoss.forward`, and:

        Args:
            hidden: [B, L, D]; or [B, 2L, D], the second half of which is `causal_hidden`.
            loss_mask_ar: [B, L], the weight of each token in the autoregressive sum; None: no such sum.
            num_ar_tokens: divides that sum, if it is at least 1.
            causal_hidden: [B, L, D], of which position l predicts token l + 1.
        """
        if isinstance(hidden, Tensor) and isinstance(target_ids, Tensor) and causal_hidden is None:
            length = target_ids.shape[1]
            if hidden.shape[1] > length:
                hidden, causal_hidden = hidden[:, :length], hidden[:, length:]
        loss = _denoising(hidden, head, target_ids, noise_mask, p_mask, loss_mask)
        dllm_loss = total = self.alpha * _divided(loss, num_diffusion_tokens)
        if causal_hidden is not None and loss_mask_ar is not None:
            ar_loss = _next_tokens(causal_hidden, head, target_ids, loss_mask_ar)
            total = total + _divided(ar_loss, num_ar_tokens)
        return DLLMLossOutput(total, dllm_loss.detach())


def mdlm_loss(
    hidden: Tensor,
    head: AnyHead,
    input_ids: Tensor,
    labels: Tensor,
    masked_mask: Tensor,
    loss_weights: Tensor,
    *,
    loss_norm_type: str = "token",
    right_shift_logits: bool = False,
) -> MDLMLoss:
    """The loss of dllm's `MDLMTrainer.compute_loss`, whose steps 5 and 6 this is.

    Args:
        hidden: [B, L, D], what the head would be called with.
        head: see the module.
        input_ids: [B, L] int64 clean tokens.
        labels: [B, L] int64, -100 at tokens that are never masked and not counted.
        masked_mask: [B, L] bool, True at masked tokens.
        loss_weights: [B, L], the weight of each (1/t); ones for dllm's "uniform".
        loss_norm_type: "token": the sum over the number of maskable tokens; "sequence": the mean over
            sequences of each one's sum over its maskable tokens; "batch": the sum over the number of
            sequences.
        right_shift_logits: position l - 1 predicts token l, and position 0 also token 0.
    """
    masked = _mask("masked_mask", masked_mask, hidden)
    shape = masked.shape
    checks.tensor("labels", labels, dtypes=(torch.int64,), shape=shape, device=hidden.device)
    checks.tensor("loss_weights", loss_weights, dtypes=_NUMBERS, shape=shape, device=hidden.device)
    maskable = labels != _IGNORED
    if loss_norm_type == "token":
        counted = maskable.sum().clamp_min(1).expand(shape)
    elif loss_norm_type == "sequence":
        counted = (maskable.sum(-1, keepdim=True).clamp_min(1) * len(labels)).expand(shape)
    elif loss_norm_type == "batch":
        counted = torch.full_like(labels, len(labels))
    else:
        raise ValueError(f"loss_norm_type: got {loss_norm_type!r}, expected 'token', 'sequence' or 'batch'")
    if right_shift_logits:
        hidden = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
    loss, nll = _cross_entropy(hidden, head, input_ids, masked, loss_weights / counted)
    return MDLMLoss(loss, nll.detach() * loss_weights)


def _denoising(
    hidden: Tensor, head: AnyHead, target_ids: Tensor, noise_mask: Tensor, p_mask: Tensor, loss_mask: Tensor
) -> Tensor:
    masked = _mask("noise_mask", noise_mask, hidden) & _mask("loss_mask", loss_mask, hidden)
    checks.tensor("p_mask", p_mask, dtypes=checks.FLOATS, shape=masked.shape, device=hidden.device)
    loss, _ = _cross_entropy(hidden, head, target_ids, masked, 1.0 / p_mask.clamp(min=_LEAST_PROBABILITY))
    return loss


def _next_tokens(hidden: Tensor, head: AnyHead, target_ids: Tensor, weights: Tensor) -> Tensor:
    weighted = _mask("loss_mask_ar", weights, hidden)
    # Targets move, hidden states would be copied: position l has token l + 1, and the last one has none.
    targets, weights, weighted = (value.roll(-1, dims=1) for value in (target_ids, weights, weighted))
    weighted[:, -1] = False
    loss, _ = _cross_entropy(hidden, head, targets, weighted, weights)
    return loss


def _cross_entropy(
    hidden: Tensor, head: AnyHead, targets: Tensor, rows: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    checks.tensor("target_ids", targets, dtypes=(torch.int64,), shape=rows.shape, device=hidden.device)
    if isinstance(head, nn.Linear):
        head = Head.of(head.weight, bias=head.bias)
    if hidden.dtype not in checks.STREAM_FLOATS:
        hidden = hidden.float()
    if weights is not None and not weights.is_floating_point():
        weights = weights.to(hidden.dtype)
    return masked_cross_entropy(hidden, head, targets, rows & (targets != _IGNORED), weights)


def _mask(name: str, value: Tensor, hidden: Tensor) -> Tensor:
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS, shape=("B", "L", "D"))
    return checks.tensor(name, value, dtypes=_MASKS, shape=hidden.shape[:2], device=hidden.device).bool()


def _divided(total: Tensor, count: int | None) -> Tensor:
    return total if count is None else total / max(count, 1)
