"""run.json: what a training run was asked for, to resume it, and to evaluate it on what it never saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loopmdm.checkpoint import read_json
from loopmdm_kernels.files import write_files

RUN_FILE = "run.json"
VALIDATION = 0.05


@dataclass(frozen=True)
class RunFile:
    """Everything behind a run. `data` is None for Sudoku, `clues` for text."""

    preset: str
    model: dict[str, Any]  # fields of the model's configuration that replace the preset's
    training: dict[str, Any]  # TrainConfig, whole
    data: str | list[str] | None = None  # a source of `read_documents`, or several
    text_field: str = "text"
    errors: str = "strict"  # bytes that are not UTF-8, as in `read_documents`
    tokenizer: str = "byte"
    length: int | None = None
    autoregressive: bool = False  # a scorer: every token from those before it
    validation: float = VALIDATION  # share of the documents held out
    evaluation: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None  # of the packed tokens
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
        return cls(**values)
