"""The Triton kernels under torch.compile and autocast; what a call leaves alone."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head, RowRng


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    monkeypatch.setenv("LOOPMDM_BACKEND", "triton")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def looped(inputs):
    return lk.looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=inputs.num_heads, recompute=True
    )


def head_case(device):
    hidden, head = head_inputs(1, 5, 16, 20)
    head = Head(*(t.float().to(device).requires_grad_() for t in head[:4]))
    return hidden.float().to(device).requires_grad_(), head


def test_compiled_training_step(device):
    results = []
    for compile_it in (False, True):
        inputs = looped_inputs(1, 5, 16, 2, 1, 1).to(torch.float32, device=device, requires_grad=True)
        function = torch.compile(looped, fullgraph=True, backend="aot_eager") if compile_it else looped
        function(inputs).square().sum().backward()
        results.append({name: leaf.grad for name, leaf in inputs.leaves().items()})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


def test_compiled_head(device):
    rows = torch.tensor([0, 3], device=device)
    rng = RowRng(5, *(name.to(device) for name in row_rng(2)[1:]))

    def step(hidden, head):
        drawn = lk.sample_rows(hidden, head, rows, rng)
        targets = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)
        total, _ = lk.masked_cross_entropy(hidden, head, targets, rows, torch.ones(2, device=device))
        return total, drawn.token

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, head = head_case(device)
        total, token = function(hidden, head)
        total.backward()
        results.append([total.detach(), token, hidden.grad, head.weight.grad])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_changes_nothing(device):
    inputs = looped_inputs(1, 5, 16, 2, 1, 1).to(torch.float32, device=device)
    hidden, head = head_case(device)
    arguments = (hidden, head, torch.zeros(1, 5, dtype=torch.int64, device=device))
    rows, weights = torch.tensor([1, 4], device=device), torch.ones(2, device=device)
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            total, _ = lk.masked_cross_entropy(*arguments, rows, weights)
            results.append([looped(inputs), total, *torch.autograd.grad(total, [hidden, head.weight])])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)
