"""The kernels' own sources, all of their threads on the CPU, against the oracle.

What this cannot show is the GPU: that the instructions do what the emulation takes from the manual. It shows
the rest: tiles, swizzles, descriptors, fragments, epilogues, barriers, counters, early exit.
"""

import ctypes
from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
import torch

from bench.probes import hopper_phases
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda.parameters import MAP, fields
from loopmdm_kernels.cuda.targets import SM80, SM90, Target
from loopmdm_kernels.schedule import Device, Tiles
from loopmdm_kernels.schedule.device import ASSUMED
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from loopmdm_kernels.testing.reference import looped_blocks
from tests.cuda import emulated


class Variant(NamedTuple):
    target: Target
    device: Device
    tiles: Tiles
    sizes: tuple[int, int, int]  # hidden size, heads, mlp ratio
    length: int = 128  # that the plan is made for; it decides about blocks of keys


# 64 rows: groups of warps share columns and heads, or one has few of them; 128: they share rows. Heads of all
# sizes. Products of fewer stages than the ring has, of more (6 of 4), and of an odd number (3); rings of two
# stages (sm_86) and of more; the last product whole, in parts and in parts by one tile. Rows normalised once,
# and two blocks that share tiles of 256 rows, and of 128. Sums of one row at a time, of more than the quads
# hold together, and of as many as a tile has.
HOPPER = ASSUMED[9, 0]
VARIANTS = {
    "64 rows": Variant(SM90, HOPPER, Tiles(64, 128, 64, 256, 64, 2), (128, 4, 2)),
    "128 rows": Variant(SM90, HOPPER, Tiles(128, 64, 64, 128, 64, 1, 2, sum_rows=32), (192, 3, 4)),
    "heads of 16": Variant(SM90, HOPPER, Tiles(64, 64, 64, 64, 64, 2, 4, sum_rows=64), (64, 4, 4), 64),
    "heads of 128": Variant(SM90, HOPPER, Tiles(128, 128, 128, 128, 64, 1, sum_rows=1), (128, 1, 2)),
    "norms": Variant(SM90, HOPPER, Tiles(128, 192, 64, 256, 192, 1, 3, 16), (192, 3, 4)),
    "pairs": Variant(SM90, HOPPER, Tiles(256, 192, 96, 128, 96, 1, 2, 32, 2), (192, 3, 2)),
    "pairs of 64 rows": Variant(SM90, HOPPER, Tiles(128, 192, 64, 256, 64, 2, 2, 0, 2, 2), (192, 6, 4)),
    "fours": Variant(SM90, HOPPER, Tiles(128, 128, 64, 256, 128, 2, 2, 0, 4, 8), (256, 4, 2)),
    "fours, two groups": Variant(SM90, HOPPER, Tiles(128, 384, 192, 384, 384, 4, 1, 0, 4), (384, 12, 1)),
    "one group": Variant(SM90, HOPPER, Tiles(128, 64, 32, 128, 128, 1, 2, 0, 2, 16), (256, 4, 2)),
    "one group, an odd number of heads": Variant(SM90, HOPPER, Tiles(64, 64, 32, 96, 64, 1), (192, 3, 2)),
    "one group, heads of 128": Variant(SM90, HOPPER, Tiles(64, 128, 64, 128, 64, 2), (256, 2, 2)),
    "sm80, 64 rows": Variant(SM80, ASSUMED[8, 0], Tiles(64, 128, 64, 64, 64, 2, 2, 0, 1, 1), (128, 4, 2), 64),
    "sm80, 128 rows": Variant(SM80, ASSUMED[8, 0], Tiles(128, 64, 64, 128, 64, 1), (128, 2, 2)),
    "sm80, heads of 128": Variant(SM80, ASSUMED[8, 6], Tiles(128, 128, 128, 128, 64, 1), (128, 1, 2)),
}  # fmt: skip


class Built(NamedTuple):
    library: object
    plan: object
    sizes: tuple[int, int, int]
    target: Target

    def run(self, inputs, loops, **options):
        return emulated.run(self.library, inputs, self.plan, loops, target=self.target, **options)


def build(variant, folder, **options):
    shape, plan = emulated.plan_of(
        make(variant.sizes, 1, variant.length), variant.tiles, variant.target, variant.device
    )
    library = emulated.build(shape, plan, folder, target=variant.target, **options)
    return Built(library, plan, variant.sizes, variant.target)


@pytest.fixture(scope="module", params=VARIANTS, name="variant")
def built_variant(request, tmp_path_factory):
    return build(VARIANTS[request.param], tmp_path_factory.mktemp("kernel"))


def make(sizes, batch, length, **options):
    hidden, heads, mlp_ratio = sizes
    return looped_inputs(batch, length, hidden, heads, mlp_ratio=mlp_ratio, **options).to(torch.bfloat16)


def oracle(inputs, loops, **options):
    return looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, loops,
        num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask, **options,
    )  # fmt: skip


def check(variant, inputs, loops, **options):
    out, used = variant.run(inputs, loops, **options)
    assert_matches_oracle(out, oracle(inputs, loops), oracle(inputs.to(torch.float64), loops))
    return out, used


@pytest.mark.parametrize("length", [1, 81, 200])
def test_values(variant, length):
    """One token, a part of a tile, several tiles and blocks of keys."""
    check(variant, make(variant.sizes, 1, length), 2, num_blocks=3)


