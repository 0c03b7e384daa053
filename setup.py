"""Builds the compiled modules with CMake and ninja. Needs no torch, no nvcc and no GPU.

The environment variable LOOPMDM_SANITIZE ("address,undefined" or "thread") adds the compiler's sanitizers.
An ordinary Python cannot import such modules, so they are never put beside the sources (`make sanitize`).

LOOPMDM_BUILD_CUDA puts cubins of the presets into the wheel: for the compute capabilities it names
("8.0 9.0"), or for all of CAPABILITIES if it is 1. That takes minutes, torch and a CUDA compiler where the
wheel is built (--no-build-isolation). Without it kernels are compiled where they are first used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Device code and the headers it shares with the host: compiled on the user's machine, so they travel along.
DEVICE_SOURCES = ("csrc/common", "csrc/cuda")
# What --help names, and what that links to.
DOCUMENTS = ("docs/glossary.md", "docs/inputs.md", "docs/notation.md", "docs/training.md")
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0")
# Hidden size, heads, and blocks before, in and after the loop of sudoku, tiny, small and medium.
CUBIN_SIZES = ((128, 4, (1, 2)), (512, 8, (1, 2, 5)), (768, 12, (1, 2, 9)), (1024, 16, (1, 2, 21)))
CUBIN_LENGTHS = (32, 81, 128, 512, 1024)


class CMakeBuild(build_ext):
    """One CMake build makes all extension modules; each is then copied to its package."""

    def run(self) -> None:
        sanitizers = os.environ.get("LOOPMDM_SANITIZE", "")
        if sanitizers and self.inplace:
            raise RuntimeError("LOOPMDM_SANITIZE is set: build elsewhere, with `setup.py build --build-lib`")
        flavour = (sanitizers and f"-{sanitizers.replace(',', '-')}") + ("-debug" if self.debug else "")
        build_dir = (
            ROOT / "build" / f"cmake{flavour}{sysconfig.get_config_var('EXT_SUFFIX').removesuffix('.so')}"
        )
        # A release is stripped, and the reports of sanitizers would have no names.
        build_type = "Debug" if self.debug else "RelWithDebInfo" if sanitizers else "Release"
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; install it with `pip install cmake ninja`")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLOOPMDM_SANITIZE={sanitizers}",
        ]
        build = [cmake, "--build", str(build_dir), "--parallel", str(self.parallel or os.cpu_count() or 1)]
        # The generator cannot change in an existing folder, and neither can the place of the sources.
        if not self._configured_here(build_dir):
            shutil.rmtree(build_dir, ignore_errors=True)
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            if self.inplace:
                package, _, _ = extension.name.rpartition(".")
                package_dir = self.get_finalized_command("build_py").get_package_dir(package)
                target = ROOT / package_dir / target.name
            target.parent.mkdir(parents=True, exist_ok=True)
            # A copy under another name and a rename: a process that has the old module mapped keeps it.
            fresh = target.with_name(target.name + ".new")
            shutil.copyfile(build_dir / "modules" / target.name, fresh)
            fresh.chmod(0o755)
            fresh.replace(target)

    @staticmethod
    def _configured_here(build_dir: Path) -> bool:
        cache = build_dir / "CMakeCache.txt"
        if not cache.exists():
            return False
        text = cache.read_text()
        return (
            f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in text and "CMAKE_GENERATOR:INTERNAL=Ninja\n" in text
        )


class BuildPyWithSources(build_py):
    """Puts device sources and documents into the wheel; cubins where they are asked for."""

    def run(self) -> None:
        super().run()
        asked = os.environ.get("LOOPMDM_BUILD_CUDA", "")
        if self.editable_mode:
            if asked:
                raise RuntimeError("LOOPMDM_BUILD_CUDA is set: an editable installation holds no cubins")
            return
        packages = {ROOT / name: "loopmdm" for name in DOCUMENTS}
        for folder in DEVICE_SOURCES:
            found = (path for path in (ROOT / folder).rglob("*") if path.suffix in {".h", ".cuh", ".cu"})
            packages |= dict.fromkeys(found, "loopmdm_kernels")
        for source, package in packages.items():
            target = Path(self.build_lib) / package / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if asked:
            self._compile_cubins(CAPABILITIES if asked == "1" else asked.split())

    def _compile_cubins(self, capabilities: Sequence[str]) -> None:
        if find_spec("torch") is None:
            raise RuntimeError("LOOPMDM_BUILD_CUDA needs torch: use pip's --no-build-isolation")
        folder = Path(self.build_lib).resolve()
        for hidden, heads, layers in CUBIN_SIZES:
            command = [
                sys.executable, "-m", "loopmdm_kernels.cuda.prebuild", "--hidden", hidden, "--heads", heads,
                "--layers", *layers, "--lengths", *CUBIN_LENGTHS, "--capability", *capabilities,
                "--folder", folder / "loopmdm_kernels" / "cubins",
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            subprocess.run(list(map(str, command)), cwd=folder, env=environment, check=True)


setup(
    ext_modules=[Extension("loopmdm_kernels._C", sources=[]), Extension("loopmdm._sudoku", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPyWithSources},
)
