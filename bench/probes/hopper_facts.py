"""Facts of a GPU that decide about the kernels: barriers, clusters, L2, peers of the phases, launch gaps.

Each is a function of a `Run` that returns figures by name. In a dry run everything is compiled,
prepared and, where a CPU can, called once; kernels are not launched, and None stands for every figure. A
string says why a GPU has no figure.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import attention
from bench.run import Calls, Figure, Figures
from bench.run import Run as GpuRun
from loopmdm_kernels.cuda import compiler, driver, looped_rows, targets, tensor_maps, weights
from loopmdm_kernels.schedule import BlockShape, RowsPlan, choose_rows
from loopmdm_kernels.testing import looped_inputs

HERE = Path(__file__).parent
SMALL = BlockShape(batch=1, length=1024, hidden=768, heads=12, mlp=3072, layers=2)
SUDOKU = BlockShape(batch=1, length=81, hidden=128, heads=4, mlp=512, layers=2)
WEIGHT_BYTES = 2 * SMALL.layers * SMALL.hidden * (4 * SMALL.hidden + 2 * SMALL.mlp)
PRODUCTS = {"qkv": (768, 2304), "attn_out": (768, 768), "mlp_in": (768, 3072), "mlp_out": (3072, 768)}
ATTENTION = (8, 12, 1024, 64)  # batch, heads, length, head size
ROUNDS = 1000  # of a barrier
READS = 20  # of all weights
CHAIN = 100  # kernels
REPEATS = 10  # of a call in a graph
PIECE_ROUNDS = 10_000  # a launch is a small part of them
PIECES = ("multiply_stages", "step_twice", "hand_over_both", "load_boxes")
CLUSTERS = (2, 4, 8, 16)
STAGE_ROWS, ROW_BYTES = 128, 128  # as in hopper_multicast.cu
RING_BYTES = 8 * STAGE_ROWS * ROW_BYTES + 1024
LOADERS = 64  # threads
SHARING = {"alone": 1, "pairs": 2, "fours": 4}


class Arguments(ctypes.Structure):
    _fields_ = (
        ("counters", ctypes.c_void_p),
        ("buffer", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("vectors", ctypes.c_int64),
        ("rounds", ctypes.c_int32),
    )


class SharedReads(ctypes.Structure):
    _fields_ = (
        ("map", ctypes.c_uint8 * 128),
        ("stages", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 56),  # the map's alignment is 64
    )


class Pieces(ctypes.Structure):
    _fields_ = (
        ("kernel", looped_rows.Parameters),
        ("rounds", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 60),  # the alignment is 64
    )


class NotLaunched:
    """In place of a kernel where there is no GPU."""

    def launch(self, *_: Any, **__: Any) -> None: ...

    launch_in_order = launch

    def allow_large_clusters(self) -> None: ...

    def active_clusters(self, size: int, threads: int) -> None: ...


class Run(GpuRun):
    """With what the probes need: the limits of the device, a stream and kernels."""

    @property
    def limits(self) -> driver.Facts:
        return driver.Facts("none", (9, 0), 132, 232_448, 0, 0) if self.dry else driver.facts(0)

    @property
    def stream(self) -> int:
        return 0 if self.dry else int(torch.cuda.current_stream().cuda_stream)

    def probe(
        self,
        name: str,
        source: str = "hopper_probes.cu",
        *,
        shared_bytes: int = 0,
        options: Sequence[str] = (),
    ) -> Any:
        """A kernel of the probes, compiled in any case."""
        cubin = _cubin(source, tuple(options))
        return NotLaunched() if self.dry else driver.Kernel(cubin, name, shared_bytes)


@cache
def _cubin(source: str, options: tuple[str, ...]) -> bytes:
    return compiler.with_nvrtc(HERE / source, ["-std=c++17", *options], targets.SM90.architecture)


def cuda_headers() -> list[Path]:
    """The folders of CUDA's own headers, of a toolkit or of its packages; none if one of these is missing."""
    needed = ("cooperative_groups.h", "nv/target")
    packages = find_spec("nvidia")
    places = (packages and packages.submodule_search_locations) or ()
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    roots += [folder for place in places for folder in Path(place).glob("*/include")]
    folders = [folder for root in roots for folder in (root, root / "cccl") if folder.is_dir()]
    found = [name for name in needed if any((folder / name).exists() for folder in folders)]
    return folders if len(found) == len(needed) else []


def scaled(seconds: Figure, factor: float) -> Figure:
    return seconds * factor if isinstance(seconds, float) else seconds


def rate(work: float, seconds: Figure) -> Figure:
    return work / seconds if isinstance(seconds, float) else seconds


