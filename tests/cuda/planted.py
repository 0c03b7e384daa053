"""Faults planted in the kernels' sources, which the emulation must notice: one build has many, each off until
it is chosen."""

from __future__ import annotations

import itertools
import re
import shutil
from typing import NamedTuple

from loopmdm_kernels.cuda import sources

# What the emulator says of loads and stores of stages in the wrong order.
EARLY_READ = "a product reads what has not been waited for|shared memory is read without a wait .*"
EARLY_COPY = (
    "a copy to what may still be read|a copy to what a product reads|two copies to one place"
    "|more threads arrive at a barrier than it expects"
)


class Fault(NamedTuple):
    file: str
    text: str  # of the source; what is replaced stands in [[ ]], or is all of it
    replacement: str
    found: str = "values"  # are wrong; or what the emulator says, as a regular expression; "": nothing is
    also: Fault | None = None  # another place, at the same time


def plant(faults, folder, monkeypatch):
    """Puts a copy of the sources in their place with all faults in it; they are numbered in their order."""
    copy = folder / "csrc"
    shutil.copytree(sources.folder(), copy)
    of_files = {}
    for number, fault in enumerate(faults.values()):
        while fault is not None:
            (path,) = copy.rglob(fault.file)
            of_files.setdefault(path, []).append((number, fault))
            fault = fault.also
    for path, planted in of_files.items():
        path.write_text(_with_faults(path.read_text(), planted))
    monkeypatch.setattr(sources, "folder", lambda: copy)


def _with_faults(source, planted):
    choices = {}  # of a place in the source: (number, replacement)
    for number, fault in planted:
        before, text, after = re.fullmatch(r"(.*)\[\[(.*)\]\](.*)|(.*)", fault.text, re.DOTALL).groups()[:3]
        if text is None:
            before, text, after = "", fault.text, ""
        whole = before + text + after
        places = [match.start() + len(before) for match in re.finditer(re.escape(whole), source)]
        assert places, f"the test looks for source that is not there: {whole}"
        for place in places:
            choices.setdefault((place, place + len(text)), []).append((number, fault.replacement))
    spans = sorted(choices)
    assert all(end <= first for (_, end), (first, _) in itertools.pairwise(spans)), "faults overlap"
    for first, end in reversed(spans):
        text = source[first:end]
        if text.endswith((";", "}")):
            chosen = "".join(f"if (emulator::planted({n})) {{ {r} }} else " for n, r in choices[first, end])
            chosen = f"{{ {chosen} {{ {text} }} }}"
        else:
            chosen = "".join(f"emulator::planted({n}) ? ({r}) : " for n, r in choices[first, end])
            chosen = f"({chosen} ({text}))"
        source = source[:first] + chosen + source[end:]
    return source


def said(check):
    """What `check(seed)` says, for the first of three seeds for which it says something."""
    for seed in range(3):
        try:
            check(seed)
        except AssertionError as error:
            first = str(error).split("\n")[0]
            return first.removeprefix("fault: ") if first.startswith("fault: ") else "values"
    return ""


def choose_and_expect(library, faults, name, check):
    """Of all planted faults this one is on, or none; `check(seed)` fails as the fault says."""
    library.plant(-1 if name is None else list(faults).index(name))
    found, wanted = said(check), "" if name is None else faults[name].found
    assert re.fullmatch(wanted, found), f"it says: {found or 'nothing'}"
