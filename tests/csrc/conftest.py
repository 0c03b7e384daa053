import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The functions of csrc/common that device code uses, compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("device") / "libdevice.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared"]
    source, include = HERE / "device_functions.cpp", HERE.parents[1] / "csrc"
    subprocess.run([compiler, *flags, f"-I{include}", str(source), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.inner_major_c.restype = loaded.outer_major_c.restype = ctypes.c_uint64
    loaded.first_leaving_c.restype = ctypes.c_int64
    for name in ("small_uniform", "small_race_time_c", "uniform_coarse_c", "uniform_refined_c"):
        getattr(loaded, name).restype = ctypes.c_float
    loaded.small_race_time_c.argtypes = [ctypes.c_float]
    loaded.uniform_coarse_c.argtypes = [ctypes.c_uint32]
    loaded.uniform_refined_c.argtypes = [ctypes.c_uint32, ctypes.c_uint32]
    return loaded
