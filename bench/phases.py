"""Phases of a script for a GPU: each in a process of its own, with a limit, its findings kept at once.

A phase that fails, crashes or hangs costs itself only. The result file is written anew after every phase,
with what a phase had found before its end. What the processes print goes to a log beside it, and a summary is
printed last. This process never touches the GPU: its children are forks, which have everything imported.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LINES, COLUMNS = 100, 180  # of the summary, at most
RIGHT, WRONG = "right", "wrong: "  # a figure that is a verdict
_FORK = multiprocessing.get_context("fork")
_LEAST_SECONDS = 5.0  # a phase does not start with less

Findings = Mapping[str, Any]
Result = dict[str, Any]


class LeftOut(Exception):
    """Why a phase has nothing to do on this machine."""


class Phase(NamedTuple):
    """Figures by name, all at once or some at a time; a later one of the same name replaces the earlier."""

    call: Callable[[Any], Findings | Iterator[Findings]]
    seconds: float  # its limit
    quick: bool = False  # one of the most important
    dry: bool = True  # False: another size of one that a dry run takes


def in_child(
    call: Callable[[], Findings | Iterator[Findings]], seconds: float, log: Path
) -> tuple[dict[str, Any], str | None, bool]:
    """(figures, what ended it early, whether it merely had nothing to do) of a call in its own process."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(call, sender, log))
    process.start()
    sender.close()
    figures: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        while True:
            ready = wait([receiver, process.sentinel], max(0.0, deadline - time.monotonic()))
            if not ready:
                return figures, f"not done after {seconds:.0f} s", False
            try:
                kind, said = receiver.recv() if receiver.poll() else ("gone", None)
            except EOFError:
                kind, said = "gone", None
            if kind == "figures":
                figures |= said
            elif kind == "gone":
                process.join(10)
                return figures, _how_it_ended(process.exitcode or 0), False
            else:
                return figures, said, kind == "left out"
    finally:
        receiver.close()
        # Its own children, such as compilers, have its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join(10)  # a driver may hold on to what hangs on a GPU


