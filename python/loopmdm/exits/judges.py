"""The memory of a rule during one forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm.model import vocabulary
from loopmdm.model.stages import Stages


class Judge(ABC):
    """Decides after each loop which of the sequences that are still looping stop."""

    tails: Tensor | None = None  # [b, L, D] of the sequences judged last, where predictions decide

    @abstractmethod
    def __call__(self, stages: Stages, old: Tensor, new: Tensor, loop: int) -> Tensor:
        """Boolean [b]: who stops at H(loop) = new, H(loop - 1) being old."""

    def keep(self, going: Tensor) -> None:
        """Forget the others of the b sequences; going is bool [b]."""
        if self.tails is not None:
            self.tails = self.tails[going]


class ChangeJudge(Judge):
    """Decides from the states before and behind the loop alone."""

    def __init__(self, stops: Callable[[Stages, Tensor, Tensor, int], Tensor]) -> None:
        self._stops = stops

    def __call__(self, stages: Stages, old: Tensor, new: Tensor, loop: int) -> Tensor:
        return self._stops(stages, old, new, loop)


class OutputJudge(Judge):
    """Keeps the log-probabilities of the last prediction, [R, V] of the masked positions."""

    def __init__(self, eps: float, stages: Stages, hidden: Tensor) -> None:
        self._eps = eps
        self._sequence = stages.masked.nonzero()[:, 0]
        self._log_probs = self._predict(stages, hidden)

    def __call__(self, stages: Stages, old: Tensor, new: Tensor, loop: int) -> Tensor:
        before, self._log_probs = self._log_probs, self._predict(stages, new)
        divergence = _row_sums(self._log_probs.exp() * (self._log_probs - before))
        per_position = torch.zeros(stages.tokens.shape, dtype=torch.float64, device=new.device)
        per_position[stages.masked] = divergence.double()
        # Rounding can leave a divergence of nothing a little below zero.
        mean = per_position.sum(dim=1).clamp_min(0) / stages.masked.sum(dim=1).clamp_min(1)
        return mean < self._eps

    def keep(self, going: Tensor) -> None:
        super().keep(going)
        stays = going[self._sequence]
        self._log_probs = self._log_probs[stays]
        self._sequence = (going.cumsum(0) - 1)[self._sequence[stays]]

    def _predict(self, stages: Stages, hidden: Tensor) -> Tensor:
        tails = self.tails = stages.after(hidden)
        model = stages.model
        head = model.head(stages.sigma)
        rows = tails[stages.masked]
        if vocabulary.is_shared(head):
            rows = rows[None]
        else:
            head, rows = vocabulary.of_sequences(head, self._sequence), rows[:, None]
        if not rows.numel():
            return rows.new_empty(0, model.config.vocab_size)
        logits = vocabulary.head_logits(rows, head, compute_dtype=model.compute_dtype).flatten(0, 1).float()
        logits[:, model.config.mask_token_id] = vocabulary.NEVER
        return torch.log_softmax(logits, dim=1)


class ArgmaxJudge(Judge):
    """Keeps the most probable tokens [b, L] of masked positions, and how many loops they have lasted."""

    def __init__(self, patience: int, stages: Stages, hidden: Tensor) -> None:
        self._patience = patience
        self._tokens = self._predict(stages, hidden)
        self._lasted = torch.zeros_like(self._tokens[:, 0])

    def __call__(self, stages: Stages, old: Tensor, new: Tensor, loop: int) -> Tensor:
        before, self._tokens = self._tokens, self._predict(stages, new)
        same = (before == self._tokens).all(dim=1)
        self._lasted = torch.where(same, self._lasted + 1, 0)
        return self._lasted >= self._patience

    def keep(self, going: Tensor) -> None:
        super().keep(going)
        self._tokens, self._lasted = self._tokens[going], self._lasted[going]

    def _predict(self, stages: Stages, hidden: Tensor) -> Tensor:
        tails = self.tails = stages.after(hidden)
        model = stages.model
        rows = stages.masked.flatten().nonzero().squeeze(1)
        tokens = torch.full_like(stages.tokens, -1)
        if rows.numel():
            found = vocabulary.most_probable(
                tails, model.head(stages.sigma), rows, compute_dtype=model.compute_dtype
            )
            tokens.view(-1)[rows] = found.top1_token
        return tokens


def _row_sums(table: Tensor) -> Tensor:
    """Sums [R] of the rows of a table [R, V].

    PyTorch sums a single row in parts, one a thread, and so to other bits than a row among others.
    """
    return torch.cat((table, table)).sum(dim=1)[:1] if len(table) == 1 else table.sum(dim=1)
