"""Runs the tests of the CPU kernels with sanitizers in the compiled modules.

    python tests/build/sanitize.py [--quick] [address] [thread]

address: AddressSanitizer and UndefinedBehaviorSanitizer; thread: ThreadSanitizer. The modules are built in
build/ and leave the ordinary ones alone. Python and torch are not instrumented: what they do to memory is
seen as far as it goes through malloc, free and pthread. ThreadSanitizer cannot follow libgomp, so the kernels
run on threads of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("under_sanitizer.py")
FLAGS = {"address": "address,undefined", "thread": "thread"}

_OPS = ("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows")
QUICK_FOLDERS = ("tests/cpu", "tests/looped_blocks", "tests/sample_rows")
FOLDERS = ("tests/cpu", "tests/ops", *(f"tests/{op}" for op in _OPS), "tests/csrc", "tests/data/sudoku")

# A process under a sanitizer starts none, and ThreadSanitizer can follow neither forks nor torch's threads.
# Other backends run in Python, or as code that is compiled without a sanitizer.
_PROCESSES = "triton or cuda or fork or data_loader or process or no_threads_beside or fewer_threads"
_PROCESSES += " or denormal or compiled"
LEFT_OUT = {"address": _PROCESSES, "thread": f"{_PROCESSES} or (test_threads and torch)"}
QUICK = {
    "address": "test_lengths or test_many_short or TestLayout or (test_a_sequence and bf16) or test_batch",
    "thread": "(test_a_sequence and own and generic and bf16) or test_every_task or test_exception",
}


def compiler_library(name: str) -> str | None:
    """A shared library that came with the compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


def preloads(kind: str) -> list[str] | None:
    """What must be loaded before Python: the sanitizer, and the C++ library whose functions it replaces."""
    names = ("libasan.so", "libstdc++.so.6") if kind == "address" else ("libtsan.so", "libstdc++.so.6")
    libraries = [compiler_library(name) for name in names]
    return None if None in libraries else [str(library) for library in libraries]


def build(kind: str, *, quick: bool) -> Path:
    """The folder with the package, its modules instrumented; if `quick`, compiled fast and slow to run."""
    base = ROOT / "build" / f"sanitize-{kind}{'-quick' if quick else ''}"
    library = base / "lib"
    shutil.rmtree(library, ignore_errors=True)  # sources that are gone must not stay
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(base),
        "--build-lib",
        str(library),
        *(["--debug"] if quick else []),
    ]
    # cmake and ninja may be there only as packages of this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "LOOPMDM_SANITIZE": FLAGS[kind]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the build with {FLAGS[kind]} failed:\n{done.stdout[-5000:]}")
    return library


def environment(kind: str, library: Path) -> dict[str, str]:
    """Of a process that uses the package in `library`."""
    preload = preloads(kind)
    if preload is None:
        raise RuntimeError(f"the compiler has no library of the {kind} sanitizer")
    values = {
        **os.environ,
        "PYTHONPATH": str(library),
        "LD_PRELOAD": " ".join(preload),
        "OMP_NUM_THREADS": "1",
        # Python keeps much until it ends; only the kernels' own errors are asked for. A test asks for more
        # memory than there is.
        "ASAN_OPTIONS": "detect_leaks=0 allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 allocator_may_return_null=1",
    }
    if kind == "thread":
        values["LOOPMDM_CPU_THREADS"] = "std"
    return values


def run_tests(kind: str, library: Path, *, quick: bool) -> int:
    expression = f"not ({LEFT_OUT[kind]})" + (f" and ({QUICK[kind]})" if quick else "")
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", expression]
    folders = QUICK_FOLDERS if quick else FOLDERS
    return subprocess.run(
        [sys.executable, str(RUNNER), kind, str(library), *options, *(str(ROOT / name) for name in folders)],
        cwd=library,
        env=environment(kind, library),
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", choices=[[], *FLAGS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="a part of the tests")
    arguments = parser.parse_args()
    for kind in arguments.kinds or FLAGS:
        print(f"{kind}: building", flush=True)
        library = build(kind, quick=arguments.quick)
        status = run_tests(kind, library, quick=arguments.quick)
        if status != 0:
            print(f"{kind}: failed", flush=True)
            return status
        print(f"{kind}: clean", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
