"""`qualify`: the machine of a user proves the backends that it has, and measures which of them are faster.

Each backend, op, direction and dtype is a task of its own in a child process with a time limit. A backend
that is right is then timed beside plain PyTorch. What was found is the verdict, by which calls choose a
backend (`loopmdm_kernels.verdicts`).
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loopmdm_kernels import backends as dispatch
from loopmdm_kernels import verdicts
from loopmdm_kernels.files import check_target
from loopmdm_kernels.locks import Lock, LockedError
from loopmdm_kernels.qualification import processes
from loopmdm_kernels.values import meant, real

OPS = ("looped_blocks", "attention", "head_logits", "masked_cross_entropy", "sample_rows")
QUESTIONS: tuple[verdicts.Question, ...] = tuple(
    (op, direction, dtype)
    for op in OPS
    for direction in ("forward", "gradients")
    for dtype in verdicts.DTYPES
    if (op, direction) != ("sample_rows", "gradients")
)
_RACES, _COMPILED = "race", "compiled"


def qualify(
    device: torch.device | str | None = None,
    *,
    backends: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] = verdicts.DTYPES,
    compiled: bool = True,
    time_limit: float = 120.0,
    anew: bool = True,
    on_progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Find out which backends are right on this machine and faster than plain PyTorch; calls then use them.

    A backend is right if values and gradients are as near to float64 as plain PyTorch's (twice its error and
    one rounding step), of usual calls and of edges, and if the same call has the same bits 50 times, in a
    fresh thread, and on a GPU on two streams and in a CUDA graph. It is faster by the geometric mean over a
    few sizes. The verdict is kept in the folder of compiled kernels, $LOOPMDM_CACHE_DIR or loopmdm_kernels in
    the user's cache folder, and void once package, sources, torch, Triton or driver change.

    Args:
        device: on which; None: the GPU if there is one, else the CPU.
        backends: only these; what a valid verdict says of others stays. None: all.
        ops: only these, likewise.
        dtypes: only these, likewise.
        compiled: time compiled PyTorch too, for comparison; it decides nothing.
        time_limit: seconds for each task, which is stopped then and counts as wrong; while it waits for
            a processor that others use, they do not run.
        anew: try again what a valid verdict answers; False: return that verdict.
        on_progress: called with a line before each task.

    Returns:
        The verdict, as in the file, whose path it has too: "machine", "date", "seconds", and "entries", each
        with op, direction ("forward", "gradients"), dtype, backend, right (null: it does not do this), why,
        checked, refused, speedup over eager PyTorch, and seconds by size.

    Raises:
        ValueError: an unknown backend, op, dtype or device, an empty list of them, or a bad time limit.
        RuntimeError: a backend that is named cannot be used here, or child processes cannot run at all.
        OSError: the verdict cannot be written; known before the work.
    """
    where = _checked_device(device)
    names = _checked_backends(where, backends)
    _check_names("ops", OPS if ops is None else ops, OPS)
    _check_names("dtypes", dtypes, verdicts.DTYPES)
    limit = real(time_limit)
    if limit is None or not 0 < limit <= threading.TIMEOUT_MAX:
        raise ValueError(f"time_limit: got {time_limit!r}, expected a number of seconds, more than 0")
    questions = [q for q in QUESTIONS if (ops is None or q[0] in ops) and q[2] in dtypes]
    path = verdicts.path_of(where)
    before = _stamp(where)
    say = on_progress or (lambda line: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_target(path)
    with _locked(path, say):
        found, _ = verdicts.read(where)
        meanwhile = _stamp(where) != before  # by a process that was at it already
        if found is not None and (meanwhile or not anew) and _answers(found, questions, names):
            verdicts.forget()
            return found | {"path": str(path)}
        start = time.perf_counter()
        entries = _entries(questions, names, where, limit, compiled, say)
        new = {_key(entry) for entry in entries}
        kept = [] if found is None else [entry for entry in found["entries"] if _key(entry) not in new]
        document = {
            "format": verdicts.FORMAT,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "machine": verdicts.facts(where),
            "threads": torch.get_num_threads(),
            "seconds": time.perf_counter() - start,
            "entries": kept + entries,
        }
        verdicts.write(where, document)
    return document | {"path": str(path)}


def _entries(
    questions: Sequence[verdicts.Question],
    names: Sequence[str],
    device: torch.device,
    seconds: float,
    compiled: bool,
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    def began(task: processes.Task) -> None:
        who = task.get("backend") or (", ".join(task["backends"]) if task["kind"] == _RACES else "PyTorch")
        kind = {"check": "right?", _RACES: "how fast?"}.get(task["kind"], "compiled, how fast?")
        say(f"{who}: {task['op']}, {task['direction']}, {task['dtype']}: {kind}")

    def asked(kind: str, question: verdicts.Question, **more: Any) -> processes.Task:
        return {"kind": kind, **dict(zip(("op", "direction", "dtype"), question, strict=True)), **more}

    def all_of(tasks: list[processes.Task]) -> dict[verdicts.Question, dict[str, Any]]:
        found = processes.answers(tasks, str(device), seconds, began)
        return {_question(task): finding for task, finding in found}

    entries = []
    checks = [
        asked("check", question, backend=name)
        for name in names
        for question in questions
        if dispatch.has_kernel(name, question[0])
    ]
    for task, finding in processes.answers(checks, str(device), seconds, began):
        entry = {"right": False, "why": finding.get("error"), "checked": [], "refused": [], **finding}
        entry.pop("error", None)
        entries.append(
            {**{name: task[name] for name in ("op", "direction", "dtype", "backend")}, **entry}
            | {"speedup": None, "seconds": {}}
        )
    right: dict[verdicts.Question, list[str]] = {}
    for entry in entries:
        if entry["right"]:
            right.setdefault(_question(entry), []).append(entry["backend"])
    races = all_of([asked(_RACES, question, backends=others) for question, others in right.items()])
    # One that fails in a race takes the times of the others along: then each runs alone.
    again = [
        asked(_RACES, question, backends=[name])
        for question, others in right.items()
        if "error" in races[question] and len(others) > 1
        for name in others
    ]
    found = processes.answers(again, str(device), seconds, began)
    alone = {(*_question(task), *task["backends"]): finding for task, finding in found}
    peers = all_of([asked(_COMPILED, question) for question in right]) if compiled else {}
    for entry in entries:
        if not entry["right"]:
            continue
        race = alone.get(_key(entry), races[_question(entry)])
        if "error" in race:
            entry |= {"right": False, "why": f"at the sizes that are timed: {race['error']}"}
            continue
        if entry["backend"] in race["wrong"]:
            entry |= {"right": False, "why": race["wrong"][entry["backend"]]}
            continue
        entry["seconds"] = _seconds(entry["backend"], race["seconds"], peers.get(_question(entry), {}))
        ratios = [times["eager"] / times["ours"] for times in entry["seconds"].values() if "ours" in times]
        entry["speedup"] = _geometric_mean(ratios)
    return entries


def _seconds(
    backend: str, race: dict[str, dict[str, float]], peer: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """ours, eager and compiled, by size; compiled is timed in a race of its own, and scaled by eager's."""
    found = {}
    for size, times in race.items():
        found[size] = {"eager": times["eager"]}
        if backend in times:
            found[size]["ours"] = times[backend]
        other = peer.get("seconds", {}).get(size)
        if other is not None:
            found[size]["compiled"] = times["eager"] * other["compiled"] / other["eager"]
    return found


def _geometric_mean(ratios: Sequence[float]) -> float | None:
    """One answer for all sizes: a backend chosen by the size would give a sequence other bits in a batch."""
    if not ratios:
        return None
    return float(torch.tensor(ratios, dtype=torch.float64).log().mean().exp())


def _question(entry: dict[str, Any]) -> verdicts.Question:
    return entry["op"], entry["direction"], entry["dtype"]


def _key(entry: dict[str, Any]) -> tuple[str, ...]:
    return *_question(entry), entry["backend"]


def _answers(found: dict[str, Any], questions: Sequence[verdicts.Question], names: Sequence[str]) -> bool:
    known = {_key(entry) for entry in found["entries"]}
    wanted = {(*q, name) for q in questions for name in names if dispatch.has_kernel(name, q[0])}
    return wanted <= known


def _locked(path: Path, say: Callable[[str], object]) -> Lock:
    lock = path.with_suffix(".lock")
    try:
        return Lock(lock, str(path))
    except LockedError as error:
        say(f"waiting: {error}")
        return Lock(lock, str(path), wait=True)


def _stamp(device: torch.device) -> tuple[int, int] | None:
    """Other than before if the file is another: it is replaced, never written into."""
    try:
        status = verdicts.path_of(device).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _checked_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda")
    if where.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device: got {str(device)!r}, and torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)


def _checked_backends(device: torch.device, asked: Sequence[str] | None) -> list[str]:
    reasons = {name: dispatch.why_not_on(name, device) for name in dispatch.BACKENDS}
    if asked is None:
        return [name for name, reason in reasons.items() if reason is None and name != "reference"]
    _check_names("backends", asked, dispatch.BACKENDS)
    for name in asked:
        if reasons[name] is not None:
            raise RuntimeError(f"qualify: backend {name!r} cannot be used here: {reasons[name]}")
    return list(dict.fromkeys(asked))


def _check_names(what: str, names: Sequence[str], accepted: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"{what}: got {names!r}, expected a list of some of {', '.join(accepted)}")
    for name in names:
        if name not in accepted:
            raise ValueError(
                f"{what}: got {name!r}, expected some of {', '.join(accepted)}{meant(name, accepted)}"
            )
