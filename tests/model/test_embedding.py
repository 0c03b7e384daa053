"""The token embedding: a gradient in memory that the next step has again, and the derivatives of indexing."""

import pytest
import torch

from loopmdm.model.modules import TokenEmbedding
from loopmdm_kernels.cpu import gradient_memory

IDS = torch.tensor([[3, 1, 3], [0, 3, 2]])


@pytest.fixture
def embedding(monkeypatch):
    monkeypatch.setattr(gradient_memory, "_RETURNED_BYTES", 0)
    torch.manual_seed(0)
    yield TokenEmbedding(5, 16)
    gradient_memory.release()


def gradient(rows, weight, **options):
    weights = torch.linspace(-1, 1, rows.numel()).view_as(rows)
    (grad,) = torch.autograd.grad((rows.square() * weights).sum(), weight, **options)
    return grad


def test_gradients_are_those_of_indexing(embedding):
    weight, addresses = embedding.embedding, set()
    for _ in range(3):
        found = gradient(embedding(IDS), weight)
        assert torch.equal(found, gradient(weight[IDS], weight))
        addresses.add(found.data_ptr())
        del found
    assert len(addresses) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_do_not_change_the_bits(compiled):
    """Of sums of many rows, which `index_put_` adds in any order, as a compiler's own code does."""
    generator = torch.Generator().manual_seed(0)
    embedding = TokenEmbedding(5000, 64)
    forward = torch.compile(embedding, fullgraph=True) if compiled else embedding
    ids = torch.randint(50, (8, 1024), generator=generator)
    weights = torch.randn(8, 1024, 64, generator=generator)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2, 2, 2):
            torch.set_num_threads(number)
            found.append(torch.autograd.grad((forward(ids) * weights).sum(), embedding.embedding)[0])
    finally:
        torch.set_num_threads(threads)
    found.append(torch.autograd.grad((embedding(ids) * weights).sum(), embedding.embedding)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_weight_may_change_before_the_backward_pass(embedding):
    weight = embedding.embedding
    first, second = embedding(IDS).sum(), embedding(IDS).sum()
    first.backward()
    with torch.no_grad():
        weight.sub_(weight.grad)
    second.backward()
    assert torch.equal(weight.grad, 2 * torch.bincount(IDS.flatten(), minlength=5)[:, None].expand(5, 16))


def test_gradients_of_gradients_are_those_of_indexing(embedding):
    weight = embedding.embedding
    found, expected = (
        torch.autograd.grad(gradient(rows, weight, create_graph=True).sin().sum(), weight)[0]
        for rows in (embedding(IDS), weight[IDS])
    )
    assert expected.abs().sum() > 0
    assert torch.equal(found, expected)


def test_without_gradients_nothing_is_kept(embedding):
    with torch.no_grad():
        assert torch.equal(embedding(IDS), embedding.embedding[IDS])
    embedding.requires_grad_(False)
    assert not embedding(IDS).requires_grad
    assert not gradient_memory._kept


def test_transforms_and_compilers_see_indexing(embedding):
    weight = embedding.embedding

    def total(weight):
        return torch.func.functional_call(embedding, {"embedding": weight}, (IDS,)).square().sum()

    expected = 2 * weight.detach() * torch.bincount(IDS.flatten(), minlength=5)[:, None]
    torch.testing.assert_close(torch.func.grad(total)(weight.detach()), expected)
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    assert torch.equal(gradient(compiled(IDS), weight), gradient(weight[IDS], weight))
