"""Faults planted in the Triton kernels one at a time: a mask dropped, a bound or a stride off by one."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from triton.runtime.interpreter import InterpretedFunction

from loopmdm_kernels.triton import kernels

# What offsets are multiples of.
COUNTS = {
    *("a_row_stride", "b_col_stride", "b_depth_stride", "head_stride", "row_stride", "sequence_stride"),
    *("chunks", "count", "depth", "field", "groups", "half", "heads", "length", "modulation_stride"),
    *("num_cols", "num_rows", "padded_size", "parts", "row_size", "size", "tiles_n"),
}
FOLDER = Path(kernels.__file__).parent


class Fault(NamedTuple):
    """A text of a device function with another in its place."""

    module: str
    function: str
    line: int
    start: int  # in the line, in characters
    old: str
    new: str

    @classmethod
    def of(cls, module: str, function: str, old: str, new: str) -> Fault:
        """The first such text of the function."""
        lines = _text(module).splitlines()
        first = next(number for number, line in enumerate(lines, 1) if line.startswith(f"def {function}("))
        line = next(number for number in range(first, len(lines) + 1) if old in lines[number - 1])
        return cls(module, function, line, lines[line - 1].index(old), old, new)

    @property
    def text(self) -> str:
        return f"{self.function}: {self.old} -> {self.new}"


def modules() -> Iterator[tuple[str, str]]:
    """Names and texts of the files with device code."""
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem != "__init__":
            yield path.stem, _text(path.stem)


def _text(module: str) -> str:
    return (FOLDER / f"{module}.py").read_text(encoding="utf-8")


def functions() -> dict[str, InterpretedFunction]:
    """All device functions by name."""
    found = {}
    for module, _ in modules():
        names = vars(importlib.import_module(f"{kernels.__name__}.{module}"))
        found.update({name: f for name, f in names.items() if isinstance(f, InterpretedFunction)})
    return found


def called() -> dict[str, set[str]]:
    """Of each device function, the ones that it uses, directly or not, and itself."""
    direct: dict[str, set[str]] = {}
    for _, text in modules():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                direct[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    def reach(name: str, seen: set[str]) -> set[str]:
        for used in (direct[name] & direct.keys()) - seen:
            reach(used, seen | {name})
            seen |= reach(used, seen | {name})
        return seen | {name}

    return {name: reach(name, set()) for name in direct}


def every_fault() -> Iterator[Fault]:
    """Each mask let through, each `<` as `<=`, each count that an offset is a multiple of one larger."""
    for module, text in modules():
        lines = text.splitlines()
        for function in ast.parse(text).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                for place, new in _changed(node):
                    assert place.lineno == place.end_lineno, f"{module}.py, line {place.lineno}: on two lines"
                    old = lines[place.lineno - 1].encode()[place.col_offset : place.end_col_offset].decode()
                    new = new.format(old)
                    yield Fault(module, function.name, place.lineno, place.col_offset, old, new)


def _changed(node: ast.AST) -> Iterator[tuple[Any, str]]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store", "tl.atomic_add"):
        yield from ((keyword.value, "({}) | True") for keyword in node.keywords if keyword.arg == "mask")
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt):
        left, right = node.left, node.comparators[0]
        if isinstance(right, ast.Name):
            yield node, f"{ast.unparse(left)} <= {ast.unparse(right)}"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        right = node.right
        if isinstance(right, ast.Name) and right.id in COUNTS:
            yield right, "({} + 1)"


def planted_text(fault: Fault) -> str:
    lines = _text(fault.module).splitlines()
    line = lines[fault.line - 1]
    assert line[fault.start :].startswith(fault.old), fault
    lines[fault.line - 1] = line[: fault.start] + fault.new + line[fault.start + len(fault.old) :]
    return "\n".join(lines) + "\n"


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """Inside, the function has the fault, wherever it is used."""
    path = folder / f"{fault.module}_{fault.line}_{fault.start}.py"
    path.write_text(planted_text(fault), encoding="utf-8")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        specification.loader.exec_module(module)
        whole, faulty = functions()[fault.function], getattr(module, fault.function)
        patch.setattr(whole, "fn", faulty.fn)
        patch.setattr(whole, "rewriter", faulty.rewriter)
        yield
