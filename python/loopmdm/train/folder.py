"""The folder of a run: one process at a time writes there, and only over the files of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from loopmdm_kernels.files import kind_of, remove_leftovers
from loopmdm_kernels.locks import LOCK_FILE, Lock


class RunFolder:
    """A folder that this process alone writes into until `release`, also by a `with` block.

    It is made if it is missing, and removed again if it is empty at the end. What killed writers have left
    there is removed.

    Args:
        path: of the folder.
        names: files of a run, which must be regular ones where they exist.

    Raises:
        LockedError: another process writes there, which the message names.
        ValueError: one of the files is a link, a FIFO or the like.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str]) -> None:
        self.path = Path(path)
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path / LOCK_FILE, str(self.path))
        try:
            for name in names:
                kind = kind_of(self.path / name)
                if kind is not None:
                    raise ValueError(f"{self.path / name} is {kind}; a run writes regular files only")
            remove_leftovers(self.path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write; once more does nothing."""
        self._lock.release()
        with contextlib.suppress(OSError):  # not empty, as a rule
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
