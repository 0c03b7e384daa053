"""The weights that a run begins with, where they are not new ones: those of a checkpoint, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopmdm.formats.folders import CONFIG_FILE, read_json
from loopmdm.mdlm.weights import holds_one_set
from loopmdm.model import LoopMDM
from loopmdm.model.between import between_of
from loopmdm.model.checkpoint import check_same
from loopmdm.model.config import OFF
from loopmdm.runs.options import UsageError, of_option
from loopmdm.train.checkpoints import CHECKPOINTS

LORA_TARGETS = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")
_VOCABULARY = ("vocab_size", "mask_token_id")  # the tokenizer's
# What a checkpoint's weights do not depend on, and a run may choose.
_FREE = (
    "loop_start",
    "loop_end",
    "max_loops",
    "dropout",
    "max_length",
    "gate_init",
    "key_padding_mask",
    "damped",
)
# What a run may add to weights that have none of it, with the values that say so.
_ADDED = {name: off for name, off in OFF.items() if name != "damped"}


def read_initial(source: str, *, ema: bool = True) -> LoopMDM:
    """The model of `--init-from`: a folder of a run or of transformers, or what `LoopMDM.from_mdlm` reads.

    ema: of a Lightning checkpoint the averaged weights, else the raw ones.

    Raises:
        FileNotFoundError, ValueError: it is none, or damaged.
        UsageError: not `ema`, and the model has no other weights.
    """
    folder = Path(source)
    if (folder / CHECKPOINTS).is_dir() and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"--init-from: {source} is a run that has not ended; `loopmdm convert` exports it")
    with of_option("--init-from"):
        if (folder / CONFIG_FILE).is_file() and _is_ours(folder / CONFIG_FILE):
            model = LoopMDM.from_pretrained(source)
        else:
            model = LoopMDM.from_mdlm(source, ema=ema)
    if not ema:
        check_raw(source)
    return model


def check_raw(source: str) -> None:
    """Raise a UsageError where `--no-ema` has nothing to choose, of a source that can be read."""
    if holds_one_set(source):
        raise UsageError(f"--no-ema is of Lightning checkpoints; {source} holds one set of weights")


def _is_ours(path: Path) -> bool:
    # What is of another kind of ours is refused by name where it is read.
    return str(read_json(path).get("model_type", "loopmdm")).startswith("loopmdm")


def model_fields(source: LoopMDM, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration of a run that begins with the weights of `source`.

    given: those that were asked for.

    Raises:
        UsageError: one of them is not that of the weights.
    """
    fields = source.config.to_dict()
    for name in _VOCABULARY:
        del fields[name]
    for name, value in given.items():
        added = name in _ADDED and fields[name] == _ADDED[name]
        if name not in _FREE and not added and fields[name] != value:
            raise UsageError(
                f"--init-from: the model has {name} {fields[name]!r}, got {value!r}; leave the option out"
            )
    return {**fields, **given}


def begin_with(model: LoopMDM, source: LoopMDM, name: str) -> None:
    """Copy the weights of `source`, which was read from `name`, into a new model.

    Those between loops that `source` has none of stay new.

    Raises:
        ValueError: they do not fit, as with the data of another tokenizer.
    """
    wanted, have = model.config, source.config
    if any(getattr(wanted, field) != getattr(have, field) for field in _VOCABULARY):
        raise ValueError(
            f"--init-from: {name} has {have.vocab_size} tokens and mask id {have.mask_token_id}, but the"
            f" tokenizer of the data {wanted.vocab_size} and {wanted.mask_token_id}: not a pair"
        )
    tensors = between_of(model.state_dict()) | source.state_dict()
    expected, got = (
        {key: tuple(value.shape) for key, value in of.items()} for of in (model.state_dict(), tensors)
    )
    check_same(expected, got, f"--init-from {name}")
    model.load_state_dict(tensors)


def check_targets(targets: list[str]) -> None:
    """Raise a UsageError where one is no matrix of a block."""
    unknown = [target for target in targets if target not in LORA_TARGETS]
    if unknown:
        raise UsageError(f"--lora-targets: got {unknown[0]}, expected some of {', '.join(LORA_TARGETS)}")


def add_lora(model: LoopMDM, rank: int, targets: list[str], seed: int) -> None:
    """Put adapters of peft on matrices of the blocks, and freeze all else but what acts between loops.

    A function of the seed.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("--lora needs a package: pip install peft") from error
    names = [f"blocks.{block}.{target}" for block in range(model.config.num_layers) for target in targets]
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    if model.config.learns_between_loops:
        model.between.requires_grad_(True)
