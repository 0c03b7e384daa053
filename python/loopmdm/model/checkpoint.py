"""Checkpoints on disk: a folder with config.json and model.safetensors.

`fill` is the one place where tensors of any file enter a model: names, shapes and values are checked there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loopmdm.formats import hub, safetensors_files
from loopmdm.printable import printable
from loopmdm_kernels.files import write_files
from loopmdm_kernels.values import parse_json

if TYPE_CHECKING:
    from loopmdm.model import LoopMDM
    from loopmdm.quality.causal import CausalLM

    Model = TypeVar("Model", LoopMDM, CausalLM)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# What config.json may name as its model_type (LoopMDM where it names none), and how it is used.
MODEL_TYPES = {
    "loopmdm": "a diffusion model, which LoopMDM.from_pretrained reads",
    "loopmdm-causal": "an autoregressive scorer (loopmdm train --autoregressive): it rates samples and makes"
    " none (loopmdm.quality.load_scorer)",
}
_SHOWN_DIFFERENCES = 20
_FEWEST_TENSORS_OF_A_BLOCK = 4


def save_pretrained(model: LoopMDM | CausalLM, path: str | os.PathLike[str]) -> None:
    """Write `model` into the folder `path` (made if missing); existing files are replaced whole or kept.

    Raises:
        OSError: the files cannot be written (full disk, permissions); no partial file is left.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path: got the file {folder}, expected a folder")
    tensors = model.state_dict()
    write_files(
        {
            folder / WEIGHTS_FILE: lambda temporary: safetensors_files.write(
                temporary, tensors, {"format": "pt"}
            ),
            folder / CONFIG_FILE: _config_text(model),
        }
    )


def write_config(model: LoopMDM | CausalLM, path: str | os.PathLike[str]) -> None:
    """Write config.json alone into the folder `path`, beside weights that another trainer has written."""
    write_files({Path(path) / CONFIG_FILE: _config_text(model)})


def _config_text(model: LoopMDM | CausalLM) -> str:
    return json.dumps({"model_type": model.model_type, **model.config.to_dict()}, indent=2) + "\n"


def load_pretrained(
    cls: type[Model],
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    config: Any = None,
    **config_overrides: Any,
) -> Model:
    """Load what `save_pretrained` wrote, on the CPU, in eval mode.

    Half-precision files are widened to fp32; float64 stays float64.

    Args:
        cls: the model class, called with its `config_class`.
        path_or_hub_id: a local folder, or "owner/name" on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        config: of the `config_class`, in place of config.json; None: that file is read.
        config_overrides: replace fields of the stored configuration (such as `max_loops`, `dropout`).

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: damaged or foreign files, unknown fields, tensors that do not fit, NaN or infinity.
    """
    if config is None:
        config = _read_config(cls, path_or_hub_id, revision, config_overrides)
    else:
        config = cls.config_class.from_dict({**config.to_dict(), **config_overrides})
    weights_path, tensors = _read_weights(path_or_hub_id, revision)
    if config.num_layers * _FEWEST_TENSORS_OF_A_BLOCK > len(tensors):
        raise ValueError(
            f"{weights_path}: num_layers is {config.num_layers}, but the weights are {len(tensors)} tensors"
        )
    _check_sizes(config, tensors, str(weights_path))
    with torch.device("meta"):
        model = cls(config)
    fill(model, tensors, str(weights_path))
    return model.eval()


