"""What every loop changes in the states of a denoising: enough to judge any rule for the loops without a run.

A state is what the network sees at one step. Text: held-out sequences at stratified times, each state's loss
its part of the NELBO, so that the losses of a sequence sum to its NELBO per token. Sudoku: each puzzle filled
from left to right with the right digits, a state before each blank, its loss the next digit's. A puzzle
decoded greedily in that order is solved if and only if each of these digits is the most probable one, so the
share solved is known for every choice of loops, state by state.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.data.batches import Batch
from loopmdm.exits import HiddenChange
from loopmdm.model import LoopMDM, vocabulary
from loopmdm.model.stages import Stages
from loopmdm.quality.copies import counted_tokens
from loopmdm.runs.options import num_loops, positive_int
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.study.kit.inputs import stratified
from loopmdm.study.kit.sources import BATCH, HeldOut

Floats = NDArray[np.float64]
_DIGITS = 6  # of what is kept of a number: traces are stored as text


@dataclass(frozen=True)
class Trace:
    """Arrays over N sequences, J states each (the fully masked end first) and loops 1..K.

    NaN where a sequence has fewer states.
    """

    place: Floats  # [N, J] 1 - the share of what is to fill that is still masked: 0 the fully masked end
    share: Floats  # [N, J] share of all positions that are masked
    loss: Floats  # [N, J, K] nats
    right: Floats  # [N, J, K] 1 where the next digit is the most probable; NaN for text
    hidden_change: Floats  # [N, J, K] ||H(k) - H(k-1)|| / ||H(k)||
    output_change: Floats  # [N, J, K] mean over masked positions of KL(p_k || p_(k-1)), nats
    flips: Floats  # [N, J, K] masked positions whose most probable token is another after loop k

    @property
    def max_loops(self) -> int:
        return int(self.loss.shape[2])

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which states exist, [N, J]."""
        return ~np.isnan(self.share)

    def __getitem__(self, which: Any) -> Trace:
        """The same of some of the sequences."""
        return Trace(*(getattr(self, field.name)[which] for field in fields(self)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        return {field.name: _listed(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def joined(cls, rows: Sequence[dict[str, Any]]) -> Trace:
        """The traces that `to_dict` wrote, one after the other; sequences with fewer states are padded."""
        parts = [{name: np.array(value, dtype=float) for name, value in row.items()} for row in rows]
        most = max(part["share"].shape[1] for part in parts)

        def padded(array: Floats) -> Floats:
            extra = [(0, 0), (0, most - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
            return np.pad(array, extra, constant_values=np.nan)

        return cls(*(np.concatenate([padded(p[field.name]) for p in parts]) for field in fields(cls)))


class LoopStates(NamedTuple):
    """What one loop left of b states."""

    log_probs: Tensor  # [R, V] float32 at the masked positions, the mask excluded
    hidden_change: Tensor  # [b] float64
    output_change: Tensor  # [b] float64
    flips: Tensor  # [b] float64


def loop_states(stages: Stages, max_loops: int) -> Iterator[LoopStates]:
    """The states after loop 1..max_loops of one forward pass."""
    rule = HiddenChange(0.0)
    sequence = stages.masked.nonzero()[:, 0]
    masked = stages.masked.sum(1).double()

    def summed(rows: Tensor) -> Tensor:
        return torch.zeros_like(masked).index_add(0, sequence, rows.double())

    hidden = stages.before()
    before = _log_probs(stages, hidden)
    for loop in range(max_loops):
        new = stages.loop(hidden, done=loop)
        after = _log_probs(stages, new)
        divergence = (after.exp() * (after - before)).sum(1)
        flips = after.argmax(1) != before.argmax(1)
        mean = summed(divergence).clamp_min(0) / masked.clamp_min(1)
        yield LoopStates(after, rule.change(stages, hidden, new), mean, summed(flips))
        hidden, before = new, after


def _log_probs(stages: Stages, hidden: Tensor) -> Tensor:
    """log p at the masked positions of all sequences, [R, V] float32."""
    model = stages.model
    logits = vocabulary.head_logits(
        stages.after(hidden), model.head(stages.sigma), compute_dtype=model.compute_dtype
    )
    rows = logits[stages.masked].float()
    rows[:, model.config.mask_token_id] = vocabulary.NEVER
    return rows.log_softmax(1)


@torch.no_grad()
def left_to_right_trace(
    model: LoopMDM, clues: NDArray[Any], solutions: NDArray[Any], max_loops: int
) -> Trace:
    """The trace of puzzles [N, cells], digits from 1, 0 a blank, each with at least one blank."""
    config = model.config
    tokens = torch.from_numpy(solutions.astype(np.int64) - 1)
    blank = torch.from_numpy(clues == 0)
    count = blank.sum(1)
    number, position = blank.nonzero(as_tuple=True)
    rank = (blank.cumsum(1) - 1)[number, position]
    # Cells behind the blank that is next, and that blank, are masks unless they are clues.
    hidden = blank[number] & (torch.arange(config.max_length) >= position[:, None])
    states = torch.where(hidden, config.mask_token_id, tokens[number])
    target = tokens[number, position]
    values = np.full((5, len(tokens), int(count.max()), max_loops), np.nan)
    place = np.full(values.shape[1:3], np.nan)
    share = place.copy()
    place[number, rank] = 1.0 - (count[number] - rank) / count[number]
    share[number, rank] = hidden.double().mean(1)
    for part in torch.split(torch.arange(len(states)), _states_at_once(model)):
        stages = model.stages(states[part].to(model.device))
        row = hidden[part].flatten().cumsum(0).view(len(part), -1)[torch.arange(len(part)), position[part]]
        for k, state in enumerate(loop_states(stages, max_loops)):
            predicted = state.log_probs[row - 1].cpu()
            loss = -predicted.gather(1, target[part, None])[:, 0]
            right = predicted.argmax(1) == target[part]
            columns = (loss, right, state.hidden_change, state.output_change, state.flips)
            for array, column in zip(values, columns, strict=True):
                array[number[part], rank[part], k] = column.double().cpu()
    return Trace(place, share, *values)


@torch.no_grad()
def text_trace(model: LoopMDM, batch: Batch, num_t: int, seed: int, first: int, max_loops: int) -> Trace:
    """The trace of a batch at one time in each of `num_t` bins of t, those of `evaluate_nll`.

    first: index of the batch's first sequence; seed: of times and masks.
    """
    noisy_at = stratified(batch, num_t, seed, first)[::-1]
    counted = counted_tokens(batch).sum(1).double()
    values = np.full((5, len(counted), num_t, max_loops), np.nan)
    place, share = np.empty(values.shape[1:3]), np.empty(values.shape[1:3])
    for j, noisy in enumerate(noisy_at):
        stages = noisy.stages(model)
        place[:, j] = 1.0 - noisy.t.double()
        share[:, j] = noisy.masked.double().mean(1)
        sequence = noisy.masked.nonzero()[:, 0]
        target = noisy.clean[noisy.masked][:, None]
        weight = num_t * counted * noisy.t.double()
        for k, state in enumerate(loop_states(stages, max_loops)):
            cross_entropy = -state.log_probs.cpu().gather(1, target)[:, 0].double()
            loss = torch.zeros_like(counted).index_add(0, sequence, cross_entropy) / weight
            columns = (loss, state.hidden_change, state.output_change, state.flips)
            for index, column in zip((0, 2, 3, 4), columns, strict=True):
                values[index, :, j, k] = column.cpu()
    return Trace(place, share, *values)


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Options of the studies that record a trace."""
    parser.add_argument(
        "--cap", type=num_loops, metavar="S", help="most loops (default: the model's max_loops)"
    )
    parser.add_argument(
        "--num-t",
        type=positive_int,
        default=16,
        metavar="N",
        help="text and whole boards: times per sequence (default: %(default)s)",
    )


def record_trace(
    folder: StudyFolder,
    model: LoopMDM,
    data: HeldOut,
    max_loops: int,
    *,
    num_t: int,
    seed: int,
    name: str = "model",
) -> Trace:
    """The trace of all sequences; batches that an earlier run finished are read from the folder.

    name: tells apart the models of a study.
    """

    def record(key: str) -> dict[str, Any]:
        number = int(key.rpartition(" ")[2])
        batch = data.batches[number]
        if not data.puzzles:
            return text_trace(model, batch, num_t, seed, number * BATCH, max_loops).to_dict()
        assert batch.prompt_mask is not None
        solutions = batch.input_ids.numpy() + 1
        return left_to_right_trace(
            model, np.where(batch.prompt_mask.numpy(), solutions, 0), solutions, max_loops
        ).to_dict()

    keys = [f"trace of {name} {number}" for number in range(len(data.batches))]
    return Trace.joined(folder.items(keys, record, "batches traced"))


def _states_at_once(model: LoopMDM) -> int:
    """As many states as keep the logits of all their positions within 2^24 numbers."""
    return max(1, 2**24 // (model.config.max_length * model.config.vocab_size * 4))


def _listed(array: Floats) -> Any:
    """Nested lists of numbers of a few digits."""
    if array.ndim == 1:
        return [None if np.isnan(v) else float(f"{v:.{_DIGITS}g}") for v in array.tolist()]
    return [_listed(row) for row in array]


def bins_of(trace: Trace, bins: int) -> NDArray[np.int64]:
    """The bin of each state's place, [N, J]; 0 where there is no state."""
    place = np.nan_to_num(trace.place)
    return np.minimum((place * bins).astype(np.int64), bins - 1)
