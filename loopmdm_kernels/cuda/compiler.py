"""Device sources to cubins, by NVRTC or by nvcc. Neither needs a GPU or a driver.

A wheel may hold cubins (LOOPMDM_BUILD_CUDA, see setup.py). Their names know the sources, options and
architecture, but no compiler: where all of that is the same, they are what is used.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from loopmdm_kernels.cuda import disk_cache, sources

PACKAGED = Path(__file__).resolve().parents[1] / "cubins"  # in a wheel that was built with them
_COMMON = ("-std=c++17",)


def compile_kernel(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """The cubin of csrc/cuda/`name` with these macros: from the package, from the cache, or compiled now.

    Raises:
        RuntimeError: there is no compiler, or the source does not compile; with its messages.
    """
    options = _options(defines)
    packaged = disk_cache.read(PACKAGED / _packaged_name(name, options, architecture))
    if packaged is not None:
        return packaged
    version, compiler = _compiler()
    return disk_cache.cached(
        cache_key(name, options, architecture, version),
        lambda: compiler(sources.folder() / "cuda" / name, options, architecture),
    )


def compile_into(folder: Path, name: str, defines: Mapping[str, int], architecture: str) -> None:
    """Compiles a cubin for a package whose `PACKAGED` is this folder.

    Raises:
        RuntimeError: as compile_kernel.
    """
    options = _options(defines)
    folder.mkdir(parents=True, exist_ok=True)
    _, compiler = _compiler()
    cubin = compiler(sources.folder() / "cuda" / name, options, architecture)
    path = folder / _packaged_name(name, options, architecture)
    disk_cache.write(path, cubin)
    path.chmod(0o644)  # whoever installs it, all may read it


def _options(defines: Mapping[str, int]) -> list[str]:
    return [*_COMMON, *(f"-D{key}={value}" for key, value in sorted(defines.items()))]


def _packaged_name(name: str, options: list[str], architecture: str) -> str:
    return cache_key(name, options, architecture, "") + ".cubin"


def cache_key(
    name: str, options: list[str], architecture: str, compiler: str, root: Path | None = None
) -> str:
    """Differs wherever the cubin may: sources, options, architecture, version of the compiler."""
    parts = [sources.source_hash(f"cuda/{name}", root), *options, architecture, compiler]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{Path(name).stem}-{digest[:32]}"


def with_nvrtc(source: Path, options: list[str], architecture: str) -> bytes:
    nvrtc = _nvrtc()
    arguments = [*options, f"--gpu-architecture={architecture}", f"-I{sources.folder()}"]
    program = _value(nvrtc, nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_value(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{bytes(log).decode()}")
        cubin = bytearray(_value(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def with_nvcc(source: Path, options: list[str], architecture: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        arguments = [*options, f"-arch={architecture}", f"-I{sources.folder()}", "-cubin", str(source)]
        result = subprocess.run(
            ["nvcc", *arguments, "-o", str(target)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{result.stderr}")
        return target.read_bytes()


def why_none() -> str | None:
    """Why no kernel can be made here: there is no compiler, and the package holds none that are made."""
    try:
        if not PACKAGED.is_dir():
            _compiler()
    except RuntimeError as error:
        return str(error)
    return None


@cache
def _compiler() -> tuple[str, Callable[[Path, list[str], str], bytes]]:
    try:
        nvrtc = _nvrtc()
        major, minor = _value(nvrtc, nvrtc.nvrtcVersion(), 2)
        return f"nvrtc {major}.{minor}", with_nvrtc
    except RuntimeError as error:
        reason = str(error)
    path = shutil.which("nvcc")
    if path is None:
        raise RuntimeError(f"no CUDA compiler: {reason}; and nvcc is not on the path")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {version}", with_nvcc


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except ImportError as error:
        raise RuntimeError("cuda-bindings is not installed: pip install 'loopmdm-kernels[gpu]'") from error
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"NVRTC cannot be loaded (pip install nvidia-cuda-nvrtc): {error}") from error
    return nvrtc


def _value(nvrtc: Any, result: tuple[Any, ...], number: int = 1) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {status}")
    return values[0] if number == 1 else values
