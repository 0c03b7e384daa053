"""The backward kernel's own source, all of its threads on the CPU, against autograd of the oracle."""

import pytest
import torch

from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.schedule import Tiles
from loopmdm_kernels.testing import assert_matches_oracle, looped_inputs
from loopmdm_kernels.testing.reference import looped_blocks
from tests.cuda import emulated, emulated_backward

# Rows and columns of the products, hidden size, heads. Of 192 rows of a weight a tile has the last 64;
# products have fewer steps than the ring has stages, and more. A head of 128 has two panels. Of 256 rows
# each block of a pair has a half; of 128 rows of a weight one of them has none.
VARIANTS = {
    "heads of 64": (128, 64, 192, 3),
    "192 columns": (128, 192, 192, 3),
    "heads of 128": (128, 128, 128, 1),
    "pairs": (256, 192, 192, 3),
    "pairs, heads of 128": (256, 128, 128, 1),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    rows, columns, *sizes = VARIANTS[request.param]
    shape, plan = emulated_backward.plan_of(make(sizes, 1, 8), columns, rows)
    return emulated_backward.build(shape, plan, tmp_path_factory.mktemp("kernel")), plan, sizes


def make(sizes, batch, length, **options):
    return looped_inputs(batch, length, *sizes, mlp_ratio=1, **options).to(torch.bfloat16)


def apply(inputs, loops, x=None):
    return looped_blocks(
        inputs.x if x is None else x, inputs.blocks, inputs.modulation, loops,
        num_heads=inputs.num_heads, rotary=inputs.rotary, key_mask=inputs.key_mask,
    )  # fmt: skip


def oracle(inputs, loops, grad):
    inputs = inputs.to(inputs.blocks[0].qkv.dtype, requires_grad=True)
    leaves = inputs.leaves()
    grads = torch.autograd.grad(apply(inputs, loops), list(leaves.values()), grad.to(inputs.x.dtype))
    return dict(zip(leaves, grads, strict=True))


def gradient(inputs):
    return torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(9))


def gradients(variant, inputs, loops, grad, *, allowed=0, **options):
    """`allowed`: loops that early exit could have taken; nobody took the last of them."""
    library, plan, _ = variant
    counts = torch.as_tensor(loops).expand(len(inputs.x))
    loop_inputs = torch.full((max(int(counts.max()), allowed), *inputs.x.shape), torch.nan)
    state = inputs.x
    for loop in range(len(loop_inputs)):
        loop_inputs[loop, counts > loop] = state[counts > loop]
        state = apply(inputs, 1, state)
    kept = emulated_backward.keep(inputs, loops, loop_inputs)
    kept.stop[-1] = len(loop_inputs)
    grad_x, grad_blocks, grad_modulation = emulated_backward.run(library, plan, kept, grad, inputs, **options)
    named = {"x": grad_x, "modulation": grad_modulation}
    for index, block in enumerate(grad_blocks):
        named |= {f"blocks[{index}].{name}": value for name, value in block._asdict().items()}
    return named


def check(variant, inputs, loops, **options):
    grad = gradient(inputs)
    ours, baseline = gradients(variant, inputs, loops, grad, **options), oracle(inputs, loops, grad)
    for name, expected in oracle(inputs.to(torch.float64), loops, grad).items():
        assert ours[name].dtype == baseline[name].dtype
        assert_matches_oracle(ours[name], baseline[name], expected, name=name)


def test_values(variant):
    """Two tiles of rows and three blocks of keys, the last of each in part."""
    check(variant, make(variant[2], 1, 150), 1, num_blocks=3)


def test_loops_and_options(variant):
    masked = make(variant[2], 2, 20, key_mask=True, per_sequence_modulation=True, rotary=False, seed=1)
    check(variant, masked, 2, num_blocks=5)


def test_each_sequence_has_its_own_loops(variant):
    check(variant, make(variant[2], 2, 5), torch.tensor([1, 2]))
    check(variant, make(variant[2], 2, 5), torch.tensor([2, 1]), allowed=3)


def test_any_number_of_blocks_and_any_order_give_the_same_bits(variant):
    inputs = make(variant[2], 1, 30)
    grad = gradient(inputs)
    expected = gradients(variant, inputs, 1, grad, num_blocks=1)
    for num_blocks, seed in ((4, 1), (16, 2)):
        again = gradients(variant, inputs, 1, grad, num_blocks=num_blocks, seed=seed)
        assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("variant", ["heads of 128"], indirect=True)
def test_training_takes_both_kernels(variant, tmp_path, monkeypatch):
    """Through autograd: the forward kernel keeps the inputs of the loops, early exit ends one sequence."""
    library, plan, sizes = variant
    inputs = make(sizes, 2, 20)
    inputs = inputs._replace(x=inputs.x * torch.tensor([1.0, 1e3])[:, None, None])
    shape, forward_plan = emulated.plan_of(inputs, Tiles(128, 128, 64, 64, 64))
    forward = emulated.build(shape, forward_plan, tmp_path, optimize=False)

    def run_forward(call, *, keep):
        given = inputs._replace(x=call.x.detach(), blocks=call.blocks, modulation=call.modulation.detach())
        buffers = emulated.run_buffers(
            forward, given, forward_plan, call.num_loops, exit_threshold=call.exit_threshold, keep=keep
        )
        return buffers, emulated.weights.packed(call.blocks)

    def run_backward(kept, grad, blocks, modulation):
        given = inputs._replace(blocks=blocks, modulation=modulation)
        return emulated_backward.run(library, plan, kept, grad, given)

    monkeypatch.setattr(op, "run_forward", run_forward)
    monkeypatch.setattr(op, "gradients", run_backward)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    grad, grads = gradient(inputs), []
    for function, dtype in (
        (emulated.on_cuda("looped_blocks"), torch.bfloat16),
        (looped_blocks, torch.bfloat16),
        (looped_blocks, torch.float64),
    ):
        given = inputs.to(dtype, requires_grad=True)
        out, used = function(
            given.x, given.blocks, given.modulation, 3, num_heads=given.num_heads, rotary=given.rotary,
            exit_threshold=0.2,
        )  # fmt: skip
        assert used[0] > used[1]
        leaves = given.leaves()
        found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        grads.append(dict(zip(leaves, found, strict=True)))
    for name, ours in grads[0].items():
        assert_matches_oracle(ours, grads[1][name], grads[2][name], name=name)
