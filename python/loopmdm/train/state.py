"""The file a run is resumed from: one safetensors file with everything that changes during training.

Tensors are named `model.*` (the state_dict), `ema.*`, `exp_avg.*` and `exp_avg_sq.*` (by parameter name). The
counters and the configuration are JSON in the header. There is nothing to unpickle.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from loopmdm.formats import safetensors_files
from loopmdm.model.checkpoint import check_same
from loopmdm.train.ema import EMA
from loopmdm.train.optimizers import Optimizer
from loopmdm.train.parallel import put
from loopmdm_kernels.files import staging_folder
from loopmdm_kernels.values import parse_json

STATE_FILE = "training_state.safetensors"
_HEADER_KEY = "loopmdm_training_state"


class CheckpointError(OSError):
    """A checkpoint could not be written; the previous one is intact."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write files in; at the end of the `with` block they replace those of `folder` atomically.

    A failure, or a kill at any moment, leaves the previous files as they were.
    """
    try:
        with staging_folder(folder) as staging:
            yield staging
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint in {folder}, the previous one is intact: {error}"
        ) from error


def tensors_of(model: nn.Module, ema: EMA, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by the names of the files; the memory is that of the run."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in zip(ema.names, ema.shadow, strict=True)}
    return tensors | optimizer.moments()


def counted(metadata: dict[str, Any], ema: EMA, optimizer: Optimizer) -> dict[str, Any]:
    """`metadata`, and the numbers that belong to `tensors_of`."""
    return metadata | {"ema_updates": ema.updates, "adam_steps": optimizer.steps}


def write_state(
    path: Path, model: nn.Module, ema: EMA, optimizer: Optimizer, metadata: dict[str, Any]
) -> None:
    """Write the state of a run; `metadata` holds JSON values."""
    header = {_HEADER_KEY: json.dumps(counted(metadata, ema, optimizer))}
    safetensors_files.write(path, tensors_of(model, ema, optimizer), header)


def read_metadata(path: Path) -> dict[str, Any]:
    """The counters and the configuration in a state file, whose digest is compared first.

    Warns:
        UserWarning: the file states no digest.
    """
    try:
        has_digest = safetensors_files.check(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file: {error}") from error
    metadata = _metadata(path)
    check_ranges(path, metadata)
    if not has_digest:
        warnings.warn(
            f"{path} states no digest (earlier versions wrote none): damage to its tensors would not be seen",
            stacklevel=2,
        )
    return metadata


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(_HEADER_KEY)
    if header is None:
        raise ValueError(f"{path} is no training state of loopmdm (its header lacks {_HEADER_KEY!r})")
    try:
        metadata: dict[str, Any] = parse_json(header)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its metadata are no JSON: {error}") from error
    return metadata


def check_ranges(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse counters that no run has, such as one without a digest may hold."""
    fields = {"config", "counters", "world_size", "torch", "ema_updates", "adam_steps"}
    if not isinstance(metadata, dict) or set(metadata) != fields:
        raise ValueError(f"{path} is damaged: its metadata are not those of a training state")
    counters, config = metadata["counters"], metadata["config"]
    step: Any = counters.get("step") if isinstance(counters, dict) else None
    last: Any = config.get("steps") if isinstance(config, dict) else None
    whole = all(type(value) is int for value in (step, last, metadata["ema_updates"], metadata["adam_steps"]))
    numbers = counters.values() if whole else ()
    if not (
        whole
        and all(type(value) in (int, float) and 0 <= value < math.inf for value in numbers)
        and 0 <= step <= last
        and metadata["ema_updates"] == step
        and metadata["adam_steps"] <= step
        and (metadata["adam_steps"] > 0) == (step > 0)
    ):
        raise ValueError(f"{path} is damaged: its counters contradict each other or its configuration")


def read_state(path: Path, model: nn.Module, ema: EMA, optimizer: Optimizer) -> None:
    """Put the state of a run into a model, its average and its optimizer, strictly by name and shape.

    `read_metadata` has found the file whole before.
    """
    metadata = _metadata(path)
    optimizer.begin(int(metadata["adam_steps"]))
    current = tensors_of(model, ema, optimizer)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        tied = safetensors_files.aliases(file.metadata(), set(found))
        found |= {alias: found[kept] for alias, kept in tied.items()}
        check_same({name: tuple(value.shape) for name, value in current.items()}, found, str(path))
        with torch.no_grad():
            for name, value in current.items():
                put(value, file.get_tensor(tied.get(name, name)))
    ema.updates = int(metadata["ema_updates"])
