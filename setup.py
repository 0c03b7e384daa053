"""Builds the compiled modules with CMake and ninja. Needs no torch, no nvcc and no GPU.

The environment variable LOOPMDM_SANITIZE ("address,undefined" or "thread") adds the compiler's sanitizers.
An ordinary Python cannot import such modules, so they are never put beside the sources (`make sanitize`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Device code and the headers it shares with the host: compiled on the user's machine, so they travel along.
DEVICE_SOURCES = ("csrc/common", "csrc/cuda")


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


class BuildPyWithDeviceSources(build_py):
    """Puts the device sources into the wheel, as loopmdm_kernels/csrc."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in DEVICE_SOURCES:
            for source in sorted((ROOT / folder).rglob("*")):
                if source.suffix in {".h", ".cuh", ".cu"}:
                    target = Path(self.build_lib) / "loopmdm_kernels" / source.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


setup(
    ext_modules=[Extension("loopmdm_kernels._C", sources=[]), Extension("loopmdm._sudoku", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPyWithDeviceSources},
)
