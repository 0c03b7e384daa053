"""Compiled kernels on disk, shared by all processes of a user.

A file is the SHA-256 of its content and then the content, so a file cut short by a full disk is compiled
again and never loaded. It is written under a temporary name and renamed. Processes that need the same kernel
at once wait for the one that compiles it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

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
        with _lock(path.with_suffix(".lock")):
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks here: two processes may compile the same, and both results are whole
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