@pytest.mark.parametrize("waits", [True, False])
def test_one_phase_at_a_time(variant, waits):
    """As bench/probes/hopper_phases.py times them: all tiles of all loops, and nobody waits for ever."""
    inputs, loops = make(variant.sizes, 1, 140), 2
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    for name in variant.plan.phases:
        table = hopper_phases.table_of(shape, variant.plan, name, waits=waits)
        assert {item.phase for item in table.loop} == {name}
        assert all((item.wait_number > 0) == waits for item in table.loop)
        prepared = hopper_phases.Prepared.of(inputs, table, loops)
        counters = prepared.buffers.counters.copy_(prepared.start)
        maps = prepared.maps(variant.plan) if fields(variant.target.parameters, MAP) else {}
        with emulated.placed(prepared.parameters(variant.target), maps) as address:
            workers = 3 if waits else 1  # those that do not wait store to the same places
            finished = variant.library.run_kernel(
                ctypes.c_void_p(address), workers * variant.plan.blocks, variant.target.threads, 0
            )
        assert finished, (name.name, emulated.fault(variant.library))
        done = Counter(item.signal for item in table.loop)
        expected = prepared.start.clone()
        for counter, tiles in done.items():
            expected[counter] += loops * tiles * variant.plan.blocks
        assert torch.equal(counters, expected), name.name


def test_options(variant):
    masked = make(variant.sizes, 2, 70, key_mask=True, per_sequence_modulation=True, seed=1)
    check(variant, masked, 1, num_blocks=5)
    check(variant, make(variant.sizes, 1, 30, rotary=False, seed=2), 3)


def test_a_row_without_keys_is_nan(variant):
    inputs = make(variant.sizes, 2, 9, key_mask=True)
    inputs.key_mask[1] = False
    out, _ = variant.run(inputs, 1)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("size", [3e3, 1e5, 1e9])
def test_large_scores_stay_finite(variant, size):
    """Scores near size^2, whose largest, scaled, is off by more than an exponential bears."""
    inputs = make(variant.sizes, 1, 81)
    hidden = variant.sizes[0]
    large = [
        b._replace(qkv=torch.cat((b.qkv[: 2 * hidden] * size, b.qkv[2 * hidden :]))) for b in inputs.blocks
    ]
    out, _ = variant.run(inputs._replace(blocks=large), 1, num_blocks=3)
    assert bool(torch.isfinite(out).all())


def test_a_row_whose_variance_overflows_is_nan(variant):
    inputs = make(variant.sizes, 2, 9)
    inputs.x[1] *= 1e20
    out, _ = variant.run(inputs, 1)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_any_number_of_blocks_and_any_order_give_the_same_bits(variant):
    inputs = make(variant.sizes, 2, 70, key_mask=True)
    expected, _ = variant.run(inputs, 1, num_blocks=1)
    for num_blocks, seed in ((2, 1), (7, 2), (16, 3)):
        out, _ = variant.run(inputs, 1, num_blocks=num_blocks, seed=seed)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("length", [50, 100])
def test_tiles_norms_and_pairs_do_not_change_the_bits(length, tmp_path):
    """Tiles follow the batch, and whether parts are tiles of their own; what a row gives must not. Of one row
    tile of 64 rows, and of two.
    """
    sizes, longest = (128, 4, 4), 64 if length <= 64 else 128
    variants = [
        Variant(SM90, HOPPER, Tiles(64, 128, 64, 128, 64, 2, 2), sizes, longest),
        Variant(SM90, HOPPER, Tiles(64, 64, 64, 128, 64, 1, 2, sum_rows=4), sizes, longest),
        Variant(SM90, HOPPER, Tiles(128, 64, 128, 64, 128, 1, 2, sum_rows=32), sizes),
        Variant(SM90, HOPPER, Tiles(128, 128, 64, 256, 128, 1, 2, 16), sizes),
        Variant(SM90, HOPPER, Tiles(128, 128, 64, 128, 64, 1, 2, 16, sum_rows=16), sizes),
        Variant(SM90, HOPPER, Tiles(256, 128, 64, 256, 64, 1, 2, 64, 2), sizes),
        Variant(SM90, HOPPER, Tiles(128, 64, 64, 256, 128, 2, 2, 0, 2, 8), sizes),
    ]  # fmt: skip
    inputs = make(sizes, 1, length)
    results = []
    for number, variant in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        out, _ = build(variant, folder, optimize=False).run(inputs, 2, num_blocks=4)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


def check_exits(inputs, run):
    """Of three sequences; large ones change little relative to their size, and stop early."""
    inputs = inputs._replace(x=inputs.x * torch.tensor([1e-2, 30.0, 1e3])[:, None, None])
    exact, expected = oracle(inputs.to(torch.float64), 4, exit_threshold=0.2)
    baseline, rounded = oracle(inputs, 4, exit_threshold=0.2)
    assert len(set(expected.tolist())) > 1 and torch.equal(expected, rounded)
    out, used = run(inputs, 4, exit_threshold=0.2)
    assert torch.equal(used, expected)
    for sequence in range(3):  # each in its own size
        assert_matches_oracle(out[sequence], baseline[sequence], exact[sequence])


def test_loops_of_each_sequence_and_early_exit(variant):
    inputs = make(variant.sizes, 3, 20)
    _, used = check(variant, inputs, torch.tensor([3, 1, 2]))
    assert used.tolist() == [3, 1, 2]
    for num_blocks in (1, 3):
        check_exits(inputs, partial(variant.run, num_blocks=num_blocks))