def barriers(run: Run) -> Figures:
    """Microseconds for all blocks to meet: by CUDA's grid barrier, at our counters, in clusters."""
    sms = run.limits.sms
    headers = cuda_headers()
    cases = {
        "one counter": (run.probe("meet_at_one_counter"), sms, 1),
        "row counters": (run.probe("meet_at_row_counters"), sms, 1),
    }
    missing: Figures = {} if headers or run.dry else {"grid sync": "CUDA's headers are not installed"}
    if headers:
        try:  # of no other probe's business: the headers may be those of another version
            options = [f"-I{folder}" for folder in headers]
            probe = run.probe("meet_by_grid_sync", "hopper_grid_sync.cu", options=options)
            cases["grid sync"] = (probe, sms, 1)
        except RuntimeError as error:
            missing["grid sync"] = str(error).splitlines()[0]
    for size in CLUSTERS:
        kernel = run.probe("meet_in_cluster")
        kernel.allow_large_clusters()
        cases[f"cluster of {size}"] = (kernel, size * 4, size)
    counters = torch.zeros(32 * sms, dtype=torch.int32, device=run.device)

    def meeting(kernel: Any, blocks: int, cluster: int) -> Callable[[], None]:
        def call() -> None:
            counters.zero_()
            arguments = Arguments(counters=counters.data_ptr(), rounds=ROUNDS)
            kernel.launch(blocks, 128, run.stream, arguments, cluster=cluster)

        return call

    times = run.seconds({name: meeting(*case) for name, case in cases.items()})
    return {**missing, **{name: scaled(seconds, 1e6 / ROUNDS) for name, seconds in times.items()}}


def clusters(run: Run) -> Figures:
    """Clusters of 200 KB blocks that fit the device; bytes of L2 that can be kept."""
    kernel = run.probe("do_nothing", shared_bytes=200 * 1024)
    kernel.allow_large_clusters()
    figures: Figures = {f"clusters of {size}": kernel.active_clusters(size, 128) for size in CLUSTERS}
    limits = None if run.dry else run.limits
    return {
        **figures,
        "persisting L2 bytes": limits and limits.persisting_bytes,
        "SMs": limits and limits.sms,
    }


