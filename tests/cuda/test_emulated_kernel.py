"""The Hopper kernel's own source, all of its threads on the CPU, against the oracle.

What this cannot show is the GPU: that the instructions do what the emulation takes from the manual. It shows
the rest: tiles, swizzles, descriptors, fragments, epilogues, barriers, counters, early exit.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path
import emulated

from loopmdm_kernels.reference import looped_blocks
from loopmdm_kernels.schedule import Tiles
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs

# Tiles, hidden size, heads, mlp ratio. 64 rows: warp groups share columns and heads; 128: rows. Heads of 64
# and of 128. Products of fewer stages than the ring has, of more (12 of 4), and of an odd number (3).
VARIANTS = {
    "64 rows": (Tiles(64, 128, 64, 128, 64, 2), 128, 2, 2),
    "128 rows": (Tiles(128, 64, 64, 128, 64, 1), 192, 3, 4),
    "heads of 128": (Tiles(128, 128, 128, 128, 64, 1), 128, 1, 2),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    tiles, *sizes = VARIANTS[request.param]
    shape, plan = emulated.plan_of(make(sizes, 1, 8), tiles)
    return emulated.build(shape, plan, tmp_path_factory.mktemp("kernel")), plan, sizes


def make(sizes, batch, length, **options):
    hidden, heads, mlp_ratio = sizes
    return looped_inputs(batch, length, hidden, heads, mlp_ratio=mlp_ratio, **options).to(torch.bfloat16)


def oracle(inputs, loops, **options):
    return looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, loops,
        num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
    )  # fmt: skip


def check(variant, inputs, loops, **options):
    library, plan, _ = variant
    out, used = emulated.run(library, inputs, plan, loops, **options)
    assert_matches_oracle(out, oracle(inputs, loops), oracle(inputs.to(torch.float64), loops))
    return out, used


@pytest.mark.parametrize("length", [1, 81, 200])
def test_values(variant, length):
    """One token, a part of a tile, several tiles and blocks of keys."""
    check(variant, make(variant[2], 1, length), 2, num_blocks=3)


def test_options(variant):
    masked = make(variant[2], 2, 70, key_mask=True, per_sequence_modulation=True, seed=1)
    check(variant, masked, 1, num_blocks=5)
    check(variant, make(variant[2], 1, 30, rotary=False, seed=2), 3)


def test_a_row_without_keys_is_nan(variant):
    inputs = make(variant[2], 2, 9, key_mask=True)
    inputs.key_mask[1] = False
    library, plan, _ = variant
    out, _ = emulated.run(library, inputs, plan, 1)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_any_number_of_blocks_and_any_order_give_the_same_bits(variant):
    inputs = make(variant[2], 2, 70, key_mask=True)
    library, plan, _ = variant
    expected, _ = emulated.run(library, inputs, plan, 1, num_blocks=1)
    for num_blocks, seed in ((2, 1), (7, 2), (16, 3)):
        out, _ = emulated.run(library, inputs, plan, 1, num_blocks=num_blocks, seed=seed)
        assert torch.equal(out, expected)


def test_loops_of_each_sequence_and_early_exit(variant):
    inputs = make(variant[2], 3, 20)
    _, used = check(variant, inputs, torch.tensor([3, 1, 2]))
    assert used.tolist() == [3, 1, 2]
    # Large sequences change little relative to their size, and stop early.
    scale = torch.tensor([1e-2, 30.0, 1e3])[:, None, None]
    inputs = inputs._replace(x=inputs.x * scale)
    exact, expected = oracle(inputs.to(torch.float64), 4, exit_threshold=0.2)
    baseline, rounded = oracle(inputs, 4, exit_threshold=0.2)
    assert len(set(expected.tolist())) > 1 and torch.equal(expected, rounded)
    library, plan, _ = variant
    for num_blocks in (1, 3):
        out, used = emulated.run(library, inputs, plan, 4, exit_threshold=0.2, num_blocks=num_blocks)
        assert torch.equal(used, expected)
        for sequence in range(3):  # each in its own size
            assert_matches_oracle(out[sequence], baseline[sequence], exact[sequence])


# Faults in the source that the emulation must notice: what replaces what, in which file.
FAULTS = {
    "no wait for the inputs": (
        "loader_sm90.cuh", "wait_for(p_.counters + item.wait + i, target);", "(void)target;"
    ),
    "a signal before all warps are done": (
        "looped_blocks_sm90.cu", "meet<1>(Config::kComputeThreads);", ""
    ),
    "no wait for a stage": ("ring_sm90.cuh", "barrier_wait(full(place.slot), place.round)", "(void)place"),
    "a stage filled while it is read": (
        "ring_sm90.cuh", "barrier_wait(empty(place.slot), place.round ^ 1)", "(void)place"
    ),
    "the wrong half of the keys": (
        "loader_sm90.cuh", "qkv_slot(item.read_slot", "qkv_slot(1 - item.read_slot"
    ),
    "a swizzle of the wrong bits": ("matrix_descriptor.h", "panel + 32 * step", "panel + 64 * step"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, tmp_path, monkeypatch):
    name, text, replacement = FAULTS[fault]
    copy = tmp_path / "csrc"
    shutil.copytree(emulated.sources.folder(), copy)
    (path,) = copy.rglob(name)
    source = path.read_text()
    assert text in source, "the test looks for source that is not there"
    path.write_text(source.replace(text, replacement))
    monkeypatch.setattr(emulated.sources, "folder", lambda: copy)
    tiles, *sizes = VARIANTS["128 rows"]
    inputs = make(sizes, 1, 40)
    shape, plan = emulated.plan_of(inputs, tiles)
    library = emulated.build(shape, plan, tmp_path, optimize=False)
    expected = oracle(inputs.to(torch.float64), 1)
    for seed in range(3):
        try:
            out, _ = emulated.run(library, inputs, plan, 1, num_blocks=5, seed=seed)
            assert_matches_oracle(out, oracle(inputs, 1), expected)
        except AssertionError:
            return
    pytest.fail("the kernel with this fault computes the right values")
