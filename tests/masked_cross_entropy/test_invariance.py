"""masked_cross_entropy: the same bits for any rows beside a row, any threads, any place in memory."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import LEAVES
from loopmdm_kernels.types import Head
from tests.masked_cross_entropy.cases import BF16, FLOAT, assert_same, case, run


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[BF16], cuda=[BF16])
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    if backend.name == "cpu":
        length, size = 33, (40, 1601, 33)
    else:
        length, size = (100, (72, 600, 100)) if backend.name == "cuda" else (33, (36, 70, 33))
    leaves, targets, _, excluded = case(backend, dtype, size)
    every = torch.arange(length, device=backend.device)

    def nll_and_gradient(rows):
        hidden = leaves["hidden"].detach().requires_grad_()
        head = Head(*(leaves[name] for name in LEAVES[1:5]), excluded)
        weights = torch.ones(len(rows), device=backend.device)
        total, nll = lk.masked_cross_entropy(hidden, head, targets, rows, weights)
        return nll.detach(), torch.autograd.grad(total, hidden)[0].flatten(0, 1)[rows]

    nll, grad = nll_and_gradient(every)
    parts = [every[:1], every[3:20]]
    if not backend.emulated:  # around those for which weights are transposed on the CPU
        parts += [every[[32, 7, 11]], every[:8], every[:9], every[5:21], every.flip(0)]
    for rows in parts:
        part_nll, part_grad = nll_and_gradient(rows)
        assert torch.equal(part_nll, nll[rows])
        assert torch.equal(part_grad, grad[rows])


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[FLOAT], cuda=[BF16])
def test_strides(backend, dtype):
    leaves, targets, rows, excluded = case(backend, dtype)
    strided = {
        name: torch.stack((t, t + 1), -1)[..., 0]
        if t.ndim < 2
        else t.transpose(0, 1).contiguous().mT
        if t.ndim == 2
        else t.transpose(1, 2).contiguous().transpose(1, 2)
        for name, t in leaves.items()
    }
    assert not any(t.is_contiguous() for t in strided.values())
    every_other = torch.stack((rows, rows * 0), 1)[:, 0]
    out = run((strided, targets.T.contiguous().T, every_other, excluded))
    assert_same(out, run((leaves, targets, rows, excluded)))


@pytest.mark.backends("cpu", "triton")
def test_weight_at_an_odd_address(backend):
    leaves, *rest = case(backend, BF16, (46, 70, 9) if backend.emulated else (46, 389, 40))
    weight = leaves["weight"]
    shifted = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view_as(weight)
    assert shifted.data_ptr() % 4 == 2
    expected = run((leaves, *rest))
    assert_same(run(({**leaves, "weight": shifted}, *rest)), expected)


@pytest.mark.backends("cpu")
def test_threads_and_repetition(backend, dtype, threads):
    inputs, results = case(backend, dtype, (40, 3203, 70)), []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(run(inputs))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.backends("cuda")
def test_blocks_and_the_order_of_loads(backend, gpu):
    inputs = case(backend, BF16, (72, 600, 100))
    first = run(inputs)
    gpu.seed, gpu.multiprocessors = 4, 7
    assert_same(run(inputs), first)
