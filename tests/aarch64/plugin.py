"""A plugin of pytest: the kernels of the `cpu` backend run on an emulated aarch64.

Its functions, compiled for that processor by `python -m tests.aarch64`, are a program that qemu runs. Here
stand functions of the same names that send it their arguments and write back what it made of the tensors.
"""

from __future__ import annotations

import os
import struct
import subprocess
from typing import Any

import torch
from torch import Tensor

from loopmdm_kernels import _C

SERVER = "LOOPMDM_AARCH64_SERVER"  # an environment variable: the program
EMULATOR = ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.uint8),
    torch.bool,
)
ERRORS = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}
HERE = ("fingerprint",)  # of weights, computed on this processor


class Server:
    """The program, and one call after the other."""

    def __init__(self, command: list[str]) -> None:
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.signatures = [line.split() for line in self._text().splitlines()]
        self.calls = 0

    def call(self, name: str, arguments: list[Any]) -> Any:
        self.calls += 1
        tensors: list[Tensor] = []
        isa = os.environ.get("LOOPMDM_CPU_ISA", "").encode()
        message = [struct.pack("<I", len(isa)), isa, struct.pack("<I", len(name)), name.encode()]
        message.append(_encoded(arguments, tensors))
        stdin = self._program.stdin
        assert stdin is not None
        stdin.write(b"".join(message))
        stdin.flush()
        error = self._text()
        kind = self._read(1)
        result: Any = None
        if kind == b"I":
            (result,) = struct.unpack("<q", self._read(8))
        elif kind == b"S":
            result = self._text()
        for tensor in tensors:
            self._write_back(tensor)
        if error:
            kind_of_error, _, text = error.partition(" ")
            raise ERRORS[kind_of_error](text)
        return result

    def _write_back(self, tensor: Tensor) -> None:
        data = self._read(tensor.numel() * tensor.element_size())
        if data and data != _bytes(tensor):
            new = torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)
            with torch.no_grad():
                tensor.detach().copy_(new)

    def _text(self) -> str:
        (size,) = struct.unpack("<I", self._read(4))
        return self._read(size).decode()

    def _read(self, size: int) -> bytes:
        stdout = self._program.stdout
        assert stdout is not None
        data = stdout.read(size)
        if len(data) < size:
            raise RuntimeError(f"the emulated program ended with {self._program.wait()}")
        return data


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


def _encoded(value: Any, tensors: list[Tensor]) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, Tensor):
        tensors.append(value)
        sizes = struct.pack(f"<{value.dim()}q", *value.shape)
        return b"T" + bytes((DTYPES.index(value.dtype), value.dim())) + sizes + _bytes(value)
    if isinstance(value, bool):
        return b"B" + struct.pack("<q", value)
    if isinstance(value, int):
        return b"I" + struct.pack("<Q", value % 2**64)
    if isinstance(value, float):
        return b"F" + struct.pack("<d", value)
    if isinstance(value, str):
        return b"S" + struct.pack("<I", len(value.encode())) + value.encode()
    return b"L" + struct.pack("<I", len(value)) + b"".join(_encoded(item, tensors) for item in value)


def _stand_in(server: Server, name: str, names: list[str]) -> Any:
    order = [argument.removesuffix("=") for argument in names]

    def call(*arguments: Any, **named: Any) -> Any:
        given = dict(zip(order, arguments, strict=False)) | named
        return server.call(name, [given[argument] for argument in order if argument in given])

    return call


def pytest_configure(config: Any) -> None:
    config.aarch64 = server = Server([*EMULATOR, os.environ[SERVER]])
    for name, *names in server.signatures:
        if name not in HERE:
            setattr(_C, name, _stand_in(server, name, names))


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    terminalreporter.write_line(f"{config.aarch64.calls} calls on aarch64: {_C.usable_cpu_isas()}")
