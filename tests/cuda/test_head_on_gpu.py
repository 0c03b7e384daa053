"""The Hopper kernels of the vocabulary head on a GPU (`make gpu`)."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs, reference, row_rng
from loopmdm_kernels.types import Head, RowRng

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
STATISTICS = ("log_prob", "top1_prob", "top2_prob", "entropy")


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def case(num_rows, hidden=768, vocab_size=50258, length=512, sequences=False):
    """(hidden, head, rows)"""
    x, head = head_inputs(
        4, length, hidden, vocab_size, excluded_token=vocab_size - 1, per_sequence_modulation=sequences
    )
    leaves = [t.to("cuda", BF16) for t in head[:4]]
    rows = torch.randperm(4 * length, generator=torch.Generator().manual_seed(num_rows))[:num_rows]
    return x.float().cuda(), Head(*leaves, head.excluded_token), rows.cuda()


def names(num_rows):
    rng = row_rng(num_rows)
    return RowRng(rng.seed, *(name.cuda() for name in rng[1:]))


def sampled(op, hidden, head, rows, **options):
    with torch.no_grad(), lk.use_backend("cuda"):
        return op(hidden, head, rows, names(rows.shape[0]), **options)


@pytest.mark.parametrize("num_rows", [1, 64, 200, 1024])
def test_draws_and_statistics(num_rows):
    inputs = case(num_rows)
    out, expected = sampled(lk.sample_rows, *inputs), sampled(reference.sample_rows, *inputs)
    # Near ties may fall the other way: sums over D have another order here.
    assert (out.token != expected.token).float().mean() <= 0.002
    assert (out.top1_token != expected.top1_token).float().mean() <= 0.002
    same = out.token == expected.token
    for name in STATISTICS:
        kept = same if name == "log_prob" else torch.ones_like(same)
        torch.testing.assert_close(
            getattr(out, name)[kept], getattr(expected, name)[kept], atol=1e-3, rtol=1e-3
        )
    again = sampled(lk.sample_rows, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


def test_a_row_does_not_depend_on_the_others():
    hidden, head, rows = case(300)
    rng = names(300)
    with lk.use_backend("cuda"):
        together = lk.sample_rows(hidden, head, rows, rng)
        for part in (slice(0, 1), slice(100, 160), slice(50, 250)):
            few = RowRng(rng.seed, *(name[part] for name in rng[1:]))
            for alone, value in zip(lk.sample_rows(hidden, head, rows[part], few), together, strict=True):
                assert torch.equal(alone, value[part])


@pytest.mark.parametrize(("num_rows", "sequences"), [(48, True), (1000, False), (1000, True)])
def test_loss_and_gradients(num_rows, sequences):
    hidden, head, rows = case(num_rows, sequences=sequences)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(head.weight.shape[0] - 1, hidden.shape[:2], generator=generator).cuda()
    weights = (torch.rand(num_rows, generator=generator) + 0.5).cuda()

    def run(op, kind=None):
        leaves = [(t if kind is None else t.to(kind)).detach() for t in (hidden, *head[:4], weights)]
        for leaf in leaves:
            leaf.requires_grad_()
        x, *parts, w = leaves
        total, nll = op(x, Head(*parts, head.excluded_token), targets, rows, w)
        return [nll.detach(), *torch.autograd.grad(total + nll.square().sum(), leaves)]

    with lk.use_backend("cuda"):
        out, again = run(lk.masked_cross_entropy), run(lk.masked_cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True)), "the same call, other bits"
    baseline, oracle = run(reference.masked_cross_entropy), run(reference.masked_cross_entropy, torch.float64)
    for ours, theirs, exact in zip(out, baseline, oracle, strict=True):
        assert_matches_oracle(ours, theirs, exact)


def test_in_a_graph():
    hidden, head, rows = case(100)
    expected = sampled(lk.sample_rows, hidden, head, rows)
    rng, graph = names(100), torch.cuda.CUDAGraph()
    with torch.no_grad(), lk.use_backend("cuda"), torch.cuda.graph(graph):
        out = lk.sample_rows(hidden, head, rows, rng)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
