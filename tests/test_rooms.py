"""Includes and imports go one way: no room reads one that stands above it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. Rooms of one line stand side by side and do not read each other.
LEVELS = {
    "csrc": [["common"], ["cpu", "cuda"], ["bindings"]],
    "csrc/cpu": [["machine"], ["vector"], ["linear"], ["attention"], ["looped_blocks", "head"], ["decoding"]],
    "csrc/cuda": [["ptx"], ["tile"], ["looped_blocks", "head"]],
}
# Rooms of the model, and of its studies: folders, and modules that stand alone.
MODULE_LEVELS = {
    "loopmdm": [
        ["_sudoku", "lazy", "moved", "printable"],
        ["formats", "terminal"],
        ["data", "losses", "model"],
        ["exits"],
        ["mdlm", "plan"],
        ["sampling"],
        ["quality", "solve", "train", "view"],
        ["evaluate", "hf"],
        ["runs"],
        ["harness", "speed", "study"],
        ["cli"],
    ],
    "loopmdm.study": [
        ["kit"],
        ["adaptive", "attention", "importance", "scaling", "schedules", "training", "trajectories"],
    ],
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
    """Modules, and names taken from them; also in functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_read(package):
    """{module: modules of `package` that its file imports}."""
    folder = ROOT / "python" / Path(*package.split("."))
    files = {}
    for path in (*folder.rglob("*.py"), *folder.rglob("*.pyi")):
        parts = path.relative_to(ROOT / "python").with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return {
        module: {
            name if name in files else name.rpartition(".")[0]
            for name in imported(path)
            if name.startswith(f"{package}.")
        }
        for module, path in files.items()
    }


@pytest.mark.parametrize("package", MODULE_LEVELS)
def test_modules_import_no_room_above_or_beside(package):
    level = {f"{package}.{room}": n for n, rooms in enumerate(MODULE_LEVELS[package]) for room in rooms}
    depth = package.count(".") + 2
    above = {package, f"{package}.__main__"}
    for module, read in modules_read(package).items():
        if module in above:
            continue
        room = ".".join(module.split(".")[:depth])
        assert room in level, f"{room}: a room that the list does not know"
        for other in read - above:
            to = ".".join(other.split(".")[:depth])
            assert to == room or level[to] < level[room], f"{module} imports {other}"
        assert package not in read, f"{module} imports {package}, which names what stands above it"


def test_no_modules_import_each_other_in_a_circle():
    modules = modules_read("loopmdm")
    assert len(modules) > 150
    order = TopologicalSorter(modules).static_order()  # raises an error that names the circle
    assert set(order) >= set(modules)


def test_the_kernels_do_not_know_the_model():
    files = sorted((ROOT / "loopmdm_kernels").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        assert not [name for name in imported(path) if name.split(".")[0] == "loopmdm"], path
