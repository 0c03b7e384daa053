"""What is said where the kernels cannot run, and what goes to the driver, by a driver that takes notes."""

import ctypes
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import backends
from loopmdm_kernels.cuda import compiler, driver, tensor_maps
from tests.cuda.fake_driver import SUCCESS, FakeDriver, real


@pytest.fixture
def install(monkeypatch):
    return lambda **functions: FakeDriver(**functions).install(monkeypatch)


def test_reasons(install, monkeypatch):
    assert driver.why_unavailable(None) == "no GPU"
    assert driver.why_unavailable((7, 5)) == (
        "the kernels need a GPU of compute capability 8.0 or later (A100, RTX 30, L4, H100), got 7.5"
    )
    install()
    monkeypatch.setattr(compiler, "why_none", lambda: None)
    assert driver.why_unavailable((9, 0)) is None and driver.why_unavailable((8, 6)) is None
    install(cuDriverGetVersion=lambda: (SUCCESS, 11080))
    reason = driver.why_unavailable((9, 0))
    assert reason == "the driver is for CUDA 11.8; the kernels need 12.0 or later"
    install(cuDriverGetVersion=lambda: (real.CUresult.CUDA_ERROR_NO_DEVICE, 0))
    assert "does not answer (CUDA_ERROR_NO_DEVICE)" in driver.why_unavailable((9, 0))

    def missing():
        raise RuntimeError("libcuda.so.1 not found")

    install(cuDriverGetVersion=missing)
    assert driver.why_unavailable((9, 0)) == (
        "the CUDA driver (libcuda) cannot be loaded: libcuda.so.1 not found"
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "pip install 'loopmdm-kernels[gpu]'" in driver.why_unavailable((9, 0))


def test_a_failed_call_is_named():
    with pytest.raises(
        RuntimeError, match="cuLaunchKernelEx failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    ):
        driver.check((real.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,), "cuLaunchKernelEx")
    assert driver.check((real.CUresult.CUDA_SUCCESS, 5), "x") == 5


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler._compiler.cache_clear()
    with pytest.raises(RuntimeError, match=r"no CUDA compiler: cuda-bindings is not .*nvcc is not on"):
        compiler.compile_kernel("looped_blocks/looped_blocks_sm90.cu", {}, "sm_90a")
    compiler._compiler.cache_clear()


def test_a_machine_without_a_compiler_cannot_use_the_backend(install, monkeypatch, tmp_path):
    """Unless the package holds kernels that are made."""

    def none():
        raise RuntimeError("no CUDA compiler: NVRTC cannot be loaded; and nvcc is not on the path")

    install()
    monkeypatch.setattr(compiler, "_compiler", none)
    monkeypatch.setattr(compiler, "PACKAGED", tmp_path / "cubins")
    assert driver.why_unavailable((9, 0)).startswith("no CUDA compiler")
    (tmp_path / "cubins").mkdir()
    assert driver.why_unavailable((9, 0)) is None


def test_compilers_say_what_is_wrong(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { missing(); }")
    with pytest.raises(RuntimeError, match=r"(?s)broken.cu does not compile for sm_90a.*missing"):
        compiler.with_nvrtc(source, [], "sm_90a")


def test_the_backend_is_listed_and_never_chosen():
    assert not {"triton", "cuda"} & set(backends.PREFERENCE)
    if not torch.cuda.is_available():
        assert lk.available_backends()["cuda"] == "no GPU"
        with (
            pytest.raises(RuntimeError, match="backend 'cuda' cannot be used here: no GPU"),
            lk.use_backend("cuda"),
        ):
            pass


class Two(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int32), ("second", ctypes.c_int32))


def test_launch(install):
    seen = SimpleNamespace()

    def launch(config, function, pointers, extra):
        seen.config, seen.function = config, function
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        seen.parameters = ctypes.string_at(address, 8)
        return (SUCCESS,)

    def set_attribute(function, name, value):
        seen.attribute = (name, value)
        return (SUCCESS,)

    install(cuLaunchKernelEx=launch, cuFuncSetAttribute=set_attribute)
    kernel = driver.Kernel(b"cubin", "entry", 200_000)
    names = real.CUfunction_attribute
    assert seen.attribute == (names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200_000)
    window = driver.l2_window(
        4096, 28_000_000, driver.Facts("a GPU", (9, 0), 132, 232_448, 14_000_000, 134_217_728)
    )
    kernel.launch(132, 384, 77, Two(1, 2), window)
    config, ids = seen.config, real.CUlaunchAttributeID
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (132, 1, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (384, 1, 1)
    assert config.sharedMemBytes == 200_000 and int(config.hStream) == 77 and config.numAttrs == 2
    assert seen.parameters == b"\1\0\0\0\2\0\0\0" and seen.function == b"entry"
    cooperative, policy = config.attrs
    assert cooperative.id == ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE and cooperative.value.cooperative == 1
    assert policy.id == ids.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
    kernel.launch(8, 64, 0, Two(1, 2), cluster=4)
    cooperative, cluster = seen.config.attrs
    shape = cluster.value.clusterDim
    assert cluster.id == ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (shape.x, shape.y, shape.z) == (4, 1, 1)
    kernel.launch_in_order(5, 64, 0, Two(1, 2), early=False)
    assert seen.config.numAttrs == 0
    kernel.launch_in_order(5, 64, 0, Two(1, 2), early=True)
    (early,) = seen.config.attrs
    assert early.id == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert early.value.programmaticStreamSerializationAllowed == 1
    kernel.allow_large_clusters()
    assert seen.attribute == (names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    found = policy.value.accessPolicyWindow
    assert (int(found.base_ptr), found.num_bytes, found.hitRatio) == (4096, 28_000_000, 0.5)
    assert found.hitProp == real.CUaccessProperty.CU_ACCESS_PROPERTY_PERSISTING


def test_windows_keep_to_what_the_device_has():
    limits = driver.Facts("a GPU", (9, 0), 132, 232_448, persisting_bytes=30_000_000, window_bytes=20_000_000)
    assert driver.l2_window(64, 28_000_000, limits) == (64, 20_000_000, 1.0)
    assert driver.l2_window(64, 28_000_000, limits._replace(persisting_bytes=0)) is None


def test_a_launch_of_no_blocks_says_what_is_wrong(install):
    fake = install()
    kernel = driver.Kernel(b"cubin", "entry", 200_000)
    for launch in (kernel.launch, partial(kernel.launch_in_order, early=False)):
        with pytest.raises(RuntimeError, match="entry: no block of 384 threads and 200000 bytes of shared"):
            launch(0, 384, 0, Two())
    assert not fake.named("cuLaunchKernelEx")


def test_l2_is_set_aside_once_and_given_back(install, monkeypatch):
    calls, limits = [], [70]

    def set_limit(limit, size):
        assert limit == real.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE
        calls.append(size)
        limits.append(size)
        return (SUCCESS,)

    install(
        cuCtxGetLimit=lambda limit: (SUCCESS, limits[-1]),
        cuCtxSetLimit=set_limit,
        cuCtxResetPersistingL2Cache=lambda: calls.append("reset") or (SUCCESS,),
    )
    monkeypatch.setattr(
        driver, "facts", lambda device: driver.Facts("a GPU", (9, 0), 132, 232_448, 1000, 2000)
    )
    monkeypatch.setattr(driver, "_set_aside", {})
    driver.set_aside_l2(0)
    driver.set_aside_l2(0)
    assert calls == [1000]
    driver.release_l2(0)
    assert calls[1:] == ["reset", 70], "the limit is what it was before"
    driver.release_l2(0)
    assert calls[3:] == ["reset"], "a limit that somebody else has set stays"
    driver.set_aside_l2(0)
    assert calls[4:] == [1000]


def test_tensor_maps(install):
    seen = []

    def encode(*arguments):
        seen.append(arguments)
        return SUCCESS, real.CUtensorMap()

    install(cuTensorMapEncodeTiled=encode)
    tensor_maps.encode.cache_clear()
    tensor = torch.empty(3, 50, 128, dtype=torch.bfloat16)
    described = tensor_maps.layout(tensor, rows=16)
    assert described == (tensor.data_ptr(), torch.bfloat16, (128, 50, 3), (256, 12800), (64, 16))
    assert len(tensor_maps.encode(described)) == 128
    tensor_maps.encode(tensor_maps.layout(tensor, rows=16))
    assert len(seen) == 1, "a map is kept for its buffer"
    kind, rank, address, sizes, strides, box, steps, _, swizzle, _, _ = seen[0]
    assert kind == real.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and rank == 3
    assert address == tensor.data_ptr()
    numbers = [[int(word) for word in words] for words in (sizes, strides, box, steps)]
    assert numbers == [[128, 50, 3], [256, 12800], [64, 16, 1], [1, 1, 1]]
    assert swizzle == real.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert tensor_maps.layout(tensor.float(), rows=16).box == (32, 16)
    tensor_maps.encode.cache_clear()


@pytest.mark.parametrize(
    ("tensor", "rows", "message"),
    [
        (torch.empty(2, 8, 64).transpose(1, 2), 8, "contiguous"),
        (torch.empty(2, 8, 6), 8, "multiple of 16 bytes"),
        (torch.empty(2 * 8 * 64 + 1)[1:].view(2, 8, 64), 8, "address 4 modulo 16"),
        (torch.empty(2, 8, 64), 300, "rows of a box: got 300"),
    ],
)
def test_what_tma_cannot_address(tensor, rows, message):
    with pytest.raises(ValueError, match=message):
        tensor_maps.layout(tensor, rows)
