"""The CUDA driver through cuda-bindings: why it cannot be used here, and the few calls that are needed."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any, NamedTuple

from loopmdm_kernels.cuda import compiler
from loopmdm_kernels.cuda.targets import why_none

OLDEST_DRIVER = 12000  # TMA and clusters
_thread = threading.local()  # .devices: those that have been given a context here
_REGISTERS = 65536  # of a multiprocessor, and the most that a block can have
_MOST_REGISTERS = 255  # of a thread
_THREADS_THAT_MOVE_REGISTERS = 384
_SEMAPHORE_BYTES = 64  # twice what sem_t has
_lock = threading.RLock()  # a parameter that goes meanwhile gives L2 back
_set_aside: dict[int, int] = {}  # devices whose L2 is set aside for windows: the limit before


def bindings() -> Any:
    """The module cuda.bindings.driver.

    Raises:
        RuntimeError: cuda-bindings or the driver is missing, or the driver is too old; says what to do.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError("cuda-bindings is not installed: pip install 'loopmdm-kernels[gpu]'") from error
    try:
        status, version = driver.cuDriverGetVersion()
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"the CUDA driver (libcuda) cannot be loaded: {error}") from error
    if int(status) != 0 or version == 0:
        raise RuntimeError(f"the CUDA driver does not answer ({_name(status)}); see nvidia-smi")
    if version < OLDEST_DRIVER:
        raise RuntimeError(
            f"the driver is for CUDA {_dotted(version)}; the kernels need {_dotted(OLDEST_DRIVER)} or later"
        )
    return driver


def why_unavailable(capability: tuple[int, int] | None) -> str | None:
    """Why a device of this compute capability cannot run the kernels here, or None."""
    if capability is None:
        return "no GPU"
    reason = why_none(capability)
    if reason is not None:
        return reason
    try:
        bindings()
    except RuntimeError as error:
        return str(error)
    return compiler.why_none()


