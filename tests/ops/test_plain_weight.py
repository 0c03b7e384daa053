"""Ops of a weight alone: without norm, bias and modulation they are linear + cross-entropy, and its draws."""

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_matches_oracle, row_rng

BF16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ON_TWO = pytest.mark.backends("reference", "best")


def case(dtype, size=(2, 21, 40, 301), bias=False):
    """Rows of a mean other than 0 and of unequal sizes: a norm would change them."""
    batch, length, width, vocab_size = size
    generator = torch.Generator().manual_seed(0)
    hidden = 0.5 + 1.5 * torch.randn(batch, length, width, generator=generator)
    weight = (torch.randn(vocab_size, width, generator=generator) * width**-0.5).to(dtype)
    targets = torch.randint(0, vocab_size, (batch, length), generator=generator)
    added = torch.randn(vocab_size, generator=generator).to(dtype) if bias else None
    return hidden, weight, targets, added


def gradients(loss, leaves):
    grads = torch.autograd.grad(loss, leaves)
    return [loss.detach()[None], *grads]


def plain(kind, hidden, weight, targets, bias):
    """PyTorch's linear + cross-entropy of operands in `kind`, sums in fp32 or wider."""
    wide = torch.promote_types(kind, FLOAT)
    leaves = [t.detach().requires_grad_() for t in (hidden.to(wide), weight.to(kind))]
    added = None if bias is None else bias.to(wide)
    logits = F.linear(leaves[0].to(kind).to(wide), leaves[1].to(wide), added)
    return gradients(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), leaves)


@ON_TWO
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_linear_and_cross_entropy(backend, dtype, bias):
    hidden, weight, targets, added = case(dtype, bias=bias)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    head = lk.Head.of(leaves[1], bias=added) if bias else leaves[1]
    total, nll = lk.masked_cross_entropy(leaves[0], head, targets)
    logits = lk.head_logits(leaves[0], head)
    assert nll.shape == (42,)
    out = gradients(total, leaves)
    baseline, oracle = (plain(kind, hidden, weight, targets, added) for kind in (dtype, DOUBLE))
    for name, *values in zip(("total", "hidden", "weight"), out, baseline, oracle, strict=True):
        assert_matches_oracle(*values, name=name)
    exact = F.linear(hidden.double(), weight.double(), None if added is None else added.double())
    rounded = F.linear(hidden.to(dtype).float(), weight.float(), None if added is None else added.float())
    assert_matches_oracle(logits.detach(), rounded.to(dtype), exact, name="logits")
    of_weight = torch.autograd.grad(logits, leaves[1], torch.ones_like(logits))[0]
    flat = hidden.flatten(0, 1)
    expected = torch.ones(301, 42, dtype=DOUBLE) @ flat.double()
    operand = (torch.ones(301, 42) @ flat.to(dtype).float()).to(dtype)
    assert_matches_oracle(of_weight, operand, expected, name="weight of logits")


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_modulation_without_a_norm(dtype):
    hidden, weight, targets, _ = case(dtype)
    modulation = (0.3 * torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(1))).to(dtype)
    results = []
    for kind, backend in ((dtype, "cpu"), (dtype, "reference"), (DOUBLE, "reference")):
        wide = torch.promote_types(kind, FLOAT)
        given = (hidden.to(wide), weight.to(kind), modulation.to(kind))
        leaves = [t.detach().requires_grad_() for t in given]
        head = lk.Head.of(leaves[1], modulation=leaves[2])
        with lk.use_backend(backend):
            total, _ = lk.masked_cross_entropy(leaves[0], head, targets)
            logits = lk.head_logits(leaves[0], head)
        shift, scale = modulation.double()[:, :, None].unbind(1)
        if kind == DOUBLE:
            exact = F.linear(hidden.double() * (1 + scale) + shift, weight.double())
            torch.testing.assert_close(logits.detach(), exact)
        results.append([*gradients(total, leaves), *torch.autograd.grad(logits.sum(), leaves)])
    for values in zip(*results, strict=True):
        assert_matches_oracle(*values)


@ON_TWO
def test_draws_without_a_norm(backend):
    hidden, weight, _, _ = case(FLOAT)
    rows = torch.arange(42)
    log_probs = F.linear(hidden, weight).log_softmax(-1).flatten(0, 1)
    best = lk.sample_rows(hidden, weight, rows, row_rng(42), temperature=0.0)
    drawn = lk.sample_rows(hidden, weight, rows, row_rng(42), top_k=5)
    assert torch.equal(best.token, log_probs.argmax(-1))
    expected = log_probs.gather(1, drawn.token[:, None])[:, 0]
    torch.testing.assert_close(drawn.log_prob, expected, rtol=1e-4, atol=1e-4)


def test_rows_and_weights_that_are_not_given_are_all_and_one():
    hidden, weight, targets, _ = case(FLOAT)
    rows = torch.arange(42)
    total, nll = lk.masked_cross_entropy(hidden, weight, targets)
    expected = lk.masked_cross_entropy(hidden, lk.Head.of(weight), targets, rows, torch.ones(42))
    assert torch.equal(total, expected[0]) and torch.equal(nll, expected[1])
    some, _ = lk.masked_cross_entropy(hidden, weight, targets, rows[:7])
    torch.testing.assert_close(some, nll[:7].sum())


def test_compiled():
    hidden, weight, targets, _ = case(FLOAT)

    def call(hidden, weight):
        total, _ = lk.masked_cross_entropy(hidden, weight, targets)
        return total + lk.head_logits(hidden, weight).sum()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        results.append(gradients(function(*leaves), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_bad_heads():
    hidden, weight, targets, _ = case(FLOAT)
    with pytest.raises(ValueError, match=r"head: got shape \[301\], expected \[V, D\]"):
        lk.masked_cross_entropy(hidden, weight[:, 0], targets)
    with pytest.raises(ValueError, match=r"head.weight: got shape \[301, 39\], expected \[V, 40\]"):
        lk.head_logits(hidden, weight[:, 1:])
    with pytest.raises(TypeError, match="head: got int, expected a Head or a weight"):
        lk.head_logits(hidden, 3)


def test_backends_without_a_kernel_say_so():
    from loopmdm_kernels.calls import HeadCall
    from loopmdm_kernels.cuda.head import why_not as cuda
    from loopmdm_kernels.triton.head import why_not as triton

    hidden, weight, _, _ = case(FLOAT)
    for why_not in (cuda, triton):
        assert "without a norm" in why_not(HeadCall(hidden, lk.Head.of(weight), BF16))
