"""Files of the Hugging Face hub, told apart from paths that do not exist."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

_PART = r"[A-Za-z0-9][\w.-]*"
_SECONDS = 5.0  # for the hub's first answer; its client would try for half a minute


class NoSuchFile(FileNotFoundError):
    """The repository is there and has no such file."""


def is_hub_id(source: str | os.PathLike[str], *, owner: bool = True) -> bool:
    """Whether `source`, which is no local file, can be a hub id: "owner/name" (or "name", without `owner`).

    Not where the owner is a folder here: then the name is a slip in a path.
    """
    text = os.fspath(source)
    pattern = f"{_PART}/{_PART}" if owner else f"({_PART}/)?{_PART}"
    return bool(re.fullmatch(pattern, text)) and not ("/" in text and Path(text).parent.exists())


def fetch(hub_id: str, name: str, *, revision: str | None = None, missing: str) -> Path:
    """The local path of file `name` of a hub repository; where the hub is out of reach, that of its cache.

    Args:
        missing: what an error says first, that `hub_id` is nothing local.

    Raises:
        NoSuchFile: the repository has no such file.
        FileNotFoundError: no such repository, or the hub cannot be reached and its cache has no copy.
        ImportError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{missing}; a hub id needs the package huggingface_hub: pip install 'loopmdm-kernels[hf]'"
        ) from error
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    why = unreachable()
    if why is not None:
        options["local_files_only"] = True
    download: Callable[..., str] = huggingface_hub.hf_hub_download
    try:
        return Path(download(hub_id, name, **options))
    except Exception as error:  # the client's errors have no common class
        lacking = isinstance(error, huggingface_hub.errors.EntryNotFoundError)
        kind = NoSuchFile if lacking else FileNotFoundError
        answer = str(error) if why is None else f"it cannot be reached ({why})"
        raise kind(f"{missing}, and {name} could not be fetched from the hub: {answer}") from error


def unreachable() -> str | None:
    """Why the hub does not answer at all, or None: asked once, where its client would try again."""
    client: Any = import_module("huggingface_hub.utils")
    constants: Any = import_module("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        client.get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:
        return f"{constants.ENDPOINT}: {error}"
    return None
