"""The wrappers of csrc/cuda/ptx, and beside each the same instruction as others write it.

A peer is code: a function of libcu++'s `cuda::ptx` or an intrinsic of the compiler. Where there is neither it
is text, put together by the grammar that the PTX manual gives for the instruction, in the form of
`ptx.effects`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

from loopmdm_kernels.cuda import sources

# A probe is a kernel of one wrapper. Its parameters, and its shared memory:
NAMES = ("x", "counter", "source", "map", "p", "q", "a", "b", "c")
PARAMETERS = (
    "float* x, int32_t* counter, void* source, const TensorMap* map, uint64_t p, uint64_t q, "
    "int a, int b, int c"
)
MEMORY = "extern __shared__ uint64_t memory[];"
TARGET, BARRIER = "shared_address(memory)", "shared_address(memory + 1)"
_SECOND = "add.s32(memory, 8)"  # as text


class Peer(NamedTuple):
    ours: str  # statements that call the wrapper
    theirs: str | list[str]  # statements, or effects
    headers: tuple[str, ...] = ()  # of cuda::ptx that the statements need
    but: tuple[tuple[str, str], ...] = ()  # what theirs says and what ours says for it


def wrappers() -> list[str]:
    """Every function of csrc/cuda/ptx that has inline assembly, by its name and those of its parameters."""
    return [
        name for path in sorted((sources.folder() / "cuda" / "ptx").iterdir()) for name in _wrappers(path)
    ]


def _wrappers(path: Path) -> Iterator[str]:
    text = re.sub(r"//[^\n]*|\\\n", "", path.read_text())
    functions = list(re.finditer(r"__device__\s+(?:inline |static |[\w:]+\*? )+(\w+)\(([^{;]*)\)\s*\{", text))
    for function, following in zip(functions, [*functions[1:], None], strict=True):
        body = text[function.end() : following.start() if following else None]
        if re.search(r'\basm\s*(volatile)?\s*\(\s*"[^"]', body):  # an empty one only orders what is around it
            parameters = [re.findall(r"\w+", part)[-1] for part in _split(function[2])]
            parameters = [re.sub(r"\d+$", "", name) for name in parameters]
            yield f"{function[1]}({', '.join(parameters)})"


def _split(text: str) -> list[str]:
    text = re.sub(r"\(&(\w+)\)\[\w+\]", r"\1", text)
    return [part for part in text.split(",") if part.strip()]


def products() -> list[int]:
    """Columns of the products that wgmma.cuh is asked for."""
    text = (sources.folder() / "cuda" / "ptx" / "wgmma.cuh").read_text()
    return [int(columns) for columns in re.findall(r"^LOOPMDM_PRODUCT\((\d+),", text, re.M)]


def cuda_ptx() -> Path | None:
    """The folder that has `cuda/__ptx`: of pip's nvidia-cuda-cccl, or of a toolkit."""
    try:
        packaged = files("nvidia-cuda-cccl") or []
    except PackageNotFoundError:
        packaged = []
    folders = [Path(str(file.locate())).parents[1] for file in packaged if file.match("cccl/cuda/ptx")]
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).resolve().parents[1]] if nvcc else []
    toolkits.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    folders += [toolkit / "include" / "cccl" for toolkit in toolkits]
    return next((folder for folder in folders if (folder / "cuda" / "__ptx").is_dir()), None)


def probe(number: int, peer: Peer) -> str:
    """Two kernels, or one where the peer is text: `ours<number>` and `theirs<number>`."""
    kernels = {f"ours{number}": peer.ours}
    if isinstance(peer.theirs, str):
        kernels[f"theirs{number}"] = peer.theirs
    return "\n".join(
        f'extern "C" __global__ void {name}({PARAMETERS}) {{ {MEMORY} {body} }}'
        for name, body in kernels.items()
    )


def _stored(value: str, *, words: int = 1) -> list[str]:
    """The effect of `x[0] = value`, of several words each its own."""
    return [f"st.global.b32 [{_place(i)}], {value if words == 1 else f'{value}.{i}'}" for i in range(words)]


def _place(i: int) -> str:
    return f"x+{4 * i}" if i else "x"


def _loaded(i: int) -> str:
    return f"ld.global.b32([{_place(i)}])"


