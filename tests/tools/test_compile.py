"""torch.compile of the model: few graphs, no break, and bit for bit what an eager call draws and computes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.mdlm import DIT

STEPS = 16


def new_model(dropout=0.1, time_conditioning=False, kind=LoopMDM):
    config = LoopMDMConfig(
        vocab_size=40,
        mask_token_id=39,
        hidden_size=32,
        num_heads=2,
        num_layers=3,
        cond_dim=8,
        max_length=16,
        dropout=dropout,
        max_loops=4,
        time_conditioning=time_conditioning,
    )
    torch.manual_seed(0)
    model = kind(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TOKENS = torch.randint(39, (4, 16), generator=torch.Generator().manual_seed(1))
CALLS = {
    "loss": ("loss", lambda step: {}, 1),
    "loss, S given": ("loss", lambda step: {"num_loops": 1 + step % 4}, 2),
    "loss, seed given": ("loss", lambda step: {"seed": step}, 2),
    "labels": ("forward", lambda step: {"labels": TOKENS}, 1),
    "logits, S drawn": ("forward", lambda step: {}, 1),
    "logits, S given": ("forward", lambda step: {"num_loops": 1 + step % 4}, 2),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(function, model, step, **options):
    torch.manual_seed(step)
    out = function(TOKENS, **options)
    value = out if isinstance(out, torch.Tensor) else out.loss
    gradients = torch.autograd.grad(value.sum(), list(model.parameters()), allow_unused=True)
    return value.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("call", list(CALLS))
def test_training(call, time_conditioning):
    method, options, most = CALLS[call]
    model = new_model(time_conditioning=time_conditioning)
    counter = CompileCounterWithBackend("aot_eager")
    eager = getattr(model, method)
    compiled = torch.compile(eager, backend=counter)
    for step in range(STEPS):
        value, gradients = run(eager, model, step, **options(step))
        got, got_gradients = run(compiled, model, step, **options(step))
        assert torch.equal(got, value)
        assert len(got_gradients) == len(gradients) > 20
        assert all(map(torch.equal, got_gradients, gradients))
    assert counter.frame_count <= most and not counters["graph_break"]


def test_the_reference_s_names():
    model = new_model(kind=DIT)
    sigma = torch.rand(4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        value, gradients = run(lambda x: model(x, sigma), model, step)
        got, got_gradients = run(lambda x: compiled(x, sigma), model, step)
        assert torch.equal(got, value) and all(map(torch.equal, got_gradients, gradients))
    assert counter.frame_count == 1


def test_inductor_trains():
    """The default compiler fuses what surrounds the kernels, so values may round otherwise."""
    model = new_model(dropout=0.0)
    value, gradients = run(model.loss, model, 0, seed=3)
    got, got_gradients = run(torch.compile(model.loss, fullgraph=True), model, 0, seed=3)
    torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
