"""What the compiler has made of the kernels, counted: products and their waits, registers, barriers."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
import builds
import hopper
import launches
import machine_code
import products
import ptx
import walk

from loopmdm_kernels.cuda import sources

LOADING = [(family, name) for family in builds.NAMES for name in builds.each(family, loading=True)]
# The walk has two lanes of a warp, which tell two blocks of narrow models that keys are free.
WALKED = [each for each in LOADING if each[0] != "rows" or each[1] == "16 tokens"]
OF_BLOCK = 3 * 168  # registers of the three threads that stand for the warp groups of a block of 384


def kernel(text):
    (found,) = ptx.kernels(text).values()
    return found


def shares(text):
    """Registers that a thread has after it gives some, and after it takes some."""
    found = re.findall(r"setmaxnreg\.(dec|inc)\.sync\.aligned\.u32\s+(\d+);", text)
    assert sorted(direction for direction, _ in found) == ["dec", "inc"]
    return {direction: int(number) for direction, number in found}


def beyond(text):
    """Registers that the warp groups ask for and the block has not."""
    asked = shares(text)
    return max(asked["dec"] + 2 * asked["inc"] - OF_BLOCK, 0)


@pytest.mark.parametrize(("family", "name"), LOADING)
def test_products_in_ptx(family, name, built):
    """Where a wait that is missing shows: the assembler would put it in, and the products in series."""
    assert not products.faults(products.in_ptx(kernel(built(family, name).ptx)))


@pytest.mark.parametrize(("family", "name"), LOADING)
def test_machine_code(family, name, built):
    """Products are waited for here too, and each warp group keeps to its registers."""
    build = built(family, name)
    program = machine_code.disassembled(build.cubin)
    assert not products.faults(products.in_sass(program))
    if family == "rows":  # whose warps have registers enough
        assert not machine_code.shares(program)
        return
    assert hopper.resources(build.cubin)["REG"] * 3 == OF_BLOCK and not beyond(build.ptx)
    found = machine_code.shares(program)
    assert {direction: share for direction, (share, _) in found.items()} == shares(build.ptx)
    assert all(used <= share for share, used in found.values()), found
    outside = set(range(len(program.instructions))) - program.reachable(0)
    assert {program.instructions[i].opcode for i in outside} <= {"BRA", "NOP"}, "what cannot be reached"
    # What PTX says of barriers and boxes, the assembler has carried over one to one.
    for instruction, ptx_text in CARRIED_OVER.items():
        assert len(program.numbers(instruction)) == build.ptx.count(ptx_text), instruction


@pytest.fixture(scope="module")
def launches_of_head(tmp_path_factory):
    return launches.of_head(tmp_path_factory.mktemp("head"))


@pytest.mark.parametrize(("family", "name"), WALKED)
def test_barriers(family, name, built, launches_of_head):
    """Counts, arrivals, bytes and waits of every round, in a walk through the loading and computing warps."""
    several = {"forward": launches.forward, "backward": launches.backward, "rows": launches.rows}
    several["head"] = lambda name: [launches_of_head[name]]
    walks = [walk.Walk(kernel(built(family, name).ptx), launch) for launch in several[family](name)]
    assert not [fault for each in walks for fault in each.faults]
    rounds = Counter()
    for each in walks:
        rounds |= Counter({place: 1 + barrier.complete for place, barrier in each.barriers.items()})
    assert min(rounds.values()) > 1, "a barrier that nobody waits for"
    once = sum(number == 2 for number in rounds.values())
    assert once == walks[-1].launch.rare * walks[-1].launch.walked, "a ring that did not come round"
    left_out = set.intersection(*(set(each.left_out) for each in walks))
    assert not left_out, "instructions that no walk has come to"


# Of SASS, and of PTX.
CARRIED_OVER = {
    "SYNCS.EXCH": "mbarrier.init",
    "UTMALDG": "cp.async.bulk.tensor",
    "BAR.ARV": "bar.arrive",
}


def planted(fault, folder, monkeypatch, family="head", name="gradient_product, rows"):
    """The PTX of a kernel with a fault."""
    file, text, instead = fault
    copy = folder / "csrc"
    shutil.copytree(sources.folder(), copy)
    (path,) = copy.rglob(file)
    before = path.read_text()
    assert text in before, "the test looks for source that is not there"
    path.write_text(before.replace(text, instead))
    monkeypatch.setattr(sources, "folder", lambda: copy)
    source = sources.folder() / "cuda" / builds.source_of(family, name)
    options = ["-std=c++17", *builds.options_of(family, name)]
    return hopper.nvrtc(source.read_text(), options, "compute_90a")[0]


# What replaces what.
AROUND = "stage_ring_sm90.cuh"
PRODUCT_FAULTS = {
    "no wait for the last products": (
        AROUND, "products_wait<0>();\n  pin(sums);", "pin(sums);"
    ),
    "no wait between stages": (AROUND, "products_wait<1>();", ""),
    "a wait that leaves the last products under way": (AROUND, "products_wait<0>();", "products_wait<1>();"),
    "products that no group has": (AROUND, "products_commit();", ""),
}  # fmt: skip
PRODUCT = "masked_cross_entropy_product_sm90.cu"
BARRIER_FAULTS = {
    "a count too low": (AROUND, "kBlocks * kReaders", "kReaders"),
    "a count too high": (
        AROUND,
        "barrier_init(shared_address(&barriers_->full[i]), 1)",
        "barrier_init(shared_address(&barriers_->full[i]), 2)",
    ),
    "bytes too few": (PRODUCT, "expect(full, Shape::kStageBytes)", "expect(full, Shape::kStageBytes - 128)"),
    "bytes too many": (PRODUCT, "expect(full, Shape::kStageBytes)", "expect(full, Shape::kStageBytes + 128)"),
    "a box too few": (PRODUCT, "i < Shape::kRightPanels; i += 2", "i < Shape::kRightPanels - 2; i += 2"),
    "boxes on one another": (
        PRODUCT,
        "Shape::kLeftBytes + panel * Shape::kPanelBytes",
        "Shape::kLeftBytes + panel * Shape::kPanelBytes / 2",
    ),
    "no wait for a stage": (AROUND, "barrier_wait(full(place), place.round)", "(void)place"),
    "a stage filled while it is read": (
        AROUND,
        "wait_together(empty(place), place.round ^ 1)",
        "(void)place",
    ),
    "the wrong round": (AROUND, "empty(place), place.round ^ 1", "empty(place), place.round"),
    "a stage released before the wait": (
        AROUND,
        "products_wait<1>();\n    if (step > 0) ring.release(before);",
        "if (step > 0) ring.release(before);\n    products_wait<1>();",
    ),
    "a stage released in one block only": (AROUND, "lane < kBlocks", "lane < 1"),
}
SHARE_FAULTS = {
    "a share that the block has not": (AROUND, "(3 * 168 - kLoadRegisters) / 2", "248"),
    "a share that nobody gave": (
        AROUND, "give_registers<kLoadRegisters>();", "give_registers<kLoadRegisters + 8>();"
    ),
}  # fmt: skip


@hopper.needs_nvrtc
@pytest.mark.parametrize("fault", PRODUCT_FAULTS)
def test_planted_faults_of_products_are_noticed(fault, tmp_path, monkeypatch):
    text = planted(PRODUCT_FAULTS[fault], tmp_path, monkeypatch)
    assert products.faults(products.in_ptx(kernel(text)))


@hopper.needs_nvrtc
def test_a_fence_left_out_is_noticed(tmp_path, monkeypatch):
    """Where operands are in registers, which are written just before."""
    fault = ("product_sm90.cuh", "products_begin(sums, operand);", "")
    text = planted(fault, tmp_path, monkeypatch, "forward", "sudoku6, heads of 16")
    assert products.faults(products.in_ptx(kernel(text)))


@hopper.needs_nvrtc
@pytest.mark.parametrize("fault", SHARE_FAULTS)
def test_planted_faults_of_shares_are_noticed(fault, tmp_path, monkeypatch):
    assert beyond(planted(SHARE_FAULTS[fault], tmp_path, monkeypatch))


@hopper.needs_nvrtc
@pytest.mark.parametrize("fault", BARRIER_FAULTS)
def test_planted_faults_of_barriers_are_noticed(fault, tmp_path, monkeypatch, launches_of_head):
    text = planted(BARRIER_FAULTS[fault], tmp_path, monkeypatch)
    assert walk.Walk(kernel(text), launches_of_head["gradient_product, rows"]).faults


TURNS = "turns_sm90.cuh"
TURN_FAULTS = {
    "a group that does not wait for its turn": (TURNS, "meet_at<kThreads>(kFirstBarrier + group_);", ""),
    "a group that waits for the other one's turn": (
        TURNS, "meet_at<kThreads>(kFirstBarrier + group_);", "meet_at<kThreads>(kFirstBarrier + 1 - group_);"
    ),
    "a turn that is passed on behind the last one": (TURNS, "if (group_ == 0) end();", "end();"),
}  # fmt: skip


@hopper.needs_nvrtc
@pytest.mark.parametrize("fault", TURN_FAULTS)
def test_planted_faults_of_turns_are_noticed(fault, tmp_path, monkeypatch):
    name = "small, 16 x 128 tokens"
    text = planted(TURN_FAULTS[fault], tmp_path, monkeypatch, "forward", name)
    assert all(walk.Walk(kernel(text), launch).faults for launch in launches.forward(name))
