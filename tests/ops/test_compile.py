"""The ops under torch.compile(fullgraph=True): the same values and gradients, few graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def looped(inputs, num_loops, **options):
    return lk.looped_blocks(
        inputs.x,
        inputs.blocks,
        inputs.modulation,
        num_loops,
        num_heads=inputs.num_heads,
        rotary=inputs.rotary,
        key_mask=inputs.key_mask,
        **options,
    )


def test_looped_blocks_values_gradients_and_graph_count():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(looped, fullgraph=True, backend=counter)
    for num_loops in (1, 2, 3, 5, 8, 12):
        eager, traced = (looped_inputs(key_mask=True).to(torch.float32, requires_grad=True) for _ in range(2))
        expected, out = looped(eager, num_loops), compiled(traced, num_loops)
        assert torch.equal(out, expected)
        expected.square().sum().backward()
        out.square().sum().backward()
        for (name, a), b in zip(eager.leaves().items(), traced.leaves().values(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert counter.frame_count <= 2  # S = 1, and any other S (E4)


def test_looped_blocks_with_exit_and_loops_per_sequence():
    inputs = looped_inputs(batch=3).to(torch.float32)
    compiled = torch.compile(looped, fullgraph=True, backend="aot_eager")
    out, used = compiled(inputs, 6, exit_threshold=0.5)
    expected, expected_used = looped(inputs, 6, exit_threshold=0.5)
    assert torch.equal(out, expected) and torch.equal(used, expected_used)
    loops = torch.tensor([1, 4, 2])
    assert torch.equal(compiled(inputs, loops), looped(inputs, loops))


def test_inductor_end_to_end():
    inputs = looped_inputs().to(torch.float32)
    hidden, head = head_inputs(vocab_size=20)
    hidden, head = hidden.float(), Head(*(t.float() for t in head[:4]))
    rows, rng = torch.tensor([1, 7]), row_rng(2)

    def step(x):
        h = lk.looped_blocks(x * 2, inputs.blocks, inputs.modulation, 2, num_heads=4)
        return lk.sample_rows(h + 1, head, rows, rng), h.sum()

    sampled, total = torch.compile(step, fullgraph=True)(inputs.x)
    expected, expected_total = step(inputs.x)
    assert torch.equal(sampled.token, expected.token)
    torch.testing.assert_close(sampled.log_prob, expected.log_prob)
    torch.testing.assert_close(total, expected_total)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_masked_cross_entropy(num_rows):
    hidden, head = head_inputs(vocab_size=20, excluded_token=19)
    targets = torch.zeros(2, 16, dtype=torch.int64)
    rows, weights = torch.arange(num_rows), torch.ones(num_rows)

    def loss(hidden, weight):
        h = Head(head.norm.float(), weight, head.bias.float(), head.modulation.float(), 19)
        total, nll = lk.masked_cross_entropy(hidden, h, targets, rows, weights)
        return total + nll.sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.float().requires_grad_(), head.weight.float().requires_grad_()]
        value = call(*leaves)
        value.backward()
        grads.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    """torch's own checks of the registration: schema, fake tensors, autograd, dynamic shapes."""
    hidden, head = head_inputs(vocab_size=20, excluded_token=19)
    leaves = [hidden.float().requires_grad_(), *(t.float().requires_grad_() for t in head[:4])]
    args = (
        *leaves,
        19,
        torch.zeros(2, 16, dtype=torch.int64),
        torch.tensor([3, 9]),
        torch.ones(2),
        torch.float32,
    )
    torch.library.opcheck(torch.ops.loopmdm.masked_cross_entropy, args)
    inputs = looped_inputs().to(torch.float32, requires_grad=True)
    weights = [w for block in inputs.blocks for w in block]
    rotary = inputs.rotary
    torch.library.opcheck(
        torch.ops.loopmdm.looped_blocks,
        (inputs.x, weights, inputs.modulation, 2, None, 4, *rotary, None, torch.float32, 0.0, 0, None, None),
    )
