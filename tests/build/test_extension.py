"""The compiled modules link no torch library, and their portable part compiles for a plain processor."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopmdm_kernels import _C

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"@kernel@": "head/sample_rows", "@name@": "sample_rows"}


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_links_no_torch_library():
    import loopmdm._sudoku

    for module in (_C, loopmdm._sudoku):
        libraries = output_of("ldd", module.__file__)
        assert "libc.so" in libraries
        assert not re.search(r"torch|c10|cuda|gomp|python", libraries), libraries


def test_import_needs_no_torch():
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "assert module.philox(0, 0, 0, 0, 0)[0] == 0x6627E8D5; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def compile_object(tmp_path, *flags):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    text = (ROOT / "csrc/cpu/kernel.cpp.in").read_text()
    for name, value in KERNEL.items():
        text = text.replace(name, value)
    source, target = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    source.write_text(text)
    command = [compiler, "-std=gnu++20", "-O1", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    return target


def test_generic_kernel_needs_only_the_base_instruction_set(tmp_path):
    if sys.platform != "linux" or _C.usable_cpu_isas() == "generic":
        pytest.skip("an x86-64 test")
    target = compile_object(tmp_path, "-march=x86-64", "-DLOOPMDM_ISA=generic")
    assembly = output_of("objdump", "-d", str(target))
    assert "mulps" in assembly
    assert not re.search(r"%[yz]mm|\bv(add|mul|fmadd)", assembly)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_instruction_sets_share_no_function(isa):
    """Every symbol of a kernel object is local or in the namespace of its instruction set."""
    objects = sorted(ROOT.glob(f"build/cmake.*/CMakeFiles/cpu_{isa}.dir/kernels/*.o"))
    if not objects:
        pytest.skip("the objects of the build are not here")
    for path in objects:
        symbols = output_of("nm", "-C", str(path))
        shared = [line for line in symbols.splitlines() if re.search(r" [TWVuDBR] ", line)]
        names = [line.split(maxsplit=2)[2] for line in shared]
        assert names and all(name.startswith(f"loopmdm::cpu::{isa}::") for name in names), path.name
