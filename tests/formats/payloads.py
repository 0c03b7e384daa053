"""Pickles that try to run code: Python's reader would create the file `sentinel` of each. And torch files."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

from loopmdm.formats.torch_files import TorchFile


class Call:
    """Pickles as a call of `function` (REDUCE)."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def _text(command: str) -> bytes:
    return b"V" + command.encode("raw_unicode_escape") + b"\n"


def payloads(sentinel: Path) -> dict[str, bytes]:
    command = f"touch {sentinel}"
    python = f"__import__('os').system({command!r})"
    text, code = _text(command), _text(python)
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    nested = {"state_dict": {}, "hyper_parameters": {"config": [{"deep": (Call(os.system, command),)}]}}
    return {
        "reduce os.system": pickle.dumps(Call(os.system, command), 2),
        "reduce protocol 0": pickle.dumps(Call(os.system, command), 0),
        "reduce protocol 5": pickle.dumps(Call(os.system, command), 5),
        "eval": pickle.dumps(Call(eval, python), 2),
        "exec": pickle.dumps(Call(exec, python), 2),
        "nested in hyper_parameters": pickle.dumps(nested, 2),
        "stack global": b"\x80\x04" + short("posix") + short("system") + b"\x93" + text + b"\x85R.",
        "dotted stack global": b"\x80\x04" + short("torch") + short("os.system") + b"\x93" + text + b"\x85R.",
        "inst": b"(" + text + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text + b"o.",
        "python 2 name": b"c__builtin__\neval\n" + code + b"\x85R.",
        "import": b"c__builtin__\n__import__\n" + _text("os") + b"\x85R.",
        "subprocess": b"csubprocess\ncall\n((l" + _text("touch") + b"a" + _text(str(sentinel)) + b"atR.",
        "torch.load": b"ctorch\nload\n" + text + b"\x85R.",
        "hidden in a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\n"
        + text
        + b"\x85RK\x00))NNtR.",
        "persistent id": b"("
        + _text("storage")
        + b"cos\nsystem\n"
        + text
        + b"\x85R"
        + _text("0")
        + b"NK\x01tQ.",
        "build sets code": b"ctorch._utils\n_rebuild_tensor_v2\n}" + _text("__code__") + code + b"sb.",
        "build sets defaults": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + _text("__defaults__") + b")s\x86b.",
        "build on a class": b"ccollections\nOrderedDict\nN}"
        + _text("__setstate__")
        + b"cos\nsystem\ns\x86b.",
        "getattr chain": b"cbuiltins\ngetattr\n(ctyping\nsys\n" + _text("modules") + b"tR.",
    }


def torch_zip(data_pickle: bytes, **storages: bytes) -> bytes:
    """A torch file (zip form) around a hand-made pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data_pickle)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_all(path: Path) -> Any:
    file = TorchFile(path)
    try:
        return {name: file.tensor(leaf) for name, leaf in file.root.items()}
    finally:
        file.close()
