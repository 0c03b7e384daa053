"""Values and gradients of the ops with kernels compiled for aarch64, which qemu plays.

python -m tests.aarch64 [arguments of pytest, such as tests/looped_blocks -k asimd]

Needs aarch64-linux-gnu-g++ and qemu-aarch64, no Python and no torch of that processor.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.aarch64.plugin import EMULATOR, SERVER

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
COMPILER = "aarch64-linux-gnu-g++"
FLAGS = ("-std=gnu++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno")
FLAGS += ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-DNDEBUG")
OTHERS = {"module", "decoding", "peak", "threads", "tensor_view"}  # bindings that no op needs
TESTS = [
    *("tests/attention/test_values.py", "tests/masked_cross_entropy/test_values.py"),
    *("tests/head_logits/test_values.py", "tests/head_logits/test_gradients.py"),
    *("tests/sample_rows/test_values.py", "tests/sample_rows/test_tokens_alone.py"),
    *("tests/looped_blocks/test_values.py", "tests/looped_blocks/test_gradients.py"),
]
# The tests of each instruction set that qemu offers.
CHOSEN = "cpu_generic or cpu_asimd_bf16"


def kernels() -> list[str]:
    """As CMakeLists.txt lists them."""
    return _list_of_cmake("kernels")


def flags_of(isa: str) -> list[str]:
    """Those that CMakeLists.txt adds for an instruction set; generic has none."""
    return [] if isa == "generic" else _list_of_cmake(f"{isa}_flags")


def _list_of_cmake(name: str) -> list[str]:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = re.search(rf"set\({name}\s+([^)]*)\)", text)
    if found is None or not found.group(1).split():
        raise ValueError(
            f"CMakeLists.txt: no list set({name} ...), which the build for aarch64 takes from it"
        )
    return found.group(1).split()


def commands(folder: Path) -> dict[Path, list[str]]:
    """Of the compiler, by object file."""
    template = (ROOT / "csrc/cpu/kernel.cpp.in").read_text(encoding="utf-8")
    sources: list[tuple[Path, str, list[str]]] = []
    for kernel in kernels():
        name = Path(kernel).name
        source = folder / f"{name}_kernel.cpp"
        source.write_text(template.replace("@kernel@", kernel).replace("@name@", name), encoding="utf-8")
        for isa in ("generic", "asimd_bf16"):
            sources.append((source, f"{name}_{isa}.o", [f"-DLOOPMDM_ISA={isa}", *flags_of(isa)]))
    plain = [*ROOT.glob("csrc/cpu/*/*.cpp"), HERE / "server.cpp"]
    plain += [path for path in ROOT.glob("csrc/bindings/*.cpp") if path.stem not in OTHERS]
    sources += [(path, f"{path.parent.name}_{path.stem}.o", []) for path in plain]
    include = [f"-I{ROOT / 'csrc'}", f"-I{HERE / 'stand_in'}"]
    return {
        folder / target: [COMPILER, *FLAGS, *flags, *include, "-c", str(source), "-o", str(folder / target)]
        for source, target, flags in sources
    }


def build(folder: Path) -> Path:
    """The program; only what is older than its sources is compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / "csrc/common").glob("*"), *(ROOT / "csrc/bindings").glob("*")]
    sources += [*(ROOT / "csrc/cpu").glob("*/*"), HERE / "server.cpp", *HERE.glob("stand_in/*/*")]
    changed = max(path.stat().st_mtime for path in sources)
    todo = commands(folder)
    stale = [path for path in todo if not path.exists() or path.stat().st_mtime < changed]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: subprocess.run(todo[path], check=True), stale))
    program = folder / "server"
    subprocess.run([COMPILER, *map(str, todo), "-o", str(program), "-pthread", "-ldl"], check=True)
    return program


def main(arguments: list[str]) -> int:
    missing = [tool for tool in (COMPILER, EMULATOR[0]) if shutil.which(tool) is None]
    if missing:
        print(f"tests.aarch64: not found: {', '.join(missing)}", file=sys.stderr)
        return 1
    program = build(ROOT / "build/aarch64")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.aarch64.plugin"]
    return subprocess.run(
        [*command, *(arguments or [*TESTS, "-k", CHOSEN])],
        cwd=ROOT,
        env={**os.environ, SERVER: str(program)},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