def check(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call.

    Raises:
        RuntimeError: it failed; names the call and the driver's word for the error.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{what} failed: {_name(status)}")
    return values[0] if len(values) == 1 else values


def ensure_context(device: int) -> None:
    """Give the calling thread the primary context of `device`, the current one, if it has none.

    Driver calls, unlike torch's, take the context of their thread. One that has made no call of the runtime
    has none, and torch makes none where the device is already the current one: so it is in autograd's thread
    and in those of a server. Looked at once in each thread for each device.
    """
    devices: set[int] = _thread.__dict__.setdefault("devices", set())
    if device in devices:
        return
    driver = bindings()
    if not int(check(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")):
        handle = check(driver.cuDeviceGet(device), "cuDeviceGet")
        context = check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
        check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    devices.add(device)


class Facts(NamedTuple):
    name: str
    capability: tuple[int, int]
    sms: int
    shared_bytes: int  # that a block can have
    persisting_bytes: int  # of L2 that can be set aside
    window_bytes: int  # that an access policy can span


@cache
def facts(device: int) -> Facts:
    driver = bindings()
    names = driver.CUdevice_attribute
    handle = check(driver.cuDeviceGet(device), "cuDeviceGet")

    def value(name: Any) -> int:
        return int(check(driver.cuDeviceGetAttribute(name, handle), "cuDeviceGetAttribute"))

    name = check(driver.cuDeviceGetName(256, handle), "cuDeviceGetName")
    return Facts(
        name.split(b"\0")[0].decode(),
        (
            value(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            value(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        value(names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        value(names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        value(names.CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE),
        value(names.CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE),
    )


class Kernel:
    """A kernel of a cubin, loaded into the primary context of `device`, which must be the current one."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int, device: int = 0) -> None:
        ensure_context(device)
        driver = bindings()
        self.name, self.shared_bytes, self._device = name, shared_bytes, device
        self._module = check(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
        self._function = check(driver.cuModuleGetFunction(self._module, name.encode()), "cuModuleGetFunction")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), "cuFuncSetAttribute")
        self.registers = self._attribute("NUM_REGS")  # of a thread
        self.local_bytes = self._attribute("LOCAL_SIZE_BYTES")

    def breach(self, threads: int) -> str | None:
        """How its code is not what it is written to be, in blocks of so many threads; None if it is.

        What the registers do not hold goes through local memory, and products wait for each other. A kernel
        of three warp groups moves registers from one to the others: if it begins with fewer than its share
        of them, who asks for more waits for ever.
        """
        share = min(_MOST_REGISTERS, _REGISTERS // threads // 8 * 8)
        moved = threads == _THREADS_THAT_MOVE_REGISTERS
        if not self.local_bytes and (self.registers == share if moved else self.registers <= share):
            return None
        expected = f"{share} registers" if moved else f"at most {share} registers"
        return (
            f"its kernel {self.name} has {self.registers} registers and {self.local_bytes} bytes of local "
            f"memory a thread, expected {expected} and none: this compiler makes other code of it"
        )

    def blocks_per_sm(self, threads: int) -> int:
        ensure_context(self._device)
        driver = bindings()
        query = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        return int(check(query(self._function, threads, self.shared_bytes), query.__name__))

    def active_clusters(self, size: int, threads: int) -> int:
        """How many clusters of this size the device holds at the same time; 0: it has none of this size."""
        ensure_context(self._device)
        driver = bindings()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.attrs, config.numAttrs = [_cluster(size)], 1
        query = driver.cuOccupancyMaxActiveClusters
        result = query(self._function, config)
        if result[0] == driver.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE:
            return 0
        return int(check(result, query.__name__))

    def _attribute(self, name: str) -> int:
        driver = bindings()
        attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(check(driver.cuFuncGetAttribute(attribute, self._function), "cuFuncGetAttribute"))

    def launch(
        self,
        blocks: int,
        threads: int,
        stream: int,
        parameters: ctypes.Structure,
        kept: L2Window | None = None,
        cluster: int = 1,
        cooperative: bool = True,
    ) -> None:
        """Cooperative: all blocks run at the same time, or the launch fails. Else only those of a cluster do.

        Raises:
            RuntimeError: it fails, or there are no blocks, as where none fits.
        """
        driver = bindings()
        names = driver.CUlaunchAttributeID
        attributes = []
        if cooperative:
            together = driver.CUlaunchAttribute()
            together.id = names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            together.value.cooperative = 1
            attributes.append(together)
        if kept is not None:
            policy = driver.CUlaunchAttribute()
            policy.id = names.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
            policy.value.accessPolicyWindow = kept.policy()
            attributes.append(policy)
        if cluster > 1:
            attributes.append(_cluster(cluster))
        self._launch(blocks, threads, stream, parameters, attributes)

    def launch_in_order(
        self,
        blocks: int,
        threads: int,
        stream: int,
        parameters: ctypes.Structure,
        *,
        early: bool,
        cluster: int = 1,
    ) -> None:
        """Not cooperative; `early`: it may begin before the kernel before it has ended."""
        driver = bindings()
        attributes = [_cluster(cluster)] if cluster > 1 else []
        if early:
            programmatic = driver.CUlaunchAttribute()
            programmatic.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            programmatic.value.programmaticStreamSerializationAllowed = 1
            attributes.append(programmatic)
        self._launch(blocks, threads, stream, parameters, attributes)

    def allow_large_clusters(self) -> None:
        """Of 16 blocks, which not every device of an architecture must have."""
        ensure_context(self._device)
        driver = bindings()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        check(driver.cuFuncSetAttribute(self._function, attribute, 1), "cuFuncSetAttribute")

    def _launch(
        self, blocks: int, threads: int, stream: int, parameters: ctypes.Structure, attributes: list[Any]
    ) -> None:
        if blocks < 1:
            raise RuntimeError(
                f"{self.name}: no block of {threads} threads and {self.shared_bytes} bytes of shared memory "
                "fits this GPU, or the part of it that this process may use (MIG, MPS)"
            )
        ensure_context(self._device)
        driver = bindings()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        config.hStream = driver.CUstream(stream)
        config.attrs, config.numAttrs = attributes, len(attributes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        check(
            driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0), "cuLaunchKernelEx"
        )


def capture_of(stream: int) -> tuple[int, Any]:
    """The number, which no other has, and the graph of the capture that a stream is in."""
    driver = bindings()
    result = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    _, number, graph, *_ = check(result, "cuStreamGetCaptureInfo")
    return int(number), graph


class CapturedGraph:
    """How long a graph lives, or anything that is instantiated from it.

    At the end CUDA calls a function, in a thread that may neither call CUDA nor wait for Python: it is
    `sem_post` of the C library. Its semaphore stays where Python ends first.
    """

    def __init__(self, graph: Any) -> None:
        driver, library = bindings(), _c_library()
        self._semaphore: int | None = library.calloc(1, _SEMAPHORE_BYTES)
        library.sem_init(self._semaphore, 0, 0)
        post = driver.CUhostFn(ctypes.cast(library.sem_post, ctypes.c_void_p).value)
        apart = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        owned = check(driver.cuUserObjectCreate(self._semaphore, post, 1, int(apart)), "cuUserObjectCreate")
        move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        check(driver.cuGraphRetainUserObject(graph, owned, 1, int(move)), "cuGraphRetainUserObject")

    def ended(self) -> bool:
        if self._semaphore is not None and _c_library().sem_trywait(self._semaphore) == 0:
            _c_library().free(self._semaphore)
            self._semaphore = None
        return self._semaphore is None


class L2Window(NamedTuple):
    """Bytes that shall stay in L2 while a kernel runs."""

    address: int
    size: int
    hit_ratio: float  # of the window, what may be kept: more than fits would evict itself

    def policy(self) -> Any:
        driver = bindings()
        window = driver.CUaccessPolicyWindow()
        window.base_ptr, window.num_bytes, window.hitRatio = self.address, self.size, self.hit_ratio
        window.hitProp = driver.CUaccessProperty.CU_ACCESS_PROPERTY_PERSISTING
        window.missProp = driver.CUaccessProperty.CU_ACCESS_PROPERTY_STREAMING
        return window


def l2_window(address: int, size: int, limits: Facts) -> L2Window | None:
    """The part of a buffer that the device lets a kernel keep, or None where it has no such thing."""
    size = min(size, limits.window_bytes)
    if not size or not limits.persisting_bytes:
        return None
    return L2Window(address, size, min(1.0, limits.persisting_bytes / size))


def set_aside_l2(device: int) -> None:
    """As much of L2 as the device allows may be kept by windows, until `release_l2`.

    Each call of `looped_blocks` does this; the replay of a graph does not.
    """
    with _lock:
        if device not in _set_aside:
            before = _set_limit(device, facts(device).persisting_bytes)
            _set_aside[device] = before


def release_l2(device: int) -> None:
    """Give L2 back to everything else: between measurements of ours and of others, and after the last model.

    Lines that windows have kept become ordinary ones, which any access may evict, and the part set aside is
    as large as before `set_aside_l2`. Nothing is evicted by this: what comes next does not find L2 cold.
    """
    ensure_context(device)
    with _lock:
        check(bindings().cuCtxResetPersistingL2Cache(), "cuCtxResetPersistingL2Cache")
        if device in _set_aside:
            _set_limit(device, _set_aside.pop(device))


def _set_limit(device: int, size: int) -> int:
    """Of the bytes that windows may keep; returns what it was."""
    ensure_context(device)
    driver = bindings()
    limit = driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE
    before = int(check(driver.cuCtxGetLimit(limit), "cuCtxGetLimit"))
    check(driver.cuCtxSetLimit(limit, size), "cuCtxSetLimit")
    return before


@cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.calloc.restype = ctypes.c_void_p
    library.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.free.argtypes = library.sem_post.argtypes = library.sem_trywait.argtypes = [ctypes.c_void_p]
    library.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    return library


def _cluster(size: int) -> Any:
    driver = bindings()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    shape = attribute.value.clusterDim
    shape.x, shape.y, shape.z = size, 1, 1
    return attribute


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
