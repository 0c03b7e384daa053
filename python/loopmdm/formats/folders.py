"""Files of a checkpoint folder, here or on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loopmdm.formats import hub
from loopmdm_kernels.values import parse_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def locate(path_or_hub_id: str | os.PathLike[str], name: str, revision: str | None = None) -> Path:
    """The local path of file `name` of a checkpoint folder, downloaded from the hub if it is not local."""
    folder = Path(path_or_hub_id)
    if folder.is_dir() and os.fspath(path_or_hub_id):  # "" is no folder, though Path("") is the present one
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