def l2_reads(run: Run) -> Figures:
    """Bytes a second of all SMs reading all weights, without and with a window that keeps them; of one SM."""
    kernel, limits = run.probe("read_all"), run.limits
    buffer = torch.zeros(WEIGHT_BYTES // 4, device=run.device)
    sink = torch.zeros(1, device=run.device)
    arguments = Arguments(
        buffer=buffer.data_ptr(), sink=sink.data_ptr(), vectors=WEIGHT_BYTES // 16, rounds=READS
    )
    window = driver.l2_window(buffer.data_ptr(), WEIGHT_BYTES, limits)
    cases = {"plain": (limits.sms, None), "kept": (limits.sms, window), "one SM": (1, None)}

    def reading(blocks: int, window: driver.L2Window | None) -> Callable[[], None]:
        return lambda: kernel.launch(blocks, 1024, run.stream, arguments, window)

    times = run.seconds({name: reading(*case) for name, case in cases.items()})
    return {name: rate(READS * cases[name][0] * WEIGHT_BYTES, seconds) for name, seconds in times.items()}


def loads(run: Run) -> Figures:
    """Microseconds of a load from L2 by all threads of a block, each of which waits for the one before."""
    kernel, buffer = run.probe("load_in_turn"), torch.zeros(WEIGHT_BYTES // 4, device=run.device)
    sink = torch.zeros(1, device=run.device)
    arguments = Arguments(
        buffer=buffer.data_ptr(), sink=sink.data_ptr(), vectors=WEIGHT_BYTES // 16, rounds=ROUNDS
    )
    times = run.seconds({"load": lambda: kernel.launch(run.limits.sms, 256, run.stream, arguments)})
    return {name: scaled(seconds, 1e6 / ROUNDS) for name, seconds in times.items()}


def multicast(run: Run) -> Figures:
    """Bytes a second that SMs get from L2 when blocks of a cluster load the same rows, alone or for all.

    Decides whether the ring of the kernels should load by multicast: docs/kernels/looped_blocks.md.
    """
    kernel = run.probe("read_together", "hopper_multicast.cu", shared_bytes=RING_BYTES)
    buffer = torch.zeros(
        1, WEIGHT_BYTES // ROW_BYTES, ROW_BYTES // 2, dtype=torch.bfloat16, device=run.device
    )
    blocks = {name: size * (kernel.active_clusters(size, LOADERS) or 1) for name, size in SHARING.items()}

    def reading(name: str, size: int) -> Callable[[], Any]:
        arguments = SharedReads(stages=buffer.shape[1] // STAGE_ROWS, rounds=READS)
        described = tensor_maps.layout(buffer, STAGE_ROWS // size)
        if not run.dry:
            arguments.map[:] = tensor_maps.encode(described)
        return lambda: kernel.launch(blocks[name], LOADERS, run.stream, arguments, cluster=size)

    times = run.seconds({name: reading(name, size) for name, size in SHARING.items()})
    return {name: rate(READS * blocks[name] * WEIGHT_BYTES, seconds) for name, seconds in times.items()}


def narrow_buffers(
    shape: BlockShape, plan: RowsPlan, device: torch.device | str
) -> tuple[looped_rows.Buffers, tensor_maps.Layout]:
    """What the pieces read and write, and the map of keys and values."""
    inputs = looped_inputs(1, shape.length, shape.hidden, shape.heads, num_blocks=shape.layers)
    inputs = inputs.to(torch.bfloat16, device=device)
    packed = weights.packed(inputs.blocks)
    given = (inputs.x.float(), packed, inputs.modulation, 1, inputs.rotary, None)
    buffers = looped_rows.Buffers.allocate(plan, *given)
    for ours in (buffers.affine, buffers.gate):  # which no kernel before has written
        ours.zero_()
    return buffers, looped_rows.map_layouts(plan, buffers, packed)["qkv"]


def narrow_options(plan: RowsPlan) -> list[str]:
    return [f"-D{name}={value}" for name, value in looped_rows.defines(SUDOKU, plan).items()]


def narrow_blocks(run: Run) -> Figures:
    """Pieces of the kernel for narrow blocks: bytes a second that products of eight tokens read out of shared
    memory; microseconds of a step of all threads, of handing over keys, of loading a box.
    """
    plan = choose_rows(SUDOKU)
    assert plan is not None
    buffers, keys = narrow_buffers(SUDOKU, plan, run.device)
    arguments = Pieces(kernel=looped_rows.pack_parameters(buffers, None), rounds=PIECE_ROUNDS)
    if not run.dry:
        arguments.kernel.qkv[:] = tensor_maps.encode(keys)

    def piece(name: str) -> Callable[[], Any]:
        options = narrow_options(plan)
        kernel = run.probe(name, "hopper_narrow.cu", shared_bytes=plan.shared_bytes, options=options)
        kernel.allow_large_clusters()
        return lambda: kernel.launch(plan.blocks, plan.threads, run.stream, arguments, cluster=plan.blocks)

    times = run.seconds({name: piece(name) for name in PIECES})
    return {
        "bytes of products": rate(PIECE_ROUNDS * plan.stage_bytes, times["multiply_stages"]),
        "step": scaled(times["step_twice"], 1e6 / PIECE_ROUNDS / 2),
        "hand-over": scaled(times["hand_over_both"], 1e6 / PIECE_ROUNDS / 2),
        "box": scaled(times["load_boxes"], 1e6 / PIECE_ROUNDS),
    }


def attention_peers(run: Run) -> Figures:
    """Seconds of attention by itself, by implementation: torch's, FlashAttention-3, ours in Triton."""
    batch, heads, length, head_dim = (1, 1, 16, 8) if run.dry else ATTENTION
    run = run._replace(other_sizes=run.sizes._replace(heads=heads, hidden=heads * head_dim))
    calls = dict(attention.gpu_calls(run, batch, length))
    return repeated(run, {"triton": run.on_backends(calls.pop("ours"))["triton"], **calls})


def repeated(run: Run, calls: Calls) -> Figures:
    """Seconds of each call, as a part of a CUDA graph of several: a launch from Python takes longer."""
    makers = {
        name: partial(run.captured, lambda call=call: [call() for _ in range(REPEATS)])
        for name, call in calls.items()
    }
    graphs, failed = run.made(makers)
    times = run.seconds(graphs)
    return {**failed, **{name: scaled(seconds, 1 / REPEATS) for name, seconds in times.items()}}


def products(run: Run) -> Figures:
    """Seconds of cuBLAS for the four matrices at 1024 tokens: what the phases' tiles have to reach."""
    rows = 4 if run.dry else SMALL.length
    calls = {}
    for name, (inner, width) in PRODUCTS.items():
        left = torch.randn(rows, inner, device=run.device, dtype=torch.bfloat16)
        right = torch.randn(width, inner, device=run.device, dtype=torch.bfloat16)
        calls[name] = partial(F.linear, left, right)
    return repeated(run, calls)


def gaps(run: Run) -> Figures:
    """Microseconds from one empty kernel to the next in a CUDA graph: in order, and launched early (PDL)."""
    arguments = Arguments()

    def chain(kernel: Any, early: bool) -> Callable[[], None]:
        def call() -> None:
            for _ in range(CHAIN):
                kernel.launch_in_order(132, 128, run.stream, arguments, early=early)

        return run.captured(call)

    calls = {
        "in order": chain(run.probe("do_nothing"), False),
        "launched early": chain(run.probe("do_nothing_early"), True),
    }
    return {name: scaled(seconds, 1e6 / CHAIN) for name, seconds in run.seconds(calls).items()}
