"""Includes and imports go one way: no room reads one that stands above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. Rooms of one line stand side by side and do not read each other.
LEVELS = {
    "csrc": [["common"], ["cpu", "cuda"], ["bindings"]],
    "csrc/cpu": [["machine"], ["vector"], ["linear"], ["attention"], ["looped_blocks", "head"]],
    "csrc/cuda": [["ptx"], ["tile"], ["looped_blocks", "head"]],
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def rooms_read(folder):
    """(file, room of the file, room of what it includes) of the sources under csrc."""
    below = folder.removeprefix("csrc").strip("/")
    for path in sorted((ROOT / folder).rglob("*.*")):
        room = path.relative_to(ROOT / folder).parts[0]
        for included in INCLUDE.findall(path.read_text(encoding="utf-8")):
            parts = Path(included).parts
            if below and parts[0] != below:
                continue
            yield path, room, parts[1] if below else parts[0]


@pytest.mark.parametrize("folder", LEVELS)
def test_sources_include_no_room_above_or_beside(folder):
    level = {room: number for number, rooms in enumerate(LEVELS[folder]) for room in rooms}
    found = {path.name for path in (ROOT / folder).iterdir() if path.is_dir()} - {"sudoku"}
    assert found == set(level), "a room that the list does not know"
    count = 0
    for path, room, read in rooms_read(folder):
        if room in level and read in level:
            count += 1
            assert read == room or level[read] < level[room], f"{path} includes {read}"
    assert count > 20


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_the_kernels_do_not_know_the_model():
    files = sorted((ROOT / "loopmdm_kernels").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        assert not [name for name in imported(path) if name.split(".")[0] == "loopmdm"], path
