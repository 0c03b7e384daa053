"""A run's checkpoint in shards turned into the one-file form: config.json, model.safetensors, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loopmdm.model import LoopMDM
from loopmdm.model.checkpoint import Trainable, fill
from loopmdm.quality.causal import CausalLM
from loopmdm.runs.initial import add_lora
from loopmdm.runs.run_file import RunFile
from loopmdm.runs.text_data import TOKENIZER_FILE, load_tokenizer
from loopmdm.train.checkpoints import Found, newest, read_averaged

_MODELS: dict[str, type[Trainable]] = {kind.model_type: kind for kind in (LoopMDM, CausalLM)}


def export_run(
    source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> tuple[Found, dict[str, Any]]:
    """Write the averaged weights of the newest checkpoint of the run `source` into the folder `target`.

    Returns:
        The checkpoint, and the configuration of its model.

    Raises:
        ValueError: the run has no checkpoint in shards, or a damaged one.
    """
    found = newest(Path(source))
    if found is None or not found.sharded:
        raise ValueError(f"{source} holds no whole checkpoint in shards that is newer than its other files")
    config = dict(found.model)
    kind = _MODELS.get(config.pop("model_type"))
    if kind is None:
        raise ValueError(f"{found.path} is of a model that is not known here: {found.model}")
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(config))
    run = RunFile.read(Path(source))
    if run is not None and run.lora and isinstance(model, LoopMDM):
        add_lora(model, run.lora["rank"], run.lora["targets"], 0)
    fill(model, read_averaged(found), str(found.path))
    with tokenizer_copied(source, target):
        model.save_pretrained(target)
    return found, config


@contextmanager
def tokenizer_copied(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Iterator[None]:
    """The tokenizer of the run `source`, if it is one that has any, is read before the `with` block, which is
    not entered where it is damaged, and written into the folder `target` after it.
    """
    tokenizer = load_tokenizer(source) if Path(source, TOKENIZER_FILE).is_file() else None
    yield
    if tokenizer is not None:
        tokenizer.save(target)