def _list(first: int, number: int) -> str:
    return "{" + ", ".join(_loaded(i) for i in range(first, first + number)) + "}"


def product(columns: int, *, registers: bool, left_outer: bool, right_outer: bool) -> Peer:
    """wgmma.mma_async, dense, bf16: m64nNk16 for N = 8, 16, ... 256, N / 2 sums in fp32 a thread.

        wgmma.mma_async.sync.aligned.shape.f32.bf16.bf16
            d, a-desc, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b;
            d, a, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-b;

    `a` is four registers. Transposed is an operand along its outer dimension.
    """
    sums = columns // 2
    outer = ["false", "true"]
    ours = f"float s[{sums}]; for (int i = 0; i < {sums}; ++i) s[i] = x[i]; "
    words = f"uint32_t left[4]; for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(x[{sums} + i]); "
    if registers:
        ours += words + f"WarpGroupProduct<{columns}>::registers<{outer[right_outer]}>(s, left, q, b != 0); "
    else:
        ours += f"WarpGroupProduct<{columns}>::shared<{outer[left_outer]}, {outer[right_outer]}>"
        ours += "(s, p, q, b != 0); "
    ours += f"for (int i = 0; i < {sums}; ++i) x[i] = s[i];"
    left = _list(sums, 4) if registers else "p"
    add = "setp.ne.b32(selp.b32(1, 0, setp.ne.b32(b, 0)), 0)"
    transposed = [] if registers else [str(int(left_outer))]
    operands = [_list(0, sums), left, "q", add, "1", "1", *transposed, str(int(right_outer))]
    text = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {', '.join(operands)}"
    return Peer(ours, [text, *_stored("#0", words=sums)])


def _waits(attempt: str, succeeded: str, *before: str) -> list[str]:
    """Tries until one succeeds, or the clock is two seconds on since the first had not: then an error.

    `succeeded`: of the result of the try whose place among the effects is put into it.
    """
    clock, again = "mov.b32 result, %globaltimer_lo", 4 + len(before)  # the place of the second try
    leave = f"@{succeeded.format(again)} bra L1"
    # A barrier's try waits by itself; while a counter is loaded the clock can be read.
    order, now = ([clock, leave], again + 1) if before else ([leave, clock], again + 2)
    late = f"setp.gt.u32(sub.u32(#{now}.0, #2.0), {2 * 10**9})"
    first = [attempt, f"@{succeeded.format(0)} bra L1", clock]
    return [*first, "L0:", *before, attempt, *order, f"@!{late} bra L0", "trap", "L1:"]


def _polls(attempt: str) -> list[str]:
    """Tries until a counter has come as far as `a`."""
    return _waits(attempt, "setp.ge.s32(#{}.0, a)", "nanosleep.u32 20")


