"""Every instruction that csrc/cuda/ptx writes by hand reads as others write it."""

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
import hopper
import instructions
import ptx
from instructions import PEERS, product

from loopmdm_kernels.cuda import sources

# Of the two wrappers that are there for each number of columns: all operands that they can be given.
PRODUCTS = {
    f"{'registers' if registers else 'shared'}, {columns} columns, "
    f"{'outer' if left else 'inner'} by {'outer' if right else 'inner'}": product(
        columns, registers=registers, left_outer=left, right_outer=right
    )
    for columns in instructions.products()
    for registers, left, right in (
        (False, False, False), (False, False, True), (False, True, False), (False, True, True),
        (True, False, False), (True, False, True),
    )
}  # fmt: skip
PRODUCT_WRAPPERS = ["shared(sums, left, right, add)", "registers(sums, left, right, add)"]
ALL = {**PEERS, **PRODUCTS}
HEADERS = instructions.cuda_ptx()


def test_every_wrapper_has_a_peer():
    assert instructions.wrappers() == [*PEERS, *PRODUCT_WRAPPERS]
    assert instructions.products(), "none is read from the source"


def test_nowhere_else_is_inline_assembly():
    """But empty pieces, which order what the compiler may move."""
    with_instructions = re.compile(r'\basm\s*(volatile)?\s*\(\s*(\\\s*)?"[^"]')
    folder = sources.folder()
    found = {p.parent.name for p in folder.rglob("*.cu*") if with_instructions.search(p.read_text())}
    assert found == {"ptx"}


def effects(peers, *options):
    """What ours and theirs do, by the wrapper's name."""
    headers = {header for peer in peers.values() for header in peer.headers}
    files = [f"cuda/ptx/{path.name}" for path in sorted((sources.folder() / "cuda" / "ptx").iterdir())]
    files += [f"cuda/__ptx/instructions/{header}.h" for header in sorted(headers)]
    lines = [f"#include <{file}>" for file in files] + ["using namespace loopmdm;"]
    lines += [instructions.probe(number, peer) for number, peer in enumerate(peers.values())]
    common = ["-std=c++17", "--use_fast_math", *([f"-I{HEADERS}"] if headers else [])]
    text, _ = hopper.nvrtc("\n".join(lines), [*options, *common], "compute_90a")
    kernels = ptx.kernels(text)
    found = {}
    for number, (name, peer) in enumerate(peers.items()):
        texts = [kernels.get(f"{side}{number}") for side in ("ours", "theirs")]
        found[name] = [ptx.effects(text, instructions.NAMES) if text else peer.theirs for text in texts]
    return found


def same(name, ours, theirs):
    """Whether they are, but for the difference that is stated."""
    for words, instead in ALL[name].but:
        changed = [line.replace(words, instead) for line in theirs]
        assert changed != theirs, f"{words} is no difference"
        theirs = changed
    return ours == theirs


@pytest.fixture(scope="module")
def probes():
    usable = {name: peer for name, peer in ALL.items() if HEADERS or not peer.headers}
    return effects(usable)


@hopper.needs_nvrtc
@pytest.mark.parametrize("name", ALL)
def test_text(name, probes):
    if name not in probes:
        pytest.skip("libcu++ is not installed: pip install nvidia-cuda-cccl")
    assert same(name, *probes[name]), "\n".join(map(str, probes[name]))


# What replaces what in the source of a wrapper.
FAULTS = {
    "a box expects no bytes": (
        "barrier_arrive_expect(barrier, bytes)", '_, [%0], %1;" ::"r"(barrier), "r"(bytes)',
        '_, [%0], 0;" ::"r"(barrier), "r"(bytes)',
    ),
    "column and row exchanged": (
        "load_box(target, map, barrier, column, row, matrix, policy)", "{%3, %4, %5}", "{%4, %3, %5}"
    ),
    "a box for one block only": (
        "load_box_for_all(target, map, barrier, column, row, matrix, blocks)", '"h"(blocks)',
        '"h"(uint16_t(1))',
    ),
    "the fence of another memory": (
        "proxy_fence()", "fence.proxy.async.global", "fence.proxy.async.shared::cta"
    ),
    "a signal that releases nothing": ("add_release(address, value)", "red.release.", "red.relaxed."),
    "a wait that acquires nothing": ("load_acquire(address)", "ld.acquire.", "ld.relaxed."),
    "a wait for a counter that acquires nothing": (
        "wait_for(counter, target)", '"fence.acquire.gpu;\\n"', '""'
    ),
    "a wait for a counter that empties L1 at each try": (
        "wait_for(counter, target)", 'LOOPMDM_TRY "ld.relaxed.', 'LOOPMDM_TRY "ld.acquire.'
    ),
    "a wait that goes on when nothing has come": (
        "barrier_wait(barrier, parity)", "@done bra DONE", "@!done bra DONE"
    ),
    "a wait without an end": ("wait_for(counter, target)", '"trap;\\n"', ""),
    "a wait that ends at once": ("wait_for(counter, target)", "@!late bra AGAIN", "@late bra AGAIN"),
    "a clock that begins anew at each try": (
        "barrier_wait(barrier, parity)", '"AGAIN:\\n"', '"AGAIN:\\nmov.u32 begin, %%globaltimer_lo;\\n"'
    ),
    "registers that nobody gave": ("take_registers()", "setmaxnreg.inc", "setmaxnreg.dec"),
    "bf16 in the wrong halves": ("pack_bf16(low, high)", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "a maximum that loses NaN": ("larger_or_nan(a, b)", "max.NaN.f32", "max.f32"),
    "matrices not transposed": ("load_transposed_matrices(values, address)", ".x4.trans.", ".x4."),
    "operands exchanged": (
        "shared, 64 columns, inner by outer", '"l"(left), "l"(right)', '"l"(right), "l"(left)'
    ),
    "the wrong operand read across": (
        "shared, 64 columns, inner by outer", '", p, 1, 1, %" #n3 ", %" #n4', '", p, 1, 1, %" #n4 ", %" #n3'
    ),
    "sums in another order": (
        "registers, 32 columns, inner by outer", '"+f"(sums[i]), "+f"(sums[i + 1])',
        '"+f"(sums[i + 1]), "+f"(sums[i])',
    ),
    "sums that are not cleared": ("registers, 16 columns, inner by inner", "setp.ne.b32 p", "setp.eq.b32 p"),
}  # fmt: skip


@hopper.needs_nvrtc
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, tmp_path):
    name, old, new = FAULTS[fault]
    folder = tmp_path / "cuda" / "ptx"
    shutil.copytree(sources.folder() / "cuda" / "ptx", folder)
    shutil.copytree(sources.folder() / "common", tmp_path / "common")
    holding = [path for path in folder.iterdir() if old in path.read_text()]
    assert holding, f"{old} is in no source"
    for path in holding:
        path.write_text(path.read_text().replace(old, new))
    if ALL[name].headers and not HEADERS:
        pytest.skip("libcu++ is not installed: pip install nvidia-cuda-cccl")
    assert not same(name, *effects({name: ALL[name]}, f"-I{tmp_path}")[name])
