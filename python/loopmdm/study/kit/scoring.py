"""What a compute plan is worth: samples drawn under it, and a loss for each of them.

All plans of a study draw the same random numbers for the same sample, so their losses are paired.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopmdm.data.sudoku import SudokuSpec, complete_units, is_valid_solution
from loopmdm.model import LoopMDM
from loopmdm.model.flops import CONVENTIONS
from loopmdm.plan import ComputePlan
from loopmdm.quality import Scorer, distinct_n, load_scorer, self_bleu, unigram_entropy
from loopmdm.quality.bootstrap import Floats
from loopmdm.runs.options import UsageError, usage_errors
from loopmdm.sampling import Decoding, SampleResult
from loopmdm.sampling.sampler import sample_with
from loopmdm.study.kit.sources import BATCH, HeldOut

Values = dict[str, Any]


class Scoring(ABC):
    """Samples under a plan. `measure` names the mean of their losses, or its exp; less is better."""

    measure: str
    perplexity = False  # whether the measure is exp of the mean loss

    def __init__(self, model: LoopMDM, decoding: Decoding) -> None:
        self.model, self._decoding = model, decoding

    @abstractmethod
    def given(self, first: int, count: int) -> dict[str, Any]:
        """What `sample` is given of samples number first..first + count - 1."""

    def draw(self, plan: ComputePlan, first: int, count: int) -> SampleResult:
        """Samples number first..first + count - 1."""
        ids = list(range(first, first + count))
        decoding = replace(self._decoding, plan=plan)
        return sample_with(
            self.model, decoding, count, sequence_ids=ids, progress=False, **self.given(first, count)
        )

    @abstractmethod
    def losses(self, tokens: Tensor) -> Floats:
        """The loss of each sample, [N]; tokens [N, L]."""

    def score(self, means: Floats) -> Floats:
        """The measure from mean losses."""
        return np.asarray(np.exp(means)) if self.perplexity else means

    def diversity(self, tokens: Tensor) -> Values:
        """Figures about the samples as a set."""
        return {}

    def evaluate(self, plan: ComputePlan, num: int) -> Values:
        """Losses of `num` samples, and what drawing them executed. JSON values."""
        parts = [self.draw(plan, first, min(BATCH, num - first)) for first in range(0, num, BATCH)]
        tokens = torch.cat([part.tokens for part in parts])
        calls = sum(part.total_network_calls for part in parts)
        return {
            "losses": [round(loss, 6) for loss in self.losses(tokens).tolist()],
            "network_calls": calls,
            "mean_loops": sum(int(part.loops.sum()) for part in parts) / calls,
            "flops": {c: sum(part.ledger.flops(c) for part in parts) for c in CONVENTIONS},
            "seconds": sum(part.seconds for part in parts),
            **self.diversity(tokens),
        }


class BoardScoring(Scoring):
    """Puzzles filled from left to right with the most probable digits; the loss is 1 where that fails."""

    measure = "share of boards not solved"

    def __init__(self, model: LoopMDM, spec: SudokuSpec, puzzles: Tensor) -> None:
        super().__init__(model, Decoding(order="left_to_right", temperature=0.0))
        self._spec, self._puzzles = spec, puzzles

    def given(self, first: int, count: int) -> dict[str, Any]:
        return {"infill": self._puzzles[first : first + count]}

    def losses(self, tokens: Tensor) -> Floats:
        boards = (tokens.cpu().numpy() + 1).astype(np.uint8)
        return np.asarray(1.0 - is_valid_solution(self._spec, boards))


class WholeBoardScoring(Scoring):
    """Boards made from nothing by the ancestral sampler; the loss is the share of wrong units of each."""

    measure = "rows, columns and boxes wrong"

    def __init__(self, model: LoopMDM, spec: SudokuSpec, steps: int, seed: int) -> None:
        super().__init__(model, Decoding(steps=steps, seed=seed))
        self._spec = spec

    def given(self, first: int, count: int) -> dict[str, Any]:
        return {"length": self._spec.cells}

    def losses(self, tokens: Tensor) -> Floats:
        return np.asarray(1.0 - complete_units(self._spec, tokens.cpu().numpy() + 1).mean(-1))


class TextScoring(Scoring):
    """Text by the ancestral sampler, with or without given beginnings, read by an autoregressive scorer."""

    measure = "generative perplexity"
    perplexity = True

    def __init__(
        self,
        model: LoopMDM,
        scorer: Scorer,
        length: int,
        steps: int,
        seed: int,
        prefixes: Tensor | None = None,
    ) -> None:
        """prefixes: [N, P] tokens the samples start with; their own loss is not counted."""
        super().__init__(model, Decoding(steps=steps, seed=seed))
        self._scorer, self._length, self._prefixes = scorer, length, prefixes

    def given(self, first: int, count: int) -> dict[str, Any]:
        prompt = None if self._prefixes is None else self._prefixes[first : first + count]
        return {"length": self._length, "prompt": prompt}

    def losses(self, tokens: Tensor) -> Floats:
        nll, counted = self._scorer.nll(tokens)
        if self._prefixes is not None:  # log p of what follows: that of all less that of the beginning
            given, given_count = self._scorer.nll(self._prefixes[: len(tokens)])
            nll, counted = nll - given, counted - given_count
        return np.asarray((nll / counted).numpy())

    def diversity(self, tokens: Tensor) -> Values:
        return {
            "unigram_entropy": float(unigram_entropy(tokens).mean()),
            "distinct_2": float(distinct_n(tokens, 2).mean()),
            "distinct_3": float(distinct_n(tokens, 3).mean()),
            "self_bleu_4": float(self_bleu(tokens).mean()),
        }


MEASURES = tuple(kind.measure for kind in (BoardScoring, WholeBoardScoring, TextScoring))


def scoring_of(args: Any, model: LoopMDM, data: HeldOut) -> tuple[Scoring | None, int]:
    """How samples are drawn and rated, and how many; None for text without a scorer.

    args: scorer, num, steps, seed and, for text with given beginnings, prefix.
    """
    if data.spec is not None and not data.puzzles:
        return WholeBoardScoring(model, data.spec, args.steps, args.seed), args.num
    if data.spec is not None:
        tokens = torch.cat([batch.input_ids for batch in data.batches])
        given = torch.cat([batch.prompt_mask for batch in data.batches if batch.prompt_mask is not None])
        return BoardScoring(model, data.spec, torch.where(given, tokens, model.config.mask_token_id)), len(
            tokens
        )
    if args.scorer is None:
        return None, 0
    length = data.batches[0].input_ids.shape[1]
    with usage_errors():
        scorer = load_scorer(args.scorer)
    prefix = getattr(args, "prefix", 0)
    if not prefix:
        return TextScoring(model, scorer, length, args.steps, args.seed), args.num
    prefixes = torch.cat([batch.input_ids for batch in data.batches])[: args.num, :prefix]
    if prefix >= length or len(prefixes) < args.num:
        raise UsageError(
            f"--prefix {prefix} of {args.num} samples: expected fewer than {length} tokens, of at most"
            f" {data.num_sequences} sequences (--windows)"
        )
    return TextScoring(model, scorer, length, args.steps, args.seed, prefixes), args.num
