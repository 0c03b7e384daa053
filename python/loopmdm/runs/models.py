"""The models commands work with: a folder, a hub id, or a checkpoint that ships with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from loopmdm.data import tokenizer as tokenizers
from loopmdm.data.sudoku import NINE, SIX, SudokuSpec
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.runs.options import of_option
from loopmdm_kernels.values import meant

SHIPPED = {"sudoku9": NINE, "sudoku6": SIX}


def shipped_folder(name: str) -> Path:
    """Where the checkpoint `name` of `SHIPPED` lies.

    Raises:
        FileNotFoundError: this installation does not have it.
    """
    folder = Path(str(files("loopmdm"))) / "checkpoints" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the checkpoint {name} does not come with this installation (looked in {folder});"
            " train one with `loopmdm train` and give its folder"
        )
    return folder


def load_model(source: str, device: torch.device, **overrides: Any) -> LoopMDM:
    """The model `source` stands for: a name of `SHIPPED` (a folder of that name comes first), or what
    `LoopMDM.from_pretrained` reads; in eval mode on the device. `overrides` replace fields of its
    configuration."""
    path: Any = shipped_folder(source) if source in SHIPPED and not Path(source).exists() else source
    try:
        model = LoopMDM.from_pretrained(path, **overrides)
    except FileNotFoundError as error:
        close = meant(source, SHIPPED)
        if not close:
            raise
        raise FileNotFoundError(f"{error}{close}") from error
    return model.to(device).eval()


def sudoku_spec(model: LoopMDM) -> SudokuSpec | None:
    """The board a model was made for, None for a model of text."""
    config = model.config
    for spec in SHIPPED.values():
        made_for = (config.vocab_size, config.mask_token_id, config.max_length)
        if made_for == (spec.vocab_size, spec.mask_token_id, spec.cells):
            return spec
    return None


def default_loops(model: LoopMDM) -> list[int]:
    """Loop counts that show what looping does: one, half of the largest in training, and that."""
    most = model.config.max_loops
    return sorted({1, max(1, most // 2), most})


def load_tokenizer(model: LoopMDM, folder: str, chosen: str | None) -> Tokenizer | None:
    """The tokenizer `chosen`, else the one saved in the model's folder, else None.

    Raises:
        ValueError: it is not the model's: its size or its mask differs.
    """
    if chosen is None and not Path(folder, tokenizers.CONFIG_FILE).is_file():
        return None
    source = folder if chosen is None else chosen
    with of_option(None if chosen is None else "--tokenizer"):
        tokenizer = tokenizers.load_tokenizer(source)
        config = model.config
        if (tokenizer.vocab_size, tokenizer.mask_token_id) != (config.vocab_size, config.mask_token_id):
            raise ValueError(
                f"the tokenizer {source} has {tokenizer.vocab_size} tokens and mask id"
                f" {tokenizer.mask_token_id}, the model in {folder} has {config.vocab_size} and"
                f" {config.mask_token_id}: not a pair"
            )
    return tokenizer
