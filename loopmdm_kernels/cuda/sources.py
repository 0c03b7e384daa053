"""Where the device sources are, and what a kernel is made of."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@cache
def folder() -> Path:
    """csrc: beside the package in a checkout, inside it in a wheel.

    Raises:
        RuntimeError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cuda").is_dir():
            return candidate
    raise RuntimeError(f"the CUDA sources are missing: no folder csrc/cuda in {package} or beside it")


def closure(name: str, root: Path | None = None) -> list[Path]:
    """The file `name` of csrc and all it includes with quotes, in the order of first use."""
    root = root or folder()
    found: list[Path] = []
    waiting = [root / name]
    while waiting:
        path = waiting.pop(0)
        if path not in found:
            found.append(path)
            waiting += [root / included for included in _INCLUDE.findall(path.read_text())]
    return found


def source_hash(name: str, root: Path | None = None) -> str:
    """Changes with any file of the closure."""
    digest = hashlib.sha256()
    for path in closure(name, root):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
