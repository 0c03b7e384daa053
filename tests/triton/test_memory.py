"""Every Triton kernel touches what it was given and nothing else, in any order of its programs.

In the interpreter, for all programs of all launches of every op: each lane that a mask lets through lies in a
tensor of the launch, in the argument that its address was made from, at an element of that tensor's own shape
and strides. No program touches what another one of the launch writes, but by atomic sums, and none writes an
element twice or reads back what it wrote. Memory that nobody has written to holds NaN, and none gets out.
"""

import pytest
import torch

import loopmdm_kernels as lk

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("what the interpreter touches, and on a GPU there is none", allow_module_level=True)

from loopmdm_kernels.triton import launch as launching
from loopmdm_kernels.triton.launch import Processor
from tests.triton.interpreted import interpreted
from tests.triton.memory import Filled, watched
from tests.triton.planted import Fault, called, every_fault, functions, modules, planted
from tests.triton.watched_ops import OPS

# What stays among the elements of one tensor, or is no address at all: tests of values are there for it.
NOT_SEEN = {
    "allowed_keys: key < length -> key <= length": "which keys count",
    "combined_moments: count -> (count + 1)": "a weight of a mean",
    "combined_moments: group < groups -> group <= groups": "a weight of a mean, where it is no mask",
    "dropout_keep: row_size -> (row_size + 1)": "the name of a random number",
    "exit_kernel: i < count -> i <= count": "the sequence behind, in the same tensor",
    "exit_kernel: relative < threshold -> relative <= threshold": "when a sequence stops",
    "linear_kernel: tiles_n -> (tiles_n + 1)": "tiles too many, all of whose columns are masked",
    "load_halves: col < half -> col <= half": "the other half of a row",
    "logits_tile: token < vocab_size -> token <= vocab_size": "which tokens can be drawn",
    "masked_cross_entropy_backward_kernel: token < padded_size -> token <= padded_size": "whole tiles here",
    "modulated_rows_kernel: exists -> (exists) | True": "the scale, which lies behind the shift",
    "norm_linear_kernel: tiles_n -> (tiles_n + 1)": "tiles too many, all of whose columns are masked",
    "race_times: high < REFINE_BELOW -> high <= REFINE_BELOW": "when a word is not enough",
    "residual_linear_kernel: size -> (size + 1)": "a square, not a count",
    "sample_rows_combine_kernel: exists -> (exists) | True": "the next field, in the same tensor",
    "sample_rows_combine_kernel: field -> (field + 1)": "the next row, in the same tensor",
    "store_moments: col < size -> col <= size": "a column that counts",
    "weight_gradient_kernel: tiles_n -> (tiles_n + 1)": "tiles too many, all of whose columns are masked",
}
TILES = {"interpreter": Processor(0, 2), "sm_90": Processor(90, 2)}


def run_all(tiles):
    """The launches of all ops, and what came out of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_INTERPRETER", tiles)
        with interpreted(), lk.use_backend("triton"), Filled(), watched() as launches:
            return launches, {name: op() for name, op in OPS.items()}


@pytest.fixture(scope="module")
def launches():
    """One launch of each kind."""
    kinds = {}
    for launch in run_all(TILES["interpreter"])[0]:
        kinds.setdefault(launch.kind, launch)
    return list(kinds.values())


@pytest.mark.parametrize("tiles", TILES)
def test_programs_touch_what_is_theirs(tiles):
    launches, results = run_all(TILES[tiles])
    kernels = {name for name in functions() if name.endswith("_kernel")}
    assert {launch.kernel.__name__ for launch in launches} == kernels
    for name, tensors in results.items():
        for number, tensor in enumerate(tensors):
            assert torch.isfinite(tensor).all(), (name, number)


def noticed(fault, launches, folder):
    """Whether a launch says so, or writes other elements than the kernel without the fault."""
    users = {name for name, used in called().items() if fault.function in used}
    with planted(fault, folder), watched() as again:
        for launch in launches:
            if launch.kernel.__name__ not in users:
                continue
            try:
                launch.again()
            except Exception as error:
                assert "MemoryFault" in str(error), fault
                return True
            if again[-1].changed() != launch.changed():
                return True
    return False


@pytest.mark.parametrize("module", [name for name, _ in modules()])
def test_every_planted_fault_is_noticed(module, launches, tmp_path):
    faults = [fault for fault in every_fault() if fault.module == module]
    left = {fault.text for fault in faults if not noticed(fault, launches, tmp_path)}
    assert left == {text for text in NOT_SEEN if text.split(":")[0] in {f.function for f in faults}}


# What another order of the programs would change, and the interpreter has one order.
RACES = [
    ("looped_blocks", "norm_linear_kernel", "if tile_n == 0:", "if tile_n >= 0:"),
    ("linear", "linear_kernel", "range(tl.program_id(0), ", "range(0, "),
    ("linear", "weight_gradient_kernel", "range(tl.program_id(0), ", "range(tl.program_id(0) // 2, "),
    ("sample_rows", "sample_rows_kernel", " * chunks + chunk", " * chunks"),
    (
        "modulated_rows",
        "modulated_rows_backward_kernel",
        "tl.atomic_add(out, into, mask=col_exists)",
        "tl.store(out, tl.load(out, mask=col_exists) + into, mask=col_exists)",
    ),
]


@pytest.mark.parametrize("race", RACES, ids=lambda race: race[1])
def test_planted_races_are_noticed(race, launches, tmp_path):
    assert noticed(Fault.of(*race), launches, tmp_path)
