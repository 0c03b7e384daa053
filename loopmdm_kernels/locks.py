"""Locks between processes, released by the system when their holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
import warnings
from pathlib import Path
from types import TracebackType

LOCK_FILE = ".loopmdm.lock"  # of a folder


class LockedError(OSError):
    """Another process, or another part of this one, holds a lock."""

    def __str__(self) -> str:
        return str(self.strerror)


class Lock:
    """An exclusive lock (flock) on a file, which is made, says who holds it, and is removed on release.

    A file that a killed process has left is no obstacle: the system releases what it held.

    Args:
        path: of the file, in a folder that exists.
        what: the thing locked, for the message.
        wait: wait for the present holder instead of refusing.

    Raises:
        LockedError: held already; names process, machine and time.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self.path = path
        self._descriptor: int | None = None
        descriptor = _open(path)
        try:
            while not _lock(descriptor, path, what, wait):
                os.close(descriptor)
                descriptor = _open(path)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; once more does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):  # the folder may be gone
                self.path.unlink()
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.release()


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, f"{path} is no regular file, and cannot be a lock")
    return descriptor


def _lock(descriptor: int, path: Path, what: str, wait: bool) -> bool:
    """Lock the file; False if its holder has removed it meanwhile, so that another one counts now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(None, f"{what} is in use by {_holder(descriptor)}") from None
    except OSError as error:
        warnings.warn(
            f"{path}: this file system has no locks ({error}); use {what} once at a time", stacklevel=4
        )
    try:
        current = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    if (mine.st_dev, mine.st_ino) != (current.st_dev, current.st_ino):
        return False
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk leaves a lock that does not say whose it is
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    return True


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 400, 0).decode("utf-8", "replace").strip()
    return text if text.isprintable() and text else "another process"