def _child(call: Callable[[], Findings | Iterator[Findings]], sender: Connection, log: Path) -> None:
    os.setsid()
    with log.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    try:
        found = call()
        for part in (found,) if isinstance(found, Mapping) else found:
            sender.send(("figures", dict(part)))
        sender.send(("done", None))
    except LeftOut as reason:
        sender.send(("left out", str(reason)))
    except Exception as error:
        sys.stdout.flush()  # what was printed comes before its error in the log
        traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0]
        sender.send(("failed", f"{type(error).__name__}: {said}"[:COLUMNS]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _how_it_ended(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class Script(NamedTuple):
    """What `python -m` runs: its phases in order of importance, and what follows from their figures."""

    name: str  # of the result file, behind the date
    phases: Mapping[str, Phase]
    run_of: Callable[[bool], Any]  # dry -> the argument of the phases
    why_not: Callable[[], str | None]  # the phases cannot run here, unless dry
    conclude: Callable[[Mapping[str, Findings]], Findings]  # "targets" are said in the summary
    keep: Callable[[Result], None]  # what the package is to know of a result that is no dry run


def measure(script: Script, names: Sequence[str], minutes: float, folder: Path, *, dry: bool) -> Result:
    """Runs these phases, as far as the time goes, and prints the summary, also if it is stopped."""
    begin = time.monotonic()
    today = datetime.date.today().isoformat()
    path, log = (folder / f"{today}-{script.name}{end}" for end in (".json", "-log.txt"))
    folder.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    phases: dict[str, Any] = {}
    skipped: list[str] = []
    result: Result = {
        "date": today,
        "command": f"python -m bench.{script.name.replace('-', '_')}"
        if not dry
        else "dry run: no figure here means anything",
        "file": str(path),
        "phases": phases,
        "skipped": skipped,
    }
    run = script.run_of(dry)
    try:
        for name in names:
            phase, started = script.phases[name], time.monotonic()
            left = 60 * minutes - (started - begin)
            if left < _LEAST_SECONDS:
                skipped.append(name)
                continue
            say(f"{started - begin:6.1f} s  {name}")
            with log.open("a") as stream:
                stream.write(f"==== {name}\n")
            limit = left if dry else min(phase.seconds, left)
            figures, ended, idle = in_child(lambda call=phase.call: call(run), limit, log)  # type: ignore[misc]
            phases[name] = {"seconds": round(time.monotonic() - started, 1), "figures": figures}
            if ended:
                phases[name]["left out" if idle else "failed"] = ended
            known = {name: phase["figures"] for name, phase in phases.items()}
            result |= {"seconds": round(time.monotonic() - begin, 1), **script.conclude(known)}
            write(result, path)
    finally:
        print("\n".join(summary(result)), flush=True)
    return result


def failures(result: Result) -> list[str]:
    """What is not as it should be; figures that are missing are not."""
    lines = []
    for name, phase in result["phases"].items():
        if "failed" in phase:
            lines.append(f"{name}: {phase['failed']}")
        for key, value in phase["figures"].items():
            if isinstance(value, str) and value.startswith(WRONG):
                lines.append(f"{name}, {key}: {value}")
    return lines


def summary(result: Result) -> list[str]:
    """At most LINES lines: what failed, targets, then a line a phase."""
    phases, targets = result["phases"], result.get("targets", {})
    wrong = failures(result)
    head = [f"{result['date']}: {len(phases)} phases in {result.get('seconds', 0)} s"]
    head += [f"FAILED {line}" for line in wrong[:30]]
    if len(wrong) > 30:
        head.append(f"FAILED {len(wrong) - 30} more")
    words = {True: "met", False: "MISSED"}
    head += [f"{words[met]} {name}" for name, met in targets.items() if met is not None]
    tail = [f"not run, there was no time: {', '.join(result['skipped'])}"] if result["skipped"] else []
    tail.append(f"{len(wrong)} failed; all figures: {result['file']}")
    body = [line for name, phase in phases.items() for line in _lines(name, phase)]
    room = LINES - len(head) - len(tail)
    if len(body) > room:
        body = [*body[: room - 1], f"{len(body) - room + 1} more lines: see the file"]
    lines = (*head, *body, *tail)
    return [line if len(line) <= COLUMNS else line[: COLUMNS - 3] + "..." for line in lines]


def _lines(name: str, phase: Findings) -> list[str]:
    """Two at most."""
    parts = [f"{word}: {phase[word]}" for word in ("failed", "left out") if word in phase]
    figures = phase["figures"]
    right = sum(value == RIGHT for value in figures.values())
    if right:
        parts.append(f"{right} right")
    beside: dict[str, list[float]] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            if "ms" in value:
                cold = f" ({value['cold ms']:.4g})" if "cold ms" in value else ""
                parts.append(f"{key} {value['ms']:.4g}{cold} ms")
            for unit in ("MHz", "W"):
                read = value.get(unit, [])
                beside.setdefault(unit, []).extend(read if isinstance(read, list) else [read])
        elif value is not None and value != RIGHT:
            parts.append(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}")
    parts += [f"{min(read):.0f}-{max(read):.0f} {unit}" for unit, read in beside.items() if read]
    return textwrap.wrap(
        f"{name}: {'; '.join(parts)}", COLUMNS, subsequent_indent="    ", max_lines=2, placeholder=" ..."
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen(script: Script, only: str | None, *, quick: bool, dry: bool) -> list[str]:
    """Names of phases; `only`: those that begin with one of these words.

    Raises:
        ValueError: no phase begins so.
    """
    names = [
        name for name, phase in script.phases.items() if (phase.quick or not quick) and (phase.dry or not dry)
    ]
    if only is None:
        return names
    words = only.split(",")
    for word in words:
        if not any(name.startswith(word) for name in names):
            raise ValueError(f"got {word!r}, expected the beginning of some of {', '.join(names)}")
    return [name for name in names if name.startswith(tuple(words))]


def main(script: Script, document: str | None, arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every path on a CPU; no figure means anything"
    )
    parser.add_argument("--quick", action="store_true", help="the most important phases, in six minutes")
    parser.add_argument("--minutes", type=float, help="all together; default 9.4, with --quick 5.9")
    parser.add_argument("--only", metavar="NAME,...", help="the phases whose names begin so")
    parser.add_argument("--record", type=Path, metavar="FILE", help="only keep what a result file found")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        names = chosen(script, options.only, quick=options.quick, dry=options.dry_run)
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.record:
        script.keep(json.loads(options.record.read_text()))
        return 0
    if not options.dry_run:
        found, ended, _ = in_child(lambda: {"why": script.why_not()}, 60, Path(os.devnull))
        if reason := ended or found["why"]:
            sys.exit(f"bench.{script.name}: {reason}; --dry-run takes every path without one")
    minutes = options.minutes or (5.9 if options.quick else 9.4)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the phase that runs
    result = measure(script, names, minutes, options.out, dry=options.dry_run)
    if not options.dry_run:
        script.keep(result)
    return int(bool(failures(result)) or False in result.get("targets", {}).values())
