"""Memory of large weight gradients: the next one of a weight has it again, and no two tensors share it."""

import gc

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.cpu import gradient_memory
from loopmdm_kernels.cpu.gradient_memory import gradient_memory as memory_for
from loopmdm_kernels.cpu.looped_blocks import release_spare_memory
from loopmdm_kernels.types import Head

V, D = 40, 16


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(gradient_memory, "_RETURNED_BYTES", 0)
    gradient_memory.release()
    yield
    gradient_memory.release()


@pytest.fixture
def weight():
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_memory_is_used_again_once_its_tensors_are_gone(weight):
    first = memory_for(weight, torch.float32)
    assert first.shape == weight.shape and first.dtype == torch.float32
    address = first.data_ptr()
    view = first[3:]
    del first
    second = memory_for(weight, torch.float32)
    assert second.data_ptr() != address  # a view still lies there
    address = second.data_ptr()
    del second, view
    assert memory_for(weight, torch.float32).data_ptr() == address


def test_other_weights_and_dtypes_have_memory_of_their_own(weight):
    address = memory_for(weight, torch.float32).data_ptr()
    other = torch.zeros_like(weight)
    held = memory_for(other, torch.float32)
    assert held.data_ptr() != address
    narrow = memory_for(weight, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == weight.shape


def test_memory_goes_with_its_weight():
    weight = torch.zeros(V, D)
    memory_for(weight, torch.float32)
    assert len(gradient_memory._kept) == 1
    del weight
    gc.collect()
    assert not gradient_memory._kept


def test_memory_is_given_back_when_asked_for(weight):
    grad = memory_for(weight, torch.float32).fill_(3.0)
    release_spare_memory()
    assert not gradient_memory._kept
    assert torch.equal(grad, torch.full((V, D), 3.0))


def test_small_gradients_are_ordinary_tensors(weight, monkeypatch):
    monkeypatch.setattr(gradient_memory, "_RETURNED_BYTES", V * D * 4)
    memory_for(weight, torch.float32)
    assert not gradient_memory._kept


def loss(weight, hidden):
    targets = torch.arange(hidden.shape[1])[None]
    return lk.masked_cross_entropy(
        hidden, Head.of(weight), targets, targets[0], torch.ones(targets.shape[1])
    )[0]


def logits(weight, hidden):
    return lk.head_logits(hidden, Head.of(weight)).square().sum()


@pytest.mark.parametrize("function", [loss, logits])
def test_steps_share_their_memory(function, weight):
    addresses = set()
    with lk.use_backend("cpu"):
        for _ in range(3):
            function(weight, torch.ones(1, 6, D)).backward()
            addresses.add(weight.grad.data_ptr())
            weight.grad = None
    assert len(addresses) == 1


@pytest.mark.parametrize("function", [loss, logits])
def test_gradients_of_steps_are_as_without(function, weight, monkeypatch):
    """Kept between steps, accumulated, and of two graphs at a time."""

    def run():
        generator = torch.Generator().manual_seed(1)
        leaf = weight.detach().clone().requires_grad_()
        seen = []
        with lk.use_backend("cpu"):
            for step in range(3):
                hidden = [torch.randn(1, 6, D, generator=generator) for _ in range(2)]
                first, second = (function(leaf, h) for h in hidden)  # both graphs alive
                (kept,) = torch.autograd.grad(first, leaf)
                second.backward()
                function(leaf, hidden[0]).backward()  # added to it
                seen += [kept, leaf.grad.clone()]
                if step != 1:
                    leaf.grad = None
        return seen

    found = run()
    monkeypatch.setattr(gradient_memory, "_RETURNED_BYTES", 1 << 40)
    assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))
