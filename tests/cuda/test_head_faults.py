"""Faults planted in the kernels of the vocabulary head, which their emulation must notice."""

import pytest
import torch

from loopmdm_kernels.testing import head_inputs, reference, row_rng
from loopmdm_kernels.types import Head
from tests.cuda import emulated, emulated_head

# What replaces what, in which file.
FAULTS = {
    "no wait for a stage": (
        "stage_ring_sm90.cuh", "barrier_wait(full(place), place.round)", "(void)place"
    ),
    "a stage filled while it is read": (
        "stage_ring_sm90.cuh", "wait_together(empty(place), place.round ^ 1)", "(void)place"
    ),
    "a stage filled while the other block reads it": (
        "stage_ring_sm90.cuh", "kPaired ? 2 * kReaders : kReaders", "kReaders"
    ),
    "panels of the right operand too near": (
        "head/masked_cross_entropy_product_sm90.cu",
        "outer_major_descriptor(stage + Shape::kLeftBytes, Shape::kPanelBytes, k)",
        "outer_major_descriptor(stage + Shape::kLeftBytes, Shape::kPanelBytes / 2, k)",
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


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(fault, tmp_path, monkeypatch):
    emulated.plant(FAULTS[fault], tmp_path, monkeypatch)
    with emulated_head.emulation(tmp_path) as state:
        state.multiprocessors = 2  # one pair of blocks has all tiles
        for seed in range(3):
            state.seed = seed
            try:
                if not right(seed):
                    return
            except AssertionError:  # all threads wait
                return
    pytest.fail("the kernels with this fault compute the right values")
