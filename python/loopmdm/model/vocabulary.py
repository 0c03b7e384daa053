"""The ops on the vocabulary, for a head of weights or for one that has to be called (see `cut`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.calls import Draw
from loopmdm_kernels.reference.head_logits import subs_log_probs
from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.tracing import not_compiled
from loopmdm_kernels.types import Fp8Head, Head, RowRng, SampledRows

NEVER = -1e30  # logit of a forbidden token: finite, so that no difference of two is NaN
_NEVER_IN_HALF = -3e4


class CalledHead(NamedTuple):
    """A head whose modules are called, on the rows that are asked for."""

    layer: Callable[[Tensor, Tensor], Tensor]  # (x [B, L, D], condition [1 or B, C]) -> logits [B, L, V]
    condition: Tensor  # [1 or B, C]
    excluded_token: int
    forbidden: Tensor | None = None  # tokens that are never drawn, int64


AnyHead: TypeAlias = Head | Fp8Head | CalledHead


def is_shared(head: AnyHead) -> bool:
    """Whether one condition serves all sequences."""
    return len(head.condition if isinstance(head, CalledHead) else head.modulation) == 1


def of_sequences(head: AnyHead, index: Tensor | slice) -> AnyHead:
    """The head of the sequences `index` of the batch it was made for."""
    if is_shared(head):
        return head
    if isinstance(head, CalledHead):
        return head._replace(condition=head.condition[index])
    return head._replace(modulation=head.modulation[index])


def at_noise(head: AnyHead, other: AnyHead) -> AnyHead:
    """`head` at the noise levels of `other`, a head of the same model."""
    if isinstance(head, CalledHead):
        assert isinstance(other, CalledHead)
        return head._replace(condition=other.condition)
    assert not isinstance(other, CalledHead)
    return head._replace(modulation=other.modulation)


def without_tokens(head: AnyHead, tokens: Tensor) -> AnyHead:
    """A head under which `tokens`, int64, are never drawn."""
    if isinstance(head, CalledHead):
        return head._replace(forbidden=tokens.to(head.condition.device))
    return head._replace(bias=_forbid(head.bias, tokens.to(head.bias.device)))


def _forbid(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [..., V], those of `tokens` as low as their dtype allows."""
    return logits.index_fill(-1, tokens, _NEVER_IN_HALF if logits.dtype == torch.float16 else NEVER)


def head_logits(hidden: Tensor, head: AnyHead, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    """`lk.head_logits`."""
    if not isinstance(head, CalledHead):
        return lk.head_logits(hidden, head, compute_dtype=compute_dtype)
    logits: Tensor = _called(hidden, head).to(compute_dtype or head.condition.dtype)
    return logits


def row_logits(
    hidden: Tensor, head: AnyHead, rows: Tensor, *, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Logits [R, V] of the rows (flat indices b*L + l) of hidden [B, L, D], in fp32 or wider.

    They are those of `head_logits`, and as rounded; of a layer that is called, what it returns.
    """

    def of(hidden: Tensor, head: AnyHead) -> Tensor:
        if isinstance(head, CalledHead):
            return _called(hidden, head)
        return head_logits(hidden, head, compute_dtype=compute_dtype)

    chosen = hidden.flatten(0, 1)[rows]
    if is_shared(head):
        logits = of(chosen[None], head)[0]
    else:  # each row is a sequence of its own
        logits = of(chosen[:, None], of_sequences(head, rows // hidden.shape[1]))[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def masked_cross_entropy(
    hidden: Tensor,
    head: AnyHead,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`lk.masked_cross_entropy`; of a called head there are logits of the masked rows."""
    if not isinstance(head, CalledHead):
        return lk.masked_cross_entropy(hidden, head, targets, rows, row_weights, compute_dtype=compute_dtype)
    result: tuple[Tensor, Tensor] = _called_cross_entropy(hidden, head, targets, rows, row_weights)
    return result


def sample_rows(
    hidden: Tensor,
    head: AnyHead,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    """`lk.sample_rows`; of a called head there are logits of the rows."""
    if not isinstance(head, CalledHead):
        return lk.sample_rows(
            hidden,
            head,
            rows,
            rng,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            compute_dtype=compute_dtype,
        )
    with torch.no_grad():
        logits = row_logits(hidden, head, rows)
        return sample_logits(logits, head.excluded_token, Draw(rng, temperature, top_p, top_k))


def most_probable(
    hidden: Tensor, head: AnyHead, rows: Tensor, *, compute_dtype: torch.dtype | None = None
) -> SampledRows:
    """`sample_rows` at temperature 0, where nothing is drawn."""
    unnamed = torch.zeros_like(rows)
    rng = RowRng(0, unnamed, unnamed, unnamed)
    return sample_rows(hidden, head, rows, rng, temperature=0.0, compute_dtype=compute_dtype)


@not_compiled
def _called(hidden: Tensor, head: CalledHead) -> Tensor:
    logits = head.layer(hidden, head.condition)
    return logits if head.forbidden is None else _forbid(logits, head.forbidden)


@not_compiled
def _called_cross_entropy(
    hidden: Tensor, head: CalledHead, targets: Tensor, rows: Tensor, row_weights: Tensor
) -> tuple[Tensor, Tensor]:
    if rows.dtype == torch.bool:
        chosen = rows.flatten().nonzero().squeeze(1)
        total, nll = _called_cross_entropy(hidden, head, targets, chosen, row_weights.flatten()[chosen])
        return total, nll.new_zeros(rows.numel()).index_copy(0, chosen, nll).view(rows.shape)
    log_probs = subs_log_probs(row_logits(hidden, head, rows), head.excluded_token)
    nll = -log_probs.gather(1, targets.flatten()[rows][:, None]).squeeze(1)
    return (nll * row_weights.to(nll.dtype)).sum(), nll