_BOX = (
    "const int32_t at[3] = {a, b, c}; "
    "cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, "
    "memory, map, at, memory + 1"
)
_MATRICES = (
    "uint32_t v[4]; load_{}matrices(v, shared_address(memory)); for (int i = 0; i < 4; ++i) x[i] = "
    "__uint_as_float(v[i]);"
)
PEERS = {
    # async_copy.cuh: cp.async, of global memory past L1; without cp-size all of them are copied.
    "copy_16(target, source, there)": Peer(
        f"copy_16({TARGET}, source, a != 0);",
        ["cp.async.cg.shared::cta.global [memory], [source], 16, selp.b32(16, 0, setp.ne.b32(a, 0))"],
    ),
    "copy_16(target, source, policy)": Peer(
        f"copy_16({TARGET}, source, p);",
        ["cp.async.cg.shared::cta.global.L2::cache_hint [memory], [source], 16, p"],
    ),
    "copies_commit()": Peer("copies_commit();", ["cp.async.commit_group"]),
    "copies_wait()": Peer("copies_wait<3>();", ["cp.async.wait_group 3"]),
    # cluster.cuh
    "rank_in_cluster()": Peer(
        "*counter = rank_in_cluster();", "*counter = cuda::ptx::get_sreg_cluster_ctarank();", ("get_sreg",)
    ),
    "meet_in_cluster()": Peer(
        "meet_in_cluster();",
        "cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release); "
        "cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire);",
        ("barrier_cluster",),
    ),
    "barrier_arrive_at(barrier, rank)": Peer(
        f"barrier_arrive_at({BARRIER}, a);",
        "cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cluster, "
        "cuda::ptx::space_cluster, (uint64_t*)__cluster_map_shared_rank(memory + 1, a));",
        ("mbarrier_arrive",),
        # No data is handed over, only that a stage has been read: without a scope it is .cta, which waits for
        # no store to global memory. And the address is mapped in the window of shared memory.
        but=(
            (".release.cluster", ".release.cta"),
            ("mapa.u64(add.s64(", "mapa.shared::cluster.u32(add.s32("),
        ),
    ),
    "load_box_for_all(target, map, barrier, column, row, matrix, blocks)": Peer(
        f"load_box_for_all({TARGET}, map, {BARRIER}, a, b, c, 3);",
        f"{_BOX}, (uint16_t)3);",
        ("cp_async_bulk_tensor",),
    ),
    "load_box_for_all(target, map, barrier, column, row, matrix, blocks, policy)": Peer(
        f"load_box_for_all({TARGET}, map, {BARRIER}, a, b, c, 3, p);",
        [
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            f".multicast::cluster.L2::cache_hint [memory], [map, {{a, b, c}}], [{_SECOND}], 3, p"
        ],
    ),
    # mbarrier.cuh
    "barrier_init(barrier, arrivals)": Peer(
        f"barrier_init({BARRIER}, a);",
        "cuda::ptx::mbarrier_init(memory + 1, (uint32_t)a);",
        ("mbarrier_init",),
    ),
    "barrier_init_fence()": Peer(
        "barrier_init_fence();",
        "cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);",
        ("fence",),
    ),
    "barrier_arrive(barrier)": Peer(
        f"barrier_arrive({BARRIER});", "cuda::ptx::mbarrier_arrive(memory + 1);", ("mbarrier_arrive",)
    ),
    "barrier_arrive_expect(barrier, bytes)": Peer(
        f"barrier_arrive_expect({BARRIER}, a);",
        "cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, "
        "cuda::ptx::space_shared, memory + 1, (uint32_t)a);",
        ("mbarrier_arrive",),
    ),
    "barrier_wait(barrier, parity)": Peer(
        f"barrier_wait({BARRIER}, a);",
        _waits(f"mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 result, [{_SECOND}], a", "#{}.0"),
    ),
    # memory.cuh
    "load_shared(address)": Peer(
        f"x[0] = __uint_as_float(load_shared({TARGET}));",
        ["ld.shared::cta.b32 result, [memory]", *_stored("#0.0")],
    ),
    "load_shared_pair(address)": Peer(
        f"const float2 v = load_shared_pair({TARGET}); x[0] = v.x; x[1] = v.y;",
        ["ld.shared::cta.v2.b32 result, [memory]", *_stored("#0", words=2)],
    ),
    "store_shared(address, value)": Peer(
        f"store_shared({TARGET}, static_cast<uint32_t>(a));", ["st.shared::cta.b32 [memory], a"]
    ),
    "store_shared_float(address, value)": Peer(
        f"store_shared_float({TARGET}, __uint_as_float(a));", ["st.shared::cta.b32 [memory], a"]
    ),
    "store_shared_four(address, value)": Peer(
        f"store_shared_four({TARGET}, make_uint4(a, b, b, a));",
        ["st.shared::cta.v4.b32 [memory], {a, b, b, a}"],
    ),
    "store_shared_pair(address, pair)": Peer(
        f"store_shared_pair({TARGET}, make_float2(__uint_as_float(a), __uint_as_float(b)));",
        ["st.shared::cta.v2.b32 [memory], {a, b}"],
    ),
    "load_acquire(address)": Peer(
        "x[0] = __int_as_float(load_acquire(counter));",
        "x[0] = __int_as_float(__nv_atomic_load_n(counter, __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE));",
        but=(("ld.acquire.gpu.b32", "ld.acquire.gpu.global.b32"),),
    ),
    "store_release(address, value)": Peer(
        "store_release(counter, a);",
        "__nv_atomic_store_n(counter, a, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);",
        but=(("st.release.gpu.b32", "st.release.gpu.global.b32"),),
    ),
    "add_release(address, value)": Peer(
        "add_release(counter, a);", ["red.release.gpu.global.add.s32 [counter], a"]
    ),
    "wait_for(counter, target)": Peer(
        "wait_for(counter, a);",
        [*_polls("ld.relaxed.gpu.global.b32 result, [counter]"), "fence.acquire.gpu"],
    ),
    "proxy_fence()": Peer(
        "proxy_fence();", "cuda::ptx::fence_proxy_async(cuda::ptx::space_global);", ("fence",)
    ),
    "shared_proxy_fence()": Peer(
        "shared_proxy_fence();", "cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);", ("fence",)
    ),
    "keep_policy()": Peer(
        "*(uint64_t*)x = keep_policy();",
        # The operand is the share of the lines, all of them.
        ["st.global.b64 [x], createpolicy.fractional.L2::evict_last.b64(1.0)"],
    ),
    # mma.cuh: four sums, two pairs of each four rows of the left operand, one of the right.
    "multiply_add(sums, left, right_low, right_high)": Peer(
        "float s[4]; uint32_t l[4]; for (int i = 0; i < 4; ++i) s[i] = x[i]; "
        "for (int i = 0; i < 4; ++i) l[i] = __float_as_uint(x[4 + i]); multiply_add(s, l, a, b); "
        "for (int i = 0; i < 4; ++i) x[i] = s[i];",
        _stored(
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32({_list(4, 4)}, {{a, b}}, {_list(0, 4)})",
            words=4,
        ),
    ),
    "load_matrices(values, address)": Peer(
        _MATRICES.replace("{}", ""),
        ["ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 result, [memory]", *_stored("#0", words=4)],
    ),
    "load_transposed_matrices(values, address)": Peer(
        _MATRICES.replace("{}", "transposed_"),
        ["ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 result, [memory]", *_stored("#0", words=4)],
    ),
    # numbers.cuh, with the compiler's fast arithmetic
    "fast_exp2(x)": Peer("x[0] = fast_exp2(x[1]);", "x[0] = exp2f(x[1]);"),
    "fast_log2(x)": Peer("x[0] = fast_log2(x[1]);", "x[0] = __log2f(x[1]);"),
    "larger_or_nan(a, b)": Peer(
        "x[0] = larger_or_nan(x[1], x[2]);", _stored(f"max.NaN.f32({_loaded(1)}, {_loaded(2)})")
    ),
    # The first operand becomes the upper half.
    "pack_bf16(low, high)": Peer(
        "x[0] = __uint_as_float(pack_bf16(x[1], x[2]));",
        _stored(f"cvt.rn.bf16x2.f32({_loaded(2)}, {_loaded(1)})"),
    ),
    "from_half(bits)": Peer("x[0] = from_half(static_cast<uint16_t>(a));", _stored("cvt.f32.f16(a)")),
    # tma.cuh
    "load_box(target, map, barrier, column, row, matrix)": Peer(
        f"load_box({TARGET}, map, {BARRIER}, a, b, c);", f"{_BOX});", ("cp_async_bulk_tensor",)
    ),
    "load_box(target, map, barrier, column, row, matrix, policy)": Peer(
        f"load_box({TARGET}, map, {BARRIER}, a, b, c, p);",
        [
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            f"[memory], [map, {{a, b, c}}], [{_SECOND}], p"
        ],
    ),
    # warps.cuh
    "give_registers()": Peer("give_registers<40>();", ["setmaxnreg.dec.sync.aligned.u32 40"]),
    "take_registers()": Peer("take_registers<232>();", ["setmaxnreg.inc.sync.aligned.u32 232"]),
    "meet(threads)": Peer("meet<1>(a);", ["barrier.sync.aligned 1, a"]),
    "meet_at(barrier)": Peer("meet_at<256>(a);", ["barrier.sync.aligned a, 256"]),
    "arrive_at(barrier)": Peer("arrive_at<256>(a);", ["barrier.arrive.aligned a, 256"]),
    "elected()": Peer("*counter = elected();", "*counter = cuda::ptx::elect_sync(~0u);", ("elect_sync",)),
    # wgmma.cuh
    "products_commit()": Peer("products_commit();", ["wgmma.commit_group.sync.aligned"]),
    "products_wait()": Peer("products_wait<1>();", ["wgmma.wait_group.sync.aligned 1"]),
    "products_begin(values)": Peer("products_begin();", ["wgmma.fence.sync.aligned"]),
}
