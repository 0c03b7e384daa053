"""Compiling the kernels without a GPU, and reading what came out."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loopmdm_kernels.cuda import sources
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.schedule import BlockShape, Device, choose

SOURCE = "looped_blocks/looped_blocks_sm90.cu"
NVCC = shutil.which("nvcc")

# Each is a plan that the cost model makes: few and many tokens of the small model, in short and long
# sequences, and all sizes of heads.
SHAPES = {
    "small, 32 tokens": BlockShape(1, 32, 768, 12, 3072, 2),
    "small, 128 tokens": BlockShape(1, 128, 768, 12, 3072, 2),
    "small, 192 tokens": BlockShape(1, 192, 768, 12, 3072, 2),
    "small, 384 tokens": BlockShape(1, 384, 768, 12, 3072, 2),
    "small, 1024 tokens": BlockShape(1, 1024, 768, 12, 3072, 2),
    "small, 16 x 1024 tokens": BlockShape(16, 1024, 768, 12, 3072, 2),
    "small, 16 x 128 tokens": BlockShape(16, 128, 768, 12, 3072, 2),
    "small, 16 x 256 tokens": BlockShape(16, 256, 768, 12, 3072, 2),  # one tile for the parts of MLP_OUT
    "small, 4 x 128 tokens": BlockShape(4, 128, 768, 12, 3072, 2),  # the same, in pairs of 64 rows
    "small, 16 x 32 tokens": BlockShape(16, 32, 768, 12, 3072, 2),  # two groups share columns and heads
    "heads of 128": BlockShape(1, 1024, 1024, 8, 4096, 2),
    "sudoku, heads of 32": BlockShape(1, 81, 128, 4, 512, 2),
    "sudoku, heads of 64": BlockShape(1, 81, 128, 2, 512, 2),
    "sudoku, 256 wide": BlockShape(2, 81, 256, 8, 1024, 2),
    "sudoku6, heads of 16": BlockShape(1, 36, 64, 4, 256, 1),
}


def tool(name: str) -> str | None:
    """A CUDA binary tool: of the toolkit, or of those that come with Triton."""
    beside_nvcc = Path(NVCC).resolve().parent / name if NVCC else None
    triton = find_spec("triton")
    inside_triton = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / name if triton else None
    for path in (shutil.which(name), beside_nvcc, inside_triton):
        if path and Path(path).exists():
            return str(path)
    return None


def installed(module: str) -> bool:
    """Of the package `cuda` there are several parts, and one may be there without another."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


HOPPER = Device()


def macros(shape: BlockShape, device: Device = HOPPER) -> list[str]:
    return [f"-D{name}={value}" for name, value in defines(shape, choose(shape, device)).items()]


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")
needs_nvrtc = pytest.mark.skipif(not installed("cuda.bindings"), reason="cuda-bindings is not installed")
needs_cuobjdump = pytest.mark.skipif(tool("cuobjdump") is None, reason="there is no cuobjdump")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def described_by_triton(kind: str) -> dict[str, Any]:
    """How Triton describes the operands of these products."""
    script = Path(__file__).with_name("triton_descriptors.py")
    command = [sys.executable, str(script), kind]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def device_functions(folder: Path) -> ctypes.CDLL:
    """The functions of csrc/common with C names."""
    source = Path(__file__).parents[1] / "csrc" / "device_functions.cpp"
    options = ["-std=c++17", "-shared", "-fPIC", f"-I{sources.folder()}"]
    library = folder / "descriptors.so"
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.inner_major_c.restype = loaded.outer_major_c.restype = ctypes.c_uint64
    return loaded


def nvcc(
    shape: BlockShape, target: Path, source: str = SOURCE, arch: str = "sm_90a", device: Device = HOPPER
) -> str:
    """Compiles to a cubin and returns the assembler's messages."""
    return nvcc_source(source, macros(shape, device), target, arch)


def nvcc_source(source: str, options: list[str], target: Path, arch: str = "sm_90a") -> str:
    folder = sources.folder()
    command = [
        str(NVCC),
        "-std=c++17",
        f"-arch={arch}",
        "-cubin",
        f"-I{folder}",
        "-Xptxas",
        "-v",
        *options,
    ]
    result = subprocess.run(
        [*command, str(folder / "cuda" / source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def nvrtc(source: str, options: list[str], arch: str = "sm_90a") -> tuple[str, bytes]:
    """The PTX and the cubin that NVRTC makes of a source text."""
    from cuda.bindings import nvrtc

    def value(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise AssertionError(bytes(log).decode())
        return values[0] if values else None

    program = value(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        arguments = [*options, f"--gpu-architecture={arch}", f"-I{sources.folder()}"]
        value(nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments]))
        text = bytearray(value(nvrtc.nvrtcGetPTXSize(program)))
        value(nvrtc.nvrtcGetPTX(program, text))
        cubin = bytearray(value(nvrtc.nvrtcGetCUBINSize(program)))
        if cubin:
            value(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(text).decode().rstrip("\0"), bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def layout(kind: type[ctypes.Structure], struct: str) -> list[str]:
    """Assertions that a struct of the kernels lies as the host writes it."""
    checks = [f"static_assert(sizeof({struct}) == {ctypes.sizeof(kind)});"]

    def inside(kind: type[ctypes.Structure], prefix: str, start: int) -> None:
        for name, of in kind._fields_:
            offset = start + getattr(kind, name).offset
            if issubclass(of, ctypes.Structure):
                inside(of, f"{prefix}{name}.", offset)
            elif not name.startswith("padding"):
                checks.append(f"static_assert(__builtin_offsetof({struct}, {prefix}{name}) == {offset});")

    inside(kind, "", 0)
    return checks


def instructions(cubin: Path) -> Counter[str]:
    """How often each SASS instruction, with its modifiers, occurs."""
    listing = subprocess.run(
        [str(tool("cuobjdump")), "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing.stdout)
    return Counter(names)


def assert_as_declared(cubin: Path, expected: dict[str, Any], products: str = "HGMMA") -> Counter[str]:
    """Registers and products are these, nothing is in local memory. Returns how often instructions occur."""
    used = resources(cubin)
    assert used["REG"] == expected["registers"] and used["STACK"] == 0 and used["LOCAL"] == 0
    counts = instructions(cubin)
    local = [name for name in counts if re.match(r"(STL|LDL)\b", name)]
    assert not local, "registers do not suffice, and sums go through local memory"
    assert {name: n for name, n in counts.items() if name.startswith(products)} == expected["products"]
    return counts


def assert_nothing_serialised(messages: str) -> None:
    """By what the assembler says."""
    assert "0 bytes spill stores, 0 bytes spill loads" in messages
    assert "wgmma" not in messages, "the assembler says why products wait for each other"


def resources(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only kernel."""
    listing = subprocess.run(
        [str(tool("cuobjdump")), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    return {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing.stdout)
    }
