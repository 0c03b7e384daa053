"""What is measured and sampled of a model while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from loopmdm.data.sudoku import SudokuSpec, encode_boards
from loopmdm.data.sudoku.boards import Cells
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.plan import as_plan
from loopmdm.quality.causal import CausalLM
from loopmdm.quality.likelihood import (
    Measured,
    autoregressive_result,
    measure_autoregressive,
    measure_nll,
    nll_results,
)
from loopmdm.runs import likelihood, text_data
from loopmdm.runs.boards import ORDERS, Solved, greedy, solve_all
from loopmdm.runs.models import default_loops
from loopmdm.runs.options import UsageError
from loopmdm.sampling import Decoding
from loopmdm.sampling.sampler import sample_with
from loopmdm.solve import SolveResult
from loopmdm.train import SharedEvaluation

# Samples of each prompt and loop count, where nothing else is asked for.
SAMPLES = 2
_NEW_TOKENS, _STEPS = 128, 32  # of a sample: its most tokens behind the prompt, and its denoising steps
_SEED = 0  # the same at every evaluation, so that samples show what training has changed
_TIMES_PER_WINDOW = 4


class Prompt(NamedTuple):
    """What a sample begins with."""

    text: str
    ids: list[int]  # with BOS; none where there is no prompt


@dataclass(frozen=True)
class Sampler:
    """Draws the same samples, but for the weights, at every evaluation.

    prompts: at least one; number: samples of each; length: most tokens of a sequence.
    """

    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    number: int
    length: int
    ends: bool  # EOS ends a sample

    def draw(self, model: LoopMDM, num_loops: int) -> list[dict[str, Any]]:
        """Records of the samples with so many loops: num_loops, seed, prompt and text."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.number)]
        longest = max(len(prompt.ids) for prompt in prompts)
        decoding = Decoding(
            steps=_STEPS,
            plan=as_plan(num_loops),
            seed=_SEED,
            eos_token_id=self.tokenizer.eos_token_id if self.ends else None,
        )
        result = sample_with(
            model,
            decoding,
            len(prompts),
            min(self.length, longest + _NEW_TOKENS),
            [prompt.ids for prompt in prompts] if longest else None,
            progress=False,
        )
        rows = zip(prompts, result.tokens.tolist(), result.lengths.tolist(), strict=True)
        return [
            {
                "num_loops": num_loops,
                "seed": _SEED,
                "prompt": prompt.text,
                "text": self.tokenizer.decode(row[len(prompt.ids) : end]),
            }
            for prompt, row, end in rows
        ]


@dataclass(frozen=True)
class TextEvaluation(SharedEvaluation):
    """Held-out likelihood at several loop counts, and samples with each of them.

    Ranks share the sequences of every batch, and the loop counts of the samples.
    """

    windows: text_data.Windows
    sampler: Sampler | None

    def part(
        self, model: LoopMDM, rank: int, world_size: int
    ) -> tuple[Measured, dict[int, list[dict[str, Any]]]]:
        """What was measured, and samples by loop count."""
        loops = default_loops(model)
        measured = measure_nll(
            model,
            self.windows.batches,
            num_loops=loops,
            num_t=_TIMES_PER_WINDOW,
            rank=rank,
            world_size=world_size,
        )
        own = loops[rank::world_size] if self.sampler is not None else []
        return measured, {count: self.sampler.draw(model, count) for count in own if self.sampler}

    def whole(self, parts: Sequence[tuple[Measured, dict[int, list[dict[str, Any]]]]]) -> dict[str, Any]:
        results = nll_results(
            [measured for measured, _ in parts], bytes_per_token=self.windows.bytes_per_token
        )
        drawn = {count: samples for _, part in parts for count, samples in part.items()}
        document: dict[str, Any] = {"held_out": [likelihood.to_dict(result) for result in results]}
        if drawn:
            document["samples"] = [one for count in sorted(drawn) for one in drawn[count]]
        return document


@dataclass(frozen=True)
class CausalEvaluation(SharedEvaluation):
    """Held-out likelihood of an autoregressive model, which makes no samples; ranks share the batches."""

    windows: text_data.Windows

    def part(self, model: CausalLM, rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
        return measure_autoregressive(model, self.windows.batches, rank=rank, world_size=world_size)

    def whole(self, parts: Sequence[list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
        result = autoregressive_result(parts, bytes_per_token=self.windows.bytes_per_token)
        return {"held_out": [likelihood.to_dict(result)]}


@dataclass(frozen=True)
class BoardEvaluation(SharedEvaluation):
    """The share of puzzles solved; of the first so many, the boards. Ranks share the puzzles."""

    spec: SudokuSpec
    find: Callable[[], Cells]  # the puzzles, which are made when they are needed
    samples: int

    @cached_property
    def puzzles(self) -> Cells:
        return self.find()

    def part(self, model: LoopMDM, rank: int, world_size: int) -> list[Solved]:
        """In each way; nothing of a rank that has no puzzle."""
        start, end = (len(self.puzzles) * number // world_size for number in (rank, rank + 1))
        if start == end:
            return []
        ways = greedy(ORDERS, default_loops(model))
        return solve_all(model, self.spec, self.puzzles[start:end], ways, first_id=start)

    def whole(self, parts: Sequence[list[Solved]]) -> dict[str, Any]:
        ways = zip(*filter(None, parts), strict=True)
        solved = [
            one[0]._replace(
                result=SolveResult.of_all([part.result for part in one]),
                blanks=sum(part.blanks for part in one),
            )
            for one in ways
        ]
        in_order = [one for one in solved if one.decoding.order == ORDERS[0]]  # where S matters most
        shown = [self._board(one, i) for one in in_order for i in range(min(self.samples, len(self.puzzles)))]
        document: dict[str, Any] = {"solved": [one.to_dict() for one in solved]}
        return {**document, "samples": shown} if shown else document

    def _board(self, solved: Solved, index: int) -> dict[str, Any]:
        return {
            "num_loops": solved.num_loops,
            "order": solved.decoding.order,
            "prompt": encode_boards(self.spec, self.puzzles[index : index + 1])[0],
            "text": encode_boards(self.spec, solved.result.boards[index : index + 1])[0],
            "solved": bool(solved.result.solved[index]),
        }


def prompts_of(
    texts: Sequence[str], windows: text_data.Windows, tokenizer: Tokenizer, length: int, number: int
) -> list[Prompt]:
    """What samples begin with: the texts asked for, else held-out prompts of pairs, else nothing."""
    if texts:
        asked = [Prompt(text, [tokenizer.bos_token_id, *tokenizer.encode(text).tolist()]) for text in texts]
        for prompt in asked:
            if len(prompt.ids) >= length:
                raise UsageError(
                    f"--sample-prompts: {prompt.text!r} has {len(prompt.ids)} tokens with BOS, but a sequence"
                    f" has {length}"
                )
        return asked
    first = windows.batches[0]
    if first.prompt_mask is None:
        return [Prompt("", [])]
    given = [
        ids[mask].tolist() for ids, mask in zip(first.input_ids, first.prompt_mask, strict=True) if mask.any()
    ]
    return [Prompt(tokenizer.decode(ids), ids) for ids in given[:number]]
