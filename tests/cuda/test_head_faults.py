"""Faults planted in the kernels of the vocabulary head, which their emulation must notice."""

import pytest
import torch

from loopmdm_kernels.testing import head_inputs, reference, row_rng
from loopmdm_kernels.types import Head
from tests.cuda import emulated, emulated_head
from tests.cuda.planted import EARLY_COPY, EARLY_READ, Fault, choose_and_expect, plant

# What replaces what, and how the emulation notices.
FAULTS = {
    "no wait for a stage": Fault(
        "stage_ring_sm90.cuh", "barrier_wait(full(place), place.round)", "(void)place", EARLY_READ
    ),
    "a stage filled while it is read": Fault(
        "stage_ring_sm90.cuh", "wait_together(empty(place), place.round ^ 1)", "(void)place", EARLY_COPY
    ),
    "a stage filled while the other block reads it": Fault(
        "stage_ring_sm90.cuh", "[[kBlocks * kReaders]]);", "kReaders",
        EARLY_COPY,
    ),
    "panels of the right operand too near": Fault(
        "head/masked_cross_entropy_product_sm90.cu",
        "outer_major_descriptor(stage + Shape::kLeftBytes, [[Shape::kPanelBytes]], k)",
        "Shape::kPanelBytes / 2",
    ),
    "no fence of initialised barriers": Fault(
        "stage_ring_sm90.cuh", "barrier_init_fence();", "", "no fence behind the initialisation of a barrier"
    ),
    "blocks of a pair that do not meet before the first copy": Fault(
        "vocabulary_sm90.cuh",
        "if (threadIdx.x == 0) ring.initialise();\n  [[Vocabulary::Ring::meet_all();]]", "",
        "a barrier is used before its initialisation is known",
    ),
    "blocks of a pair that do not meet behind the last copy": Fault(
        "vocabulary_sm90.cuh", "if (Vocabulary::kPaired) [[Vocabulary::Ring::meet_all();]]", "",
        "shared memory of a block that has ended|a block may end while others reach into it",
    ),
}  # fmt: skip


def right(seed):
    """Whether draws and gradients are those of the reference."""
    number = 300
    hidden, head = head_inputs(1, number, 136, 600, seed=3)
    leaves = [hidden.float(), *(t.to(torch.bfloat16) for t in head[:4])]
    rows, rng = torch.arange(number), row_rng(number, seed)
    targets = 2 * rows[None]

    def run(loss, sample):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        total, _ = loss(own[0], Head(*own[1:]), targets, rows, torch.ones(number))
        grads = torch.autograd.grad(total, own)
        with torch.no_grad():
            return sample(own[0], Head(*own[1:]), rows, rng).token, grads

    tokens, grads = run(*(emulated.on_cuda(op) for op in ("masked_cross_entropy", "sample_rows")))
    expected, exact = run(reference.masked_cross_entropy, reference.sample_rows)
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(grads, exact, strict=True)]
    return int((tokens != expected).sum()) <= 1 and all(error < 0.02 for error in errors)


def test_without_a_fault(gpu):
    assert right(0) and right(1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The emulation of kernels that have all faults, each off until it is chosen."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch, emulated_head.emulation(folder) as state:
        plant(FAULTS, folder, patch)
        state.multiprocessors = 2  # one pair of blocks has all tiles
        yield state


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(planted, fault):
    def check(seed):
        planted.seed = seed
        assert right(seed), "values"

    choose_and_expect(planted, FAULTS, fault, check)
