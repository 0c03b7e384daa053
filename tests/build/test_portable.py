"""The host's C++ keeps building where there is no Linux: macOS has no OpenMP, other headers, and clang."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = [*ROOT.glob("csrc/common/*"), *ROOT.glob("csrc/cpu/**/*.*"), *ROOT.glob("csrc/bindings/*")]
HOST += ROOT.glob("csrc/sudoku/*")
# Of C++20 and of POSIX, both of which macOS has; compilers' own; of pybind11.
STANDARD = """
    algorithm array atomic cfenv chrono cmath cstddef cstdint cstdlib cstring exception fstream
    initializer_list iterator limits memory mutex new numeric optional stdexcept string system_error thread
    type_traits utility vector math.h stdint.h
"""
POSIX = {"dlfcn.h", "pthread.h"}
INTRINSICS = {"arm_neon.h", "cpuid.h", "immintrin.h"}
CONDITION = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)")
INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>")


def headers(text, *, guarded):
    """System headers that `text` includes: where __linux__ is asked for, or elsewhere."""
    conditions, found = [], set()
    for line in text.splitlines():
        if match := CONDITION.match(line):
            word, condition = match.groups()
            if word != "endif" and not word.startswith("if"):
                conditions[-1] = condition
            elif word == "endif":
                conditions.pop()
            else:
                conditions.append(condition)
        elif any("__linux__" in condition for condition in conditions) == guarded:
            found |= set(INCLUDE.findall(line))
    return found


def test_headers_of_linux_alone_are_asked_for_there_alone():
    everywhere, on_linux = set(), set()
    for path in HOST:
        text = path.read_text(encoding="utf-8")
        everywhere |= {name for name in headers(text, guarded=False) if not name.startswith("pybind11/")}
        on_linux |= headers(text, guarded=True)
    assert "sys/mman.h" in on_linux and {"vector", "pthread.h"} <= everywhere
    assert not everywhere - set(STANDARD.split()) - POSIX - INTRINSICS


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("name", ["machine/isa", "machine/threads", "machine/buffer", "linear/fingerprint"])
def test_what_talks_to_the_system_compiles_without_linux(compiler, name):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = [
        "-std=gnu++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-U__linux__",
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run([compiler, *flags, str(ROOT / f"csrc/cpu/{name}.cpp")], check=True)
