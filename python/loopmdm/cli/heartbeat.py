"""Signs of life between the processes of a run.

A wait inside torch.distributed ends when a connection closes or its time is over. It does not see that the
node at the other end is gone, nor does a process that computes for long see anything. So each process counts
up in the store of the run, and looks whether the next one does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

INTERVAL = 3.0  # seconds between two signs
MISSED = 10  # of them; then a process is lost
_GRACE = 2  # looks that a process has to end by itself when another one has failed
_SIGNS = "loopmdm/signs-of-{}"
_FAILED = "loopmdm/failed"
_ENDED = 2**40  # signs of a process that has done its work


class Heartbeat:
    """Gives signs and looks for those of the next process, inside a `with` block.

    Both go by the clock of this process while it runs: where all of a run stand still, as in a suspended
    machine, none misses a sign of another.
    """

    def __init__(self, end: Callable[[str | None], None]) -> None:
        """Of a process of an initialised torch.distributed.

        end: called in a thread, to end this process: with what is missing; with None if another process has
            failed, and told why, and this one has not ended since.
        """
        self._end = end
        self._own = _SIGNS.format(dist.get_rank())
        self._next = _SIGNS.format((dist.get_rank() + 1) % dist.get_world_size())
        # A connection of its own: one that is shared can be busy with a long wait.
        self._store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._leaving, self._well = threading.Event(), False
        self._seen, self._failures, self._rounds = 0, 0, 0
        self._store_answers = True
        self._counted = threading.Lock()
        self._is_first: bool | None = None
        self._threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True)
            for work in (self._give_signs, self._look)
        ]

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._well = kind is None
        self._leaving.set()
        # The store may answer no more, and its thread with it.
        self._threads[0].join(INTERVAL)
        if self._threads[0].is_alive():
            self._store_answers = False

    def is_first_failure(self) -> bool:
        """Whether no process has failed before; where the store is gone, so says one process of each node."""
        with self._counted:  # once: the threads of a process are one failure
            if self._is_first is None:
                self._is_first = self._count_failure()
            return self._is_first

    def _count_failure(self) -> bool:
        if self._store_answers:
            try:
                return bool(self._store.add(_FAILED, 1) == 1)
            except RuntimeError:
                pass
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def _give_signs(self) -> None:
        try:
            while not self._leaving.is_set():
                self._store.add(self._own, 1)
                self._seen = self._store.add(self._next, 0)
                self._failures = self._store.add(_FAILED, 0)
                self._rounds += 1
                self._leaving.wait(INTERVAL)
            if self._well:
                self._store.add(self._own, _ENDED)
        except RuntimeError:
            return  # the store is gone; so that `_look` misses signs from now on

    def _look(self) -> None:
        seen, missed, rounds, silent, failing = 0, 0, 0, 0, 0
        while not self._leaving.wait(INTERVAL):
            silent = silent + 1 if self._rounds == rounds else 0
            self._store_answers = silent < MISSED // 2
            missed = missed + 1 if self._seen == seen and seen < _ENDED else 0
            failing += self._failures > 0
            seen, rounds = self._seen, self._rounds
            if missed >= MISSED:
                of = "the next process" if self._store_answers else "the store of the run"
                missing = f"no sign of life of {of} for {missed * INTERVAL:g} s"
                self._end_unless_leaving(missing if self.is_first_failure() else None)
            if failing > _GRACE:
                self._end_unless_leaving(None)

    def _end_unless_leaving(self, missing: str | None) -> None:
        """While this process fails by itself, it says so itself."""
        if not self._leaving.is_set():
            self._end(missing)
