"""The cache of compiled kernels after its writer was killed at any moment, also while others wait for it."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

from loopmdm_kernels.cuda import disk_cache

CONTENT = b"cubin" * 10_000
PROCESS = """
import os, signal, sys, time, types
from pathlib import Path

# A package without its __init__, which would import torch; that takes longer than the test.
for name, folder in (("loopmdm_kernels", ""), ("loopmdm_kernels.cuda", "/cuda")):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [sys.argv[1] + folder]
from loopmdm_kernels.cuda import disk_cache

fatal, seconds, seen = int(sys.argv[2]), float(sys.argv[3]), 0

def hook(name, given):
    global seen
    if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "make"):
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

def make():
    print("making", flush=True)
    time.sleep(seconds)
    sys.audit("make")
    return b"cubin" * 10_000

sys.addaudithook(hook)
assert disk_cache.cached("one", make) == b"cubin" * 10_000
print(seen)
"""


def process(fatal: int, seconds: float = 0.0) -> subprocess.Popen[str]:
    package = str(Path(disk_cache.__file__).parents[1])
    command = [sys.executable, "-S", "-c", PROCESS, package, str(fatal), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def check(folder: Path) -> None:
    """The file is whole, and whoever asks now gets it."""
    stored = (folder / "one.cubin").read_bytes()
    assert stored == hashlib.sha256(CONTENT).digest() + CONTENT
    assert [path.name for path in folder.glob("*.cubin")] == ["one.cubin"]


def test_killed_at_any_moment(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(whole))
    out, _ = process(0).communicate()
    events = int(out.split()[-1])
    assert events >= 4
    for fatal in range(1, events + 1):
        folder = tmp_path / str(fatal)
        monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(folder))
        killed = process(fatal)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL, fatal
        if (folder / "one.cubin").exists():
            check(folder)
        after = process(0)
        after.communicate()
        assert after.returncode == 0, fatal
        check(folder)


def test_a_waiting_process_takes_over(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path))
    first = process(0, seconds=600)
    assert first.stdout.readline() == "making\n"  # it has the lock
    others = [process(0) for _ in range(2)]
    first.kill()
    first.communicate()
    said = [other.communicate()[0].split() for other in others]
    assert [other.returncode for other in others] == [0, 0]
    assert sum("making" in words for words in said) == 1, said
    check(tmp_path)
