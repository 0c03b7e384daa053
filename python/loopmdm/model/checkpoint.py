"""Checkpoints on disk: a folder with config.json and model.safetensors.

`fill` is the one place where tensors of any file enter a model: names, shapes and values are checked there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loopmdm.formats import safetensors_files, shards
from loopmdm.formats.folders import CONFIG_FILE, WEIGHTS_FILE, locate, read_json
from loopmdm.model.adapters import plain_state
from loopmdm.printable import printable, shown
from loopmdm_kernels.files import write_files

# What config.json may name as its model_type (LoopMDM where it names none), and how it is used.
MODEL_TYPES = {
    "loopmdm": "a diffusion model, which LoopMDM.from_pretrained reads",
    "loopmdm-causal": "an autoregressive scorer (loopmdm train --autoregressive): it rates samples and makes"
    " none (loopmdm.quality.load_scorer)",
}
Model = TypeVar("Model", bound="Trainable")
_SHOWN_DIFFERENCES = 20
# What transformers notes in a config.json beside the model's own fields.
_NOTES_OF_TRANSFORMERS = {
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "suppress_mask_token",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_PREFIX = "model."  # of the weights of a `loopmdm.hf.LoopMDMForMaskedLM`
_FEWEST_TENSORS_OF_A_BLOCK = 4


class Trainable(nn.Module):
    """A network with a loss that `Trainer` trains, kept in a folder as config.json and model.safetensors."""

    model_type: ClassVar[str]
    config_class: ClassVar[Any]
    config: Any
    recompute: bool
    backprop_loops: int
    loop_loss: str
    loss: Callable[..., Any]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # keep for backward what a loop or a block begins with, and no more
        self.backprop_loops = 0  # differentiate through so many last loops only; 0: through all
        self.loop_loss = "last"  # which loops `loss` reads out where gradients are taken: see `model.between`

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into the folder `path`, each one whole or not at all.

        LoRA adapters of peft inside the model are merged in the file.

        Raises:
            OSError: the files cannot be written (full disk, permissions); no partial file is left.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"path: got the file {folder}, expected a folder")
        tensors = plain_state(self)
        write_files(
            {
                folder / WEIGHTS_FILE: lambda temporary: safetensors_files.write(
                    temporary, tensors, {"format": "pt"}
                ),
                folder / CONFIG_FILE: _config_text(self),
            }
        )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        config: Any = None,
        **overrides: Any,
    ) -> Model:
        """Load what `save_pretrained` wrote, from a folder or a Hugging Face hub id, on the CPU in eval mode.

        Half-precision files are widened to fp32; float64 stays float64.

        Args:
            path_or_hub_id: a local folder, or "owner/name" on the Hugging Face hub.
            revision: branch, tag or commit on the hub.
            config: in place of a config.json, which checkpoints of other trainers may lack; None: the file's.
            overrides: replace fields of the stored configuration (such as `max_loops`, `dropout`).

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: damaged or foreign files, unknown fields, tensors that do not fit, NaN or infinity.
        """
        if config is None:
            config = _read_config(cls, path_or_hub_id, revision, overrides)
        else:
            config = cls.config_class.from_dict({**config.to_dict(), **overrides})
        path, tensors = _read_weights(path_or_hub_id, revision)
        _check_sizes(config, tensors, str(path))
        with torch.device("meta"):
            model = cls(config)
        fill(model, tensors, str(path))
        return model.eval()


def write_config(model: Trainable, path: str | os.PathLike[str]) -> None:
    """Write config.json alone into the folder `path`, beside weights that another trainer has written."""
    write_files({Path(path) / CONFIG_FILE: _config_text(model)})


def _config_text(model: Trainable) -> str:
    return json.dumps({"model_type": model.model_type, **model.config.to_dict()}, indent=2) + "\n"


def _read_weights(
    path_or_hub_id: str | os.PathLike[str], revision: str | None
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a folder, in one file or in shards, and the path to name in errors."""
    index = shards.find_index(Path(path_or_hub_id))
    if index is None:
        path = locate(path_or_hub_id, WEIGHTS_FILE, revision)
        tensors = safetensors_files.read(path)
    else:
        path = Path(path_or_hub_id) / index
        tensors = shards.read_shards(path_or_hub_id, index, revision)
    if all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return path, tensors


def _check_sizes(config: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Before anything of the configuration's size is made: no size may exceed the elements of the file."""
    if config.num_layers * _FEWEST_TENSORS_OF_A_BLOCK > len(tensors):
        raise ValueError(
            f"{source}: num_layers is {config.num_layers}, but the weights are {len(tensors)} tensors"
        )
    elements = sum(tensor.numel() for tensor in tensors.values())
    for name in ("hidden_size", "vocab_size", "cond_dim", "mlp_ratio", "num_layers", "loop_embedding"):
        size = getattr(config, name, 0)
        if size > elements:
            raise ValueError(f"{source}: {name} is {size}, but the weights have {elements} elements together")
    if config.vocab_size * config.hidden_size > 2**16 * elements:
        raise ValueError(
            f"{source}: an embedding of {config.vocab_size} x {config.hidden_size} is stated, but the "
            f"weights have {elements} elements together"
        )


def _read_config(
    cls: type[Trainable],
    path_or_hub_id: str | os.PathLike[str],
    revision: str | None,
    overrides: dict[str, Any],
) -> Any:
    config_path = locate(path_or_hub_id, CONFIG_FILE, revision)
    fields = read_json(config_path)
    model_type = fields.pop("model_type", next(iter(MODEL_TYPES)))
    if model_type != cls.model_type:
        known = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
        raise ValueError(
            f"{config_path}: model_type is {shown(model_type)}, expected {cls.model_type!r}; "
            + (f"this is {known}" if known else "MDLM checkpoints are read by LoopMDM.from_mdlm")
        )
    if "max_position_embeddings" in fields:
        fields["max_length"] = fields.pop("max_position_embeddings")
    fields = {name: value for name, value in fields.items() if name not in _NOTES_OF_TRANSFORMERS}
    try:
        return cls.config_class.from_dict({**fields, **overrides})
    except (ValueError, TypeError) as error:
        named = type(error)(f"{config_path}: {error}")
        named.__dict__.update(error.__dict__)  # such as the blocks there are
        raise named from error


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
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
