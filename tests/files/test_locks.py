"""Locks between processes: one holder, named; released by a kill; their files taken away."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loopmdm_kernels import locks
from loopmdm_kernels.locks import Lock, LockedError

_HOLD = """
import runpy, sys
from pathlib import Path
held = runpy.run_path(sys.argv[2])["Lock"](Path(sys.argv[1]), "the folder")
print("held", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[bytes]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", _HOLD, str(path), locks.__file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen[bytes], number: int | None) -> None:
    if number is not None:
        process.send_signal(number)
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_lock_ends_with_its_process_however_it_ends(tmp_path: Path, number: int | None) -> None:
    path = tmp_path / "lock"
    process = hold(path)
    try:
        holder = f"process {process.pid} on {re.escape(socket.gethostname())} since 20"
        with pytest.raises(LockedError, match=f"^the folder is in use by {holder}"):
            Lock(path, "the folder")
        assert path.exists()  # who is refused leaves it alone
    finally:
        end(process, number)
    assert path.exists() == (number is not None)
    Lock(path, "the folder").release()
    assert not path.exists()


def test_one_holder_in_a_process_too(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock", "it") as lock:
        with pytest.raises(LockedError, match=f"it is in use by process {os.getpid()} "):
            Lock(tmp_path / "lock", "it")
        lock.release()
        lock.release()
        with Lock(tmp_path / "lock", "it"):
            lock.release()  # not the other's
            assert (tmp_path / "lock").exists()
    left = Lock(tmp_path / "lock", "it")
    del left
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_waiting_threads_hold_it_one_at_a_time(tmp_path: Path) -> None:
    """Also where the file is taken away between opening and locking it."""
    inside, most, rounds = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, rounds
        for _ in range(50):
            with Lock(tmp_path / "lock", "it", wait=True):
                with guard:
                    inside += 1
                    most, rounds = max(most, inside), rounds + 1
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, rounds) == (1, 200) and list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        Lock(tmp_path / "lock", "it"),
        pytest.raises(LockedError, match=r"^it is in use by another process$"),
    ):
        Lock(tmp_path / "lock", "it")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    holder = Lock(tmp_path / "lock", "it")
    (tmp_path / "lock").write_text("\x1b[2Jnobody")
    with pytest.raises(LockedError, match=r"^it is in use by another process$"):
        Lock(tmp_path / "lock", "it")
    holder.release()


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_what_is_no_file_is_no_lock(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock"
    (tmp_path / "target").write_text("mine")
    {"link": lambda: path.symlink_to("target"), "FIFO": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(OSError):
        Lock(path, "it")
    assert (tmp_path / "target").read_text() == "mine" and os.path.lexists(path)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks .*Operation not supported.*; use it once at a time"):
        Lock(tmp_path / "lock", "it").release()