def _read_weights(
    path_or_hub_id: str | os.PathLike[str], revision: str | None
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a folder, in one file or in shards, and the path to name in errors."""
    from loopmdm.formats import shards

    index = shards.find_index(Path(path_or_hub_id))
    if index is None:
        path = locate(path_or_hub_id, WEIGHTS_FILE, revision)
        return path, read_safetensors(path)
    return Path(path_or_hub_id) / index, shards.read_shards(path_or_hub_id, index, revision)


def _check_sizes(config: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Before anything of the configuration's size is made: no size may exceed the elements of the file."""
    elements = sum(tensor.numel() for tensor in tensors.values())
    for name in ("hidden_size", "vocab_size", "cond_dim", "mlp_ratio", "num_layers"):
        size = getattr(config, name)
        if size > elements:
            raise ValueError(f"{source}: {name} is {size}, but the weights have {elements} elements together")
    if config.vocab_size * config.hidden_size > 2**16 * elements:
        raise ValueError(
            f"{source}: an embedding of {config.vocab_size} x {config.hidden_size} is stated, but the "
            f"weights have {elements} elements together"
        )


def _read_config(
    cls: type[Model], path_or_hub_id: str | os.PathLike[str], revision: str | None, overrides: dict[str, Any]
) -> Any:
    config_path = locate(path_or_hub_id, CONFIG_FILE, revision)
    fields = read_json(config_path)
    model_type = fields.pop("model_type", next(iter(MODEL_TYPES)))
    if model_type != cls.model_type:
        known = MODEL_TYPES.get(model_type)
        raise ValueError(
            f"{config_path}: model_type is {model_type!r}, expected {cls.model_type!r}; "
            + (f"this is {known}" if known else "MDLM checkpoints are read by LoopMDM.from_mdlm")
        )
    try:
        return cls.config_class.from_dict({**fields, **overrides})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{config_path}: {error}") from error


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give `model` (which may be on the meta device) copies of `tensors`, if names and shapes fit exactly.

    Those that are the same memory become one parameter.

    Raises:
        ValueError: with a table of the differences, or the name of a tensor without values or not finite.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_same(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    double = all(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    copies = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: tensor {printable(name)} has dtype {tensor.dtype}, "
                "expected a floating-point dtype"
            )
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise ValueError(f"{source}: tensor {name} holds no values (it is on the meta device, or fake)")
        copies[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        # One pass: minimum and maximum are NaN where any value is.
        if tensor.numel() and not torch.stack(torch.aminmax(copies[name])).isfinite().all():
            count = int((~torch.isfinite(copies[name])).sum())
            raise ValueError(
                f"{source}: tensor {printable(name)} holds {count} values that are NaN or infinite"
            )
    model.load_state_dict(copies, strict=True, assign=True)
    safetensors_files.tie(model, safetensors_files.tied_names(tensors), source)


def check_same(
    expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise a `ValueError` that lists names and shapes in which `got` differs from `expected`."""
    rows = []
    for name in [*expected, *(name for name in got if name not in expected)]:
        if name not in got:
            rows.append((printable(name), str(list(expected[name])), "missing"))
        elif name not in expected:
            rows.append((printable(name), "no such tensor", str(list(got[name]))))
        elif expected[name] != got[name]:
            rows.append((printable(name), str(list(expected[name])), str(list(got[name]))))
    if not rows:
        return
    shown = [("tensor", "expected", "in the file"), *rows[:_SHOWN_DIFFERENCES]]
    widths = [max(len(row[column]) for row in shown) for column in range(2)]
    lines = [f"  {name:<{widths[0]}}  {want:<{widths[1]}}  {have}" for name, want, have in shown]
    if len(rows) > _SHOWN_DIFFERENCES:
        lines.append(f"  ... and {len(rows) - _SHOWN_DIFFERENCES} more")
    raise ValueError(
        f"{source}: {len(rows)} of {len(expected)} tensors do not fit the model\n" + "\n".join(lines)
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose digest, if stated, is right; tied ones under each name."""
    safetensors_files.check(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            tied = safetensors_files.aliases(file.metadata(), set(tensors))
            return {**tensors, **{alias: tensors[kept] for alias, kept in tied.items()}}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {printable(error)}") from error


def locate(path_or_hub_id: str | os.PathLike[str], name: str, revision: str | None = None) -> Path:
    """The local path of file `name` of a checkpoint folder, downloaded from the hub if it is not local."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a checkpoint folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
        return folder / name
    if folder.exists() or not hub.is_hub_id(path_or_hub_id):
        raise FileNotFoundError(
            f"path_or_hub_id: got {str(path_or_hub_id)!r}, "
            "expected a checkpoint folder or a hub id such as 'owner/name'"
        )
    missing = f"path_or_hub_id: {str(path_or_hub_id)!r} is not a local folder"
    return hub.fetch(str(path_or_hub_id), name, revision=revision, missing=missing)
