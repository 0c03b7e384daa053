"""torch.func, forward-mode derivatives and gradients of gradients: right, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head


def parameters(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def tangents(values):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in values.items()
    }


def test_grad_is_that_of_backward(model, tokens):
    def total(values):
        return functional_call(model, values, (tokens,), {"num_loops": 3}).square().sum()

    gradients = grad(total)(parameters(model))
    model(tokens, num_loops=3).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def test_grad_of_the_loss(model, tokens):
    def total(values):
        return functional_call(Loss(model), {f"model.{k}": v for k, v in values.items()}, (tokens,))

    gradients = grad(total)(parameters(model))
    Loss(model)(tokens).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5, msg=name)


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        generator = torch.Generator().manual_seed(3)
        rows = torch.randperm(32, generator=generator)[:9]
        hidden = self.model.hidden(tokens, num_loops=2)
        head = self.model.head()
        return lk.masked_cross_entropy(hidden, head, tokens, rows, torch.ones(9))[0]


@pytest.mark.parametrize("how", ["jvp", "dual numbers"])
def test_forward_mode_is_the_difference_quotient(model, tokens, how):
    exact = copy.deepcopy(model).double()
    values = parameters(exact)
    steps = tangents(values)

    def moved(size):
        return functional_call(exact, {k: v + size * steps[k] for k, v in values.items()}, (tokens,))

    with torch.no_grad():
        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if how == "jvp":
        _, got = jvp(lambda v: functional_call(exact, v, (tokens,)), (values,), (steps,))
    else:  # in fp32, which the kernels take otherwise
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
        with forward_ad.dual_level(), torch.no_grad():
            dual = {k: forward_ad.make_dual(v, steps[k].float()) for k, v in parameters(model).items()}
            got = forward_ad.unpack_dual(functional_call(model, dual, (tokens,))).tangent.double()
    torch.testing.assert_close(got.detach(), expected, **tolerance)


def test_vmap_over_sequences(model, tokens):
    got = vmap(lambda row: model(row[None])[0])(tokens)
    torch.testing.assert_close(got, model(tokens), rtol=1e-5, atol=1e-5)


def test_a_forced_kernel_says_why_not(model, tokens):
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        vmap(lambda row: model(row[None])[0])(tokens)


def op_outputs(leaf):
    """Each differentiable op as a function of one leaf [2, 16, 32] fp32."""
    inputs = looped_inputs(batch=2, length=16, hidden=32).to(torch.float32)
    _, head = head_inputs(2, 16, 32, 20, excluded_token=19)
    head = Head(*(t.float() for t in head[:4]), 19)
    rows = torch.arange(5)
    targets = torch.zeros(2, 16, dtype=torch.int64)
    q = leaf.view(2, 16, 2, 16).transpose(1, 2)
    return {
        "looped_blocks": lambda: lk.looped_blocks(leaf, inputs.blocks, inputs.modulation, 2, num_heads=4),
        "masked_cross_entropy": lambda: lk.masked_cross_entropy(leaf, head, targets, rows, torch.ones(5))[0],
        "head_logits": lambda: lk.head_logits(leaf, head),
        "attention": lambda: lk.attention(q, q, q),
    }


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("op", ["looped_blocks", "masked_cross_entropy", "head_logits", "attention"])
def test_a_second_derivative_is_right_or_refused(op, operator, monkeypatch):
    """Where the incoming gradient is a constant, PyTorch's own decorator would give zero."""
    if operator:
        monkeypatch.setattr("loopmdm_kernels.ops.library.traced", lambda *_: True)

    def second(dtype):
        leaf = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(op_outputs(leaf)[op]().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    try:
        got = second(torch.float32)
    except RuntimeError as error:
        assert "the kernels differentiate once" in str(error)
        monkeypatch.undo()
        with lk.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
            got = second(torch.float32)
    assert got.abs().max() > 1e-3


def test_sample_rows_under_vmap_names_the_way():
    hidden, head = head_inputs(2, 4, 8, 10)
    head = Head(*(t.float() for t in head[:4]), -1)
    got = vmap(lambda h: lk.sample_rows(h[None], head, torch.arange(4), row_rng(4)).token)(hidden.float())
    for one, row in zip(hidden.float(), got, strict=True):
        assert torch.equal(lk.sample_rows(one[None], head, torch.arange(4), row_rng(4)).token, row)
