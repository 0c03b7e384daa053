"""Compiled kernels on disk, shared by all processes of a user.

A file is the SHA-256 of its content and then the content, so a file cut short by a full disk is compiled
again and never loaded. It is written under a temporary name and renamed. Processes that need the same kernel
at once wait for the one that compiles it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from loopmdm_kernels.files import write_files
from loopmdm_kernels.locks import Lock

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """$LOOPMDM_CACHE_DIR, else loopmdm_kernels in the user's cache folder."""
    chosen = os.environ.get("LOOPMDM_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopmdm_kernels"


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The content stored under `key`, or that of `make`, then stored.

    Where the folder cannot be written the kernel is compiled in each process.
    """
    path = folder() / f"{key}.cubin"
    content = read(path)
    if content is not None:
        return content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock"), str(path), wait=True):
            content = read(path)  # another process may have been faster
            if content is None:
                content = make()
                write(path, content)
            return content
    except OSError:
        return make() if content is None else content


def read(path: Path) -> bytes | None:
    """The content of a file that is there and whole, or None."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    write_files({path: hashlib.sha256(content).digest() + content})
