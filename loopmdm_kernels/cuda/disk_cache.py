"""Compiled kernels on disk, shared by all processes of a user.

A file is the SHA-256 of its content and then the content, so a file cut short by a full disk is compiled
again and never loaded. It is written under a temporary name and renamed. Processes that need the same kernel
at once wait for the one that compiles it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from loopmdm_kernels.files import write_files
from loopmdm_kernels.locks import Lock

_DIGEST_BYTES = hashlib.sha256().digest_size
_MOST_BYTES = 2**28  # of a file that is read: no kernel is as large


class NoFolderError(OSError):
    """Neither LOOPMDM_CACHE_DIR nor a home folder is known."""

    def __str__(self) -> str:
        return str(self.strerror)


def folder() -> Path:
    """$LOOPMDM_CACHE_DIR, else loopmdm_kernels in the user's cache folder; an `OSError` if there is none."""
    chosen = os.environ.get("LOOPMDM_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopmdm_kernels"
    except RuntimeError:
        raise NoFolderError(None, "there is no home folder: set LOOPMDM_CACHE_DIR to a folder") from None


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """The content stored under `key`, or that of `make`, then stored.

    Where the folder cannot be written the kernel is compiled in each process.
    """
    content = None
    try:
        path = folder() / f"{key}.cubin"
        content = read(path)
        if content is not None:
            return content
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
        stored = content_of(path)
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def content_of(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """Of a regular file; what is none, such as a FIFO, or is too large, is an `OSError` and is not read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "it is no regular file")
    if status.st_size > most_bytes:
        raise OSError(None, f"it has {status.st_size} bytes, expected at most {most_bytes}")
    return path.read_bytes()


def write(path: Path, content: bytes) -> None:
    write_files({path: hashlib.sha256(content).digest() + content})
