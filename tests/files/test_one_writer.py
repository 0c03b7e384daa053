"""Files are written by `loopmdm_kernels.files` (and `locks`); other sources hold no calls that write."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITERS = ("loopmdm_kernels/files.py", "loopmdm_kernels/locks.py")
SOURCES = [
    path
    for folder in ("loopmdm_kernels", "python/loopmdm", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
METHODS = {
    *("write_text", "write_bytes", "savefig", "save_file", "save_model", "tofile", "savez", "savetxt"),
    *("rename", "renames", "unlink", "remove_file", "rmtree", "copyfile", "copy2", "copytree", "move"),
    *("mkstemp", "mktemp", "NamedTemporaryFile", "symlink_to", "hardlink_to", "symlink", "link"),
    *("touch", "to_csv", "to_json_file", "imsave", "dump"),
}
OF_MODULES = {("os", "open"), ("os", "replace"), ("os", "remove"), ("torch", "save"), ("np", "save")}
# What fills the path that the writer hands out, and what is no file of a user.
ALLOWED = {
    ("python/loopmdm/formats/safetensors_files.py", "save_file"),
    ("python/loopmdm/formats/safetensors_files.py", "open"),
    ("python/loopmdm/data/array_cache.py", "open"),
    ("python/loopmdm/data/array_cache.py", "np.save"),
    ("python/loopmdm/study/kit/folder.py", "savefig"),
    ("python/loopmdm/train/plot.py", "savefig"),
    ("bench/training_curves.py", "savefig"),
    ("python/loopmdm/terminal.py", "os.open"),  # the null device in place of a closed descriptor
    ("python/loopmdm/terminal.py", "open"),
    ("python/loopmdm/data/corpus/build.py", "unlink"),  # the progress of a build that is done
    # To the kernel, which forgets the highest use of memory.
    ("python/loopmdm/speed/measure.py", "write_text"),
    # Whole folders, which several processes fill and one names when all of them are done.
    ("python/loopmdm/train/checkpoints.py", "os.replace"),
    ("python/loopmdm/train/checkpoints.py", "rmtree"),
    ("bench/environments.py", "touch"),  # of environments that are made again where they are missing
    ("bench/environments.py", "unlink"),
    ("bench/probes/triton_resources.py", "NamedTemporaryFile"),
    ("bench/phases.py", "open"),  # a log that grows while phases run, and is there whatever ends them
    ("bench/phases.py", "unlink"),
}


def mode(call: ast.Call, place: int) -> str:
    """What a call of `open` asks for; "?" where it is computed."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given = given or call.args[place : place + 1]
    if not given:
        return "r"
    return str(given[0].value) if isinstance(given[0], ast.Constant) else "?"


def writes(source: str) -> Iterator[str]:
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        function = call.func
        if isinstance(function, ast.Name):
            if function.id == "open" and set(mode(call, 1)) & set("wax+?"):
                yield "open"
            elif function.id in METHODS:
                yield function.id
        elif isinstance(function, ast.Attribute):
            module = function.value.id if isinstance(function.value, ast.Name) else ""
            if (module, function.attr) in OF_MODULES:
                yield f"{module}.{function.attr}"
            elif function.attr in METHODS and module != "ast":
                yield function.attr
            elif function.attr == "open" and set(mode(call, 0)) & set("wax+?"):
                yield "open"
            elif function.attr == "replace" and len(call.args) == 1 and not call.keywords:
                yield "replace"  # of a path; that of a string has two arguments


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_writes_files_otherwise(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if name not in WRITERS:
        assert {(name, what) for what in writes(path.read_text())} - ALLOWED == set()


@pytest.mark.parametrize(
    "line, found",
    [
        ("path.write_text('x')", ["write_text"]),
        ("open(path, 'w')", ["open"]),
        ("open(path, mode='ab')", ["open"]),
        ("open(path, how)", ["open"]),
        ("path.open('r+b')", ["open"]),
        ("os.open(path, 0)", ["os.open"]),
        ("temporary.replace(path)", ["replace"]),
        ("os.replace(a, b)", ["os.replace"]),
        ("torch.save(x, path)", ["torch.save"]),
        ("json.dump(x, file)", ["dump"]),
        ("open(path)", []),
        ("path.open('rb')", []),
        ("slots.open()", []),
        ("text.replace('a', 'b')", []),
        ("dataclasses.replace(run, length=1)", []),
    ],
)
def test_what_is_searched_for(line: str, found: list[str]) -> None:
    assert list(writes(line)) == found
