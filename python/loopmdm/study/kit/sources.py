"""What studies are run on: models, each with a number of loops, and sequences they have not seen."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from loopmdm.data.batches import Batch
from loopmdm.data.sudoku import SudokuSpec
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.runs import text_data
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.held_out import add_text_options, held_out_text
from loopmdm.runs.models import load_model, sudoku_spec
from loopmdm.runs.options import UsageError, count, usage_errors
from loopmdm.runs.provenance import describe_model
from loopmdm.study.kit.folder import StudyFolder
from loopmdm.view.symbols import BoardSymbols, Symbols, TextSymbols

MODEL_HELP = "folder, hub id or shipped model; MODEL@S runs it with S loops (default: its max_loops)"
BATCH = 16


class Denoiser(NamedTuple):
    """A model and how often its loop runs."""

    name: str
    model: LoopMDM
    num_loops: int


class HeldOut(NamedTuple):
    """Sequences no model was trained on. Clues of boards are prompts."""

    batches: list[Batch]  # of BATCH sequences, the last one perhaps of fewer
    symbols: Symbols
    spec: SudokuSpec | None  # None: text
    description: str
    bytes_per_token: float | None
    tokenizer: Tokenizer | None = None

    @property
    def puzzles(self) -> bool:
        """Whether these are boards with clues, to be solved."""
        return self.spec is not None and self.batches[0].prompt_mask is not None

    @property
    def num_sequences(self) -> int:
        return sum(len(batch.input_ids) for batch in self.batches)


def add_whole_boards(parser: argparse.ArgumentParser) -> None:
    """An option for studies that mask held-out sequences and do not solve them."""
    parser.add_argument(
        "--whole-boards",
        action="store_true",
        help="Sudoku: solved boards without clues, masked anywhere, as in `loopmdm train --clues none`",
    )


def add_data(parser: argparse.ArgumentParser, windows: int = 256) -> None:
    """Options for held-out sequences, and the seed of their masks."""
    text = parser.add_argument_group("held-out sequences (text; Sudoku models get puzzles made here)")
    add_text_options(text, windows)
    parser.add_argument(
        "--seed", type=count, default=0, help="of times, masks and resamples (default: %(default)s)"
    )


def split_loops(text: str) -> tuple[str, int | None]:
    """ "run@3" is the model in `run` with 3 loops; "run" is that model with its max_loops."""
    name, at, loops = text.rpartition("@")
    if not at or not loops.isdecimal():
        return text, None
    if not int(loops) or not name:
        raise UsageError(f"{text}: expected MODEL or MODEL@S with S >= 1")
    return name, int(loops)


def load_denoisers(
    args: argparse.Namespace, folder: StudyFolder, sources: Sequence[str], **overrides: Any
) -> list[Denoiser]:
    """Load each model once; all must have one vocabulary. `overrides` replace fields of their configuration.

    The models are named in the folder's provenance, and a folder goes on only with the same weights.
    """
    models: dict[str, LoopMDM] = {}
    denoisers = []
    for source in sources:
        name, loops = split_loops(source)
        if name not in models:
            models[name] = load_model(name, args.device_object, **overrides)
            described = describe_model(name, models[name])
            folder.facts.setdefault("models", {})[source if overrides else name] = described
            with usage_errors():
                folder.pin(f"weights of {name}", described["weights"])
        denoisers.append(Denoiser(source, models[name], loops or models[name].config.max_loops))
    check_vocabularies(denoisers)
    return denoisers


def check_vocabularies(denoisers: Sequence[Denoiser]) -> None:
    """All of one vocabulary, or an error of usage."""
    first = denoisers[0]
    for other in denoisers[1:]:
        vocabularies = [(d.model.config.vocab_size, d.model.config.mask_token_id) for d in (first, other)]
        if vocabularies[0] != vocabularies[1]:
            raise UsageError(
                f"{first.name} has vocabulary size and mask {vocabularies[0]}, {other.name} {vocabularies[1]}"
                "; models that are compared share both"
            )


def held_out(args: argparse.Namespace, folder: StudyFolder, denoiser: Denoiser) -> HeldOut:
    """The sequences the options of `add_data` mean for a model."""
    spec = sudoku_spec(denoiser.model)
    name, _ = split_loops(denoiser.name)
    if spec is None and getattr(args, "whole_boards", False):
        raise UsageError(f"--whole-boards: {name} is a model of text")
    data = _text(args, denoiser.model, name) if spec is None else _puzzles(args, spec)
    digest = hashlib.blake2b(digest_size=8)
    for batch in data.batches:
        digest.update(batch.input_ids.numpy().data)
    with usage_errors():
        folder.pin("data", digest.hexdigest())
    folder.facts |= {
        "data": data.description,
        "sequences": data.num_sequences,
        "length": data.batches[0].input_ids.shape[1],
    }
    return data


def _text(args: argparse.Namespace, model: LoopMDM, name: str) -> HeldOut:
    text = held_out_text(args, model, name)
    windows = text_data.windows(text.data, text.tokenizer, args.windows)
    return HeldOut(
        windows.batches,
        TextSymbols(text.tokenizer),
        None,
        text.description,
        windows.bytes_per_token,
        text.tokenizer,
    )


def _puzzles(args: argparse.Namespace, spec: SudokuSpec) -> HeldOut:
    if args.data is not None:
        raise UsageError(f"--data: the model solves {spec} Sudoku; its puzzles are made here")
    whole = getattr(args, "whole_boards", False)  # an option of some studies
    made = held_out_puzzles(spec, args.windows)
    tokens, given = torch.from_numpy(made.solutions).long() - 1, torch.from_numpy(made.clues != 0)
    batches = [
        Batch(tokens[start : start + BATCH], prompt_mask=None if whole else given[start : start + BATCH])
        for start in range(0, len(tokens), BATCH)
    ]
    kind = (
        "solved boards made here, all cells to predict" if whole else "puzzles made here, blanks to predict"
    )
    return HeldOut(batches, BoardSymbols(spec), spec, f"held-out {spec} {kind}", None)
