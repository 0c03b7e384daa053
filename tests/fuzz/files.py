"""Damaged files of every kind that the package reads: equal values, or a refusal by a clear error.

A refusal is a ValueError, TypeError or OSError whose text holds no control characters. Files with a digest or
checksums give what was written or nothing. No file starts a process, or takes more than its share of memory.
"""

from __future__ import annotations

import contextlib
import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.harness import Wrong, main
from tests.fuzz.mutations import damage
from tests.fuzz.originals import Original, originals

MOST_MEMORY = 256 * 2**20  # bytes that a file of some kB may take
_RARE = ("parquet corpus", "arrow corpus")  # slow readers of another package
_WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_started: list[str] = []


def case(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    kinds = list(originals())
    kind = rng.choice(kinds)
    if kind in _RARE and rng.random() < 0.8:
        kind = rng.choice(kinds[:7])
    original = originals()[kind]
    want = _read_whole(kind)
    path = original.folder / original.damaged
    whole = path.read_bytes()
    broken = damage(whole, rng)
    others = {other: other.read_bytes() for other in original.folder.iterdir() if other != path}
    try:
        path.write_bytes(broken)
        with _watched():
            outcome = _outcome(original, want, broken != whole)
    except Exception as error:
        raise Wrong(f"{kind}, {len(broken)} bytes: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        path.write_bytes(whole)
        for other, content in others.items():
            if not other.exists() or other.read_bytes() != content:
                other.write_bytes(content)
    return Counter({f"{outcome} files": 1})


@cache
def _read_whole(kind: str) -> dict[str, Tensor]:
    """What the whole file gives; the first reading of all kinds also loads what they need."""
    original = originals()[kind]
    return original.read(original.folder)


def _outcome(original: Original, want: dict[str, Tensor], changed: bool) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = original.read(original.folder)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        control = [character for character in text if not (character.isprintable() or character in "\n\t")]
        if control:
            raise Wrong(f"control characters {control[:5]} in a message: {text[:300]!r}") from None
        if not text:
            raise Wrong(f"{type(error).__name__} without a text") from None
        got = None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MOST_MEMORY:
        raise Wrong(f"{grown >> 20} MiB taken")
    if got is None:
        return "refused"
    if original.whole and _states_a_digest(original) and not _equal(got, want):
        raise Wrong("read as another value than was written")
    return "read" if changed else "unchanged"


def _states_a_digest(original: Original) -> bool:
    """False where the damage took every mark of it away, as of a file of another writer."""
    content = (original.folder / original.damaged).read_bytes()
    marks = (b"loopmdm_digest", b"blake2b-256:")
    return original.damaged.endswith(".json") or any(mark in content for mark in marks)


def _equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Raises where the block starts a process, runs a command or connects."""
    _install_hook()
    _started.clear()
    _listening.append(True)
    try:
        yield
    finally:
        _listening.clear()
    if _started:
        raise Wrong(f"a file made the process do {_started}")


_listening: list[bool] = []


@cache
def _install_hook() -> None:
    def hook(event: str, arguments: Any) -> None:
        if _listening and event in _WATCHED:
            _started.append(event)

    sys.addaudithook(hook)


if __name__ == "__main__":
    raise SystemExit(main("files", case, __doc__))
