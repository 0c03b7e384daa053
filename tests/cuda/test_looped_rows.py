"""The kernel for narrow blocks, all of its threads on the CPU, against the oracle and the kernel by tiles."""

import ctypes
from functools import partial
from typing import NamedTuple

import pytest
import torch

from bench.probes import hopper_facts
from loopmdm_kernels.cuda import looped_rows
from loopmdm_kernels.cuda.targets import SM90
from loopmdm_kernels.schedule import Device, Tiles, choose_rows
from loopmdm_kernels.testing import assert_matches_oracle
from tests.cuda import emulated
from tests.cuda.test_emulated_kernel import Variant, build, check_exits, make, oracle


class Rows(NamedTuple):
    sizes: tuple[int, int, int]  # hidden size, heads, mlp ratio
    length: int
    parts: int = 1  # of the last product
    stages: int = 0  # of the ring; 0: all that there is room for


# Heads of all sizes, in one group of warps and in two; one block and the most; sequences that fill their last
# block and do not, and one or two tiles of keys; a ring that is shorter than each product.
ROWS = {
    "heads of 32, 66 tokens": Rows((128, 4, 2), 66, stages=4),
    "heads of 64, 20 tokens": Rows((128, 2, 2), 20, parts=2),
    "heads of 16, 36 tokens": Rows((64, 4, 4), 36),
    "256 wide, 8 tokens": Rows((256, 8, 2), 8),
    "heads of 64, 121 tokens": Rows((128, 2, 2), 121),
    "one token": Rows((64, 1, 2), 1),
}


class Built(NamedTuple):
    library: object
    plan: object
    rows: Rows

    def make(self, batch=1, **options):
        return make(self.rows.sizes, batch, self.rows.length, **options)

    def run(self, inputs, loops, **options):
        buffers = emulated.run_rows(self.library, inputs, self.plan, loops, **options)
        return buffers.output, buffers.stop[: len(inputs.x)].long()

    def check(self, inputs, loops, **options):
        out, used = self.run(inputs, loops, **options)
        assert_matches_oracle(out, oracle(inputs, loops), oracle(inputs.to(torch.float64), loops))
        return out, used


def build_rows(rows, folder, **options):
    shape, plan = emulated.rows_plan(make(rows.sizes, 1, rows.length))
    plan = plan._replace(mlp_out_parts=rows.parts, stages=rows.stages or plan.stages)
    return Built(emulated.build_rows(shape, plan, folder, **options), plan, rows)


@pytest.fixture(scope="module", params=ROWS, name="built")
def built_rows(request, tmp_path_factory):
    return build_rows(ROWS[request.param], tmp_path_factory.mktemp("kernel"))


def test_values(built):
    built.check(built.make(), 2)


def test_options(built):
    """Three sequences, which one cluster goes through, and two share."""
    masked = built.make(3, key_mask=True, per_sequence_modulation=True, seed=1)
    masked.key_mask[:, 0] = True
    for clusters in (1, 2):
        built.check(masked, 1, clusters=clusters)
    built.check(built.make(rotary=False, seed=2), 3)


def test_the_bits_are_those_of_tiles(built, tmp_path):
    """Which kernel runs follows the batch; what a row gives must not."""
    hidden, heads, _ = sizes = built.rows.sizes
    tiles = Tiles(
        64, 2 * max(32, hidden // heads), 64, 64, 64, 2, built.rows.parts, sum_rows=8 * (built.rows.parts > 1)
    )
    if heads == 1:
        tiles = tiles._replace(rows=128, qkv=64, heads=1)
    variant = Variant(SM90, Device(), tiles, sizes, length=built.rows.length)
    inputs = built.make(2, key_mask=True, per_sequence_modulation=True)
    by_tiles, _ = build(variant, tmp_path, optimize=False).run(inputs, 2)
    out, _ = built.run(inputs, 2)
    assert torch.equal(out, by_tiles)


def test_any_number_of_clusters_and_any_order_give_the_same_bits(built):
    inputs = built.make(3)
    expected, _ = built.run(inputs, 1)
    for clusters, seed in ((2, 1), (3, 2)):
        out, _ = built.run(inputs, 1, clusters=clusters, seed=seed)
        assert torch.equal(out, expected)


def test_a_row_without_keys_is_nan(built):
    inputs = built.make(2, key_mask=True)
    inputs.key_mask[0, 0], inputs.key_mask[1] = True, False
    out, _ = built.run(inputs, 1)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_a_row_whose_variance_overflows_is_nan(built):
    inputs = built.make(2)
    inputs.x[1] *= 1e20
    out, _ = built.run(inputs, 1)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("size", [3e3, 1e9])
def test_large_scores_stay_finite(built, size):
    inputs, hidden = built.make(), built.rows.sizes[0]
    large = [
        b._replace(qkv=torch.cat((b.qkv[: 2 * hidden] * size, b.qkv[2 * hidden :]))) for b in inputs.blocks
    ]
    out, _ = built.run(inputs._replace(blocks=large), 1)
    assert bool(torch.isfinite(out).all())


def test_loops_of_each_sequence_and_early_exit(built):
    inputs = built.make(3)
    loops = torch.tensor([3, 1, 2])
    _, used = built.check(inputs, loops, clusters=2)
    assert used.tolist() == [3, 1, 2]
    for clusters in (1, 3):
        check_exits(inputs, partial(built.run, clusters=clusters))


def test_inputs_of_all_loops_are_kept(built):
    """For the backward pass."""
    inputs, loops = built.make(2), 3
    buffers = emulated.run_rows(built.library, inputs, built.plan, loops, keep=True)
    assert torch.equal(buffers.stream_values[0], inputs.x)
    assert torch.equal(buffers.stream_values[loops], buffers.output)
    for before in range(1, loops):
        assert torch.equal(buffers.stream_values[before], built.run(inputs, before)[0])


def test_weights_are_loaded_once_a_loop(built):
    """By each block."""
    inputs = built.make()
    of_blocks = sum(2 * tensor.numel() for block in inputs.blocks for tensor in block if tensor.dim() == 2)
    for loops in (1, 3):
        built.run(inputs, loops)
        assert built.library.loaded_weight_bytes() == loops * built.plan.blocks * of_blocks


@pytest.mark.parametrize("name", hopper_facts.PIECES)
def test_pieces_that_are_timed_come_to_their_end(name, tmp_path):
    """In a cluster of two, whatever order its threads run in."""
    shape = hopper_facts.SUDOKU._replace(length=16)
    plan = choose_rows(shape)
    source = hopper_facts.HERE / "hopper_narrow.cu"
    macros = {"LOOPMDM_SOURCE": f'"{source}"', "LOOPMDM_KERNEL": name}
    library = emulated.compile_source("kernel", looped_rows.defines(shape, plan) | macros, tmp_path)
    buffers, keys = hopper_facts.narrow_buffers(shape, plan, "cpu")
    pieces = hopper_facts.Pieces(kernel=looped_rows.pack_parameters(buffers, None), rounds=5)
    pieces.kernel.qkv[:] = emulated.encode(keys)
    for seed in range(3):
        with emulated.placed(pieces, {}) as address:
            finished = library.run_kernel(ctypes.c_void_p(address), plan.blocks, plan.threads, seed)
        assert finished, emulated.fault(library)
