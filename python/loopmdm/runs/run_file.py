"""run.json: what a training run was asked for, to resume it, and to evaluate it on what it never saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loopmdm.data.tokenizer import BACKEND_FILE
from loopmdm.data.tokenizer import CONFIG_FILE as TOKENIZER_FILE
from loopmdm.formats.folders import read_json
from loopmdm.model.config import LoopMDMConfig
from loopmdm.printable import printable, shown
from loopmdm.runs.recipes import SUDOKU_RECIPES, TEXT_RECIPES
from loopmdm.train import loop as training
from loopmdm.train.config import TrainConfig
from loopmdm.train.plot import PLOT_FILE
from loopmdm_kernels.files import write_files
from loopmdm_kernels.values import meant

RUN_FILE = "run.json"
VALIDATION = 0.05
# Files of the folder of a run.
FILES = (*training.FILES, RUN_FILE, PLOT_FILE, TOKENIZER_FILE, BACKEND_FILE)


@dataclass(frozen=True)
class RunFile:
    """Everything behind a run. `data` is None for Sudoku, `clues` for text."""

    preset: str
    model: dict[str, Any]  # fields of the model's configuration that replace the preset's
    training: dict[str, Any]  # TrainConfig, whole
    data: str | list[str] | None = None  # a source of `read_documents`, or several
    weights: list[float] | None = None  # of the corpora in `data`; None: by their sizes
    pairs: list[str] | None = None  # fields of prompt and response in `data`; None: plain text
    stream: bool = False  # `data` is tokenised into the folder while it is trained on
    text_field: str = "text"
    errors: str = "strict"  # bytes that are not UTF-8, as in `read_documents`
    tokenizer: str = "byte"
    length: int | None = None
    autoregressive: bool = False  # a scorer: every token from those before it
    validation: float = VALIDATION  # share of the documents held out
    evaluation: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the packed tokens
    init_from: str | None = None  # the checkpoint whose weights it begins with; None: new ones
    no_ema: bool = False  # of that checkpoint the raw weights, not the averaged ones
    lora: dict[str, Any] = field(default_factory=dict)  # rank and targets of adapters; empty: none
    clues: str | None = None  # of Sudoku boards, as `parse_clues` reads it; None: the preset's

    def write(self, folder: Path) -> None:
        """Write the file into the folder of the run, whole or not at all."""
        write_files({folder / RUN_FILE: json.dumps(asdict(self), indent=2) + "\n"})

    @classmethod
    def read(cls, folder: Path) -> RunFile | None:
        """The file of a run, None where there is none."""
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        known = {f.name for f in fields(cls)}
        if set(values) - known or not {"preset", "model", "training"} <= set(values):
            raise ValueError(f"{path} was not written by this version of loopmdm: it has {sorted(values)}")
        try:
            _check(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(**values)


def replaced_by(run: RunFile, folder: Path) -> tuple[str, ...]:
    """What a run that begins must not find in its folder.

    Of tokenizers those without our file are foreign; others are compared with that of the run.
    """
    ours = run.data is None or (folder / TOKENIZER_FILE).exists()
    return tuple(name for name in FILES if name not in (TOKENIZER_FILE, *([BACKEND_FILE] if ours else [])))


def _check(values: dict[str, Any]) -> None:
    """Raise ValueError or TypeError where a value is not what `RunFile.write` writes."""
    for known in fields(RunFile):
        if known.name in values:
            value, (accepted, kinds) = values[known.name], _KINDS[str(known.type)]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise TypeError(f"{known.name}: got {shown(value)}, expected {accepted}")
    presets = (*SUDOKU_RECIPES, *TEXT_RECIPES)
    preset = values["preset"]
    if preset not in presets:
        known_presets = f"{', '.join(presets)}{meant(preset, presets)}"
        raise ValueError(f"preset: got {shown(preset)}, expected one of {known_presets}")
    if not 0 <= values.get("validation", VALIDATION) < 1:
        raise ValueError(f"validation: got {values['validation']}, expected a share in [0, 1)")
    TrainConfig.from_dict({"steps": 1, **values["training"]})
    unknown = sorted(set(values["model"]) - {f.name for f in fields(LoopMDMConfig)})
    if unknown:
        raise ValueError(f"model: unknown fields {printable(', '.join(unknown))}")


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("text", (str,)),
    "str | None": ("text or null", (str, type(None))),
    "str | list[str] | None": ("text, a list of them or null", (str, list, type(None))),
    "list[float] | None": ("a list of numbers or null", (list, type(None))),
    "list[str] | None": ("a list of texts or null", (list, type(None))),
    "int | None": ("an integer or null", (int, type(None))),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "dict[str, Any]": ("an object", (dict,)),
}
