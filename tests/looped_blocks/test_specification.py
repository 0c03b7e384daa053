"""looped_blocks in float64, the oracle of the other tests: the specification once more, in other words."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import LoopedInputs, looped_inputs
from loopmdm_kernels.types import BlockWeights
from tests.looped_blocks.cases import call, part_of


def plain_blocks(inputs: LoopedInputs, num_loops: int) -> torch.Tensor:
    """The specification once more, with explicit scores and no shared code, in float64."""
    x = inputs.x
    heads = inputs.num_heads
    hidden = x.shape[-1]
    size = hidden // heads

    def norm(x, weight):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * weight

    def rotate(x):
        if inputs.rotary is None:
            return x
        out = torch.empty_like(x)
        half = size // 2
        for i in range(half):
            cos, sin = inputs.rotary.cos[:, i], inputs.rotary.sin[:, i]
            out[..., i] = x[..., i] * cos - x[..., i + half] * sin
            out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
        return out

    for _ in range(num_loops):
        for weights, mod in zip(inputs.blocks, inputs.modulation, strict=True):
            shift1, scale1, gate1, shift2, scale2, gate2 = (mod[:, i, None, :] for i in range(6))
            h = norm(x, weights.norm1) * (1 + scale1) + shift1
            qkv = h @ weights.qkv.T
            mixed = torch.zeros_like(x)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                q, k, v = (qkv[..., i * hidden : (i + 1) * hidden][..., part] for i in range(3))
                scores = rotate(q) @ rotate(k).transpose(1, 2) / size**0.5
                if inputs.key_mask is not None:
                    scores = scores.masked_fill(~inputs.key_mask[:, None, :], -torch.inf)
                weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
                mixed[..., part] = weight @ v
            x = x + gate1 * (mixed @ weights.attn_out.T)
            h = norm(x, weights.norm2) * (1 + scale2) + shift2
            inner = h @ weights.mlp_in.T + weights.mlp_in_bias
            tanh = torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))
            x = x + gate2 * ((0.5 * inner * (1 + tanh)) @ weights.mlp_out.T + weights.mlp_out_bias)
    return x


@pytest.mark.parametrize("num_loops", [1, 3, 12])
@pytest.mark.parametrize(
    "options", [{}, {"rotary": False}, {"key_mask": True, "per_sequence_modulation": True}]
)
def test_reference_follows_the_specification(num_loops, options):
    inputs = looped_inputs(**options)
    expected = plain_blocks(inputs, num_loops)
    torch.testing.assert_close(call(inputs, num_loops), expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs = looped_inputs(1, 3, 8, 2, 2, 2).to(torch.float64, requires_grad=True)
    leaves = list(inputs.leaves().values())
    width = len(BlockWeights._fields)

    def call(x, modulation, *weights):
        blocks = [BlockWeights(*weights[i : i + width]) for i in range(0, len(weights), width)]
        return lk.looped_blocks(x, blocks, modulation, 2, num_heads=2, rotary=inputs.rotary)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("num_loops", [2, 3, 7])
def test_e2_loop_equals_unrolled_tied_stack(num_loops):
    looped = looped_inputs().to(torch.float64, requires_grad=True)
    unrolled = looped_inputs().to(torch.float64, requires_grad=True)
    copies = [
        BlockWeights(*(w.detach().clone().requires_grad_() for w in block))
        for _ in range(num_loops)
        for block in unrolled.blocks
    ]
    out = call(looped, num_loops)
    stacked = unrolled._replace(blocks=copies, modulation=unrolled.modulation.repeat(num_loops, 1, 1, 1))
    expected = call(stacked, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    for index, block in enumerate(looped.blocks):
        for name, weight in block._asdict().items():
            total = sum(getattr(copy, name).grad for copy in copies[index :: len(looped.blocks)])
            torch.testing.assert_close(weight.grad, total, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(looped.modulation.grad, unrolled.modulation.grad, rtol=1e-8, atol=1e-10)


def test_loops_per_sequence_equal_separate_calls():
    inputs = looped_inputs(batch=4, key_mask=True, per_sequence_modulation=True)
    loops = torch.tensor([3, 1, 4, 1])
    out = call(inputs, loops)
    for i, num in enumerate(loops.tolist()):
        alone = call(part_of(inputs, slice(i, i + 1)), num)
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_e13_early_exit():
    inputs = looped_inputs(batch=4)
    full, used = call(inputs, 6, exit_threshold=0.0)
    assert used.tolist() == [6] * 4
    assert torch.equal(full, call(inputs, 6))
    once, used = call(inputs, 6, exit_threshold=float("inf"))
    assert used.tolist() == [1] * 4
    assert torch.equal(once, call(inputs, 1))
    change = [[], [], [], []]
    for loop in range(1, 7):
        new, old = call(inputs, loop), call(inputs, loop - 1) if loop > 1 else inputs.x
        for i in range(4):
            change[i].append(((new[i] - old[i]).norm() / new[i].norm()).item())
    threshold = sorted(c for row in change for c in row)[10] * 1.0001
    out, used = call(inputs, 6, exit_threshold=threshold)
    for i, row in enumerate(change):
        expected = next((k for k, c in enumerate(row, 1) if c < threshold), 6)
        assert used[i] == expected
        torch.testing.assert_close(out[i], call(inputs, expected)[i], rtol=1e-10, atol=1e-10)


def test_masked_keys_do_not_reach_other_positions():
    inputs = looped_inputs(key_mask=True)
    changed = inputs._replace(x=torch.where(inputs.key_mask[..., None], inputs.x, inputs.x + 5.0))
    kept = inputs.key_mask
    torch.testing.assert_close(call(inputs, 3)[kept], call(changed, 3)[kept], rtol=1e-12, atol=1e-12)
