"""Weights in e4m3: how they are rounded, what the ops take, and that the reference computes with them."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, reference, row_rng
from loopmdm_kernels.types import Fp8BlockWeights, Fp8Head, Fp8Weight, Head

BF16 = torch.bfloat16


def looped(inputs, blocks, dtype=torch.float32):
    return lk.looped_blocks(
        inputs.x, blocks, inputs.modulation, 2, num_heads=inputs.num_heads, compute_dtype=dtype
    )


def head_case():
    hidden, head = head_inputs(vocab_size=20)
    return hidden.float(), Head(*(t.float() for t in head[:4]))


def test_rounding():
    """To nearest: by 2^-4 of the number, or where the exponents of e4m3 end 2^-17 of the row's largest."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight *= torch.logspace(-30, 30, 64, dtype=torch.float64)[:, None]
    weight[:, ::7] *= 1e-3
    weight[5] = 0.0
    rounded = Fp8Weight.of(weight)
    assert (rounded.dtype, rounded.shape) == (torch.float8_e4m3fn, (64, 256))
    assert bool((rounded.scale.frexp().mantissa == 0.5).all())
    error = (rounded.dequantized(torch.float64) - weight).abs()
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert bool((error <= torch.maximum(weight.abs() * 2.0**-4, largest * 2.0**-17)).all())
    assert error[weight != 0].max() > 0 and torch.equal(
        rounded.dequantized(BF16)[5], torch.zeros(256, dtype=BF16)
    )


def test_products():
    """The error is at most 2^-4 of the product of magnitudes (2^-17 of a row's largest number aside)."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 96, generator=generator, dtype=torch.float64)
    a = torch.randn(7, 96, generator=generator, dtype=torch.float64)
    error = (a @ (Fp8Weight.of(weight).dequantized(torch.float64) - weight).T).abs()
    tiny = a.abs().sum(dim=1, keepdim=True) * weight.abs().amax(dim=1) * 2.0**-17
    assert bool((error <= a.abs() @ weight.abs().T * 2.0**-4 + tiny).all())
    assert error.square().mean().sqrt() < 0.04 * (a @ weight.T).square().mean().sqrt()


def test_bf16_holds_the_rounded_matrix():
    weight = Fp8Weight.of(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 0.02)
    assert torch.equal(weight.dequantized(BF16).double(), weight.dequantized(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_reference_computes_with_the_rounded_matrices(dtype):
    inputs = looped_inputs().to(torch.float32)
    blocks = [Fp8BlockWeights.of(block) for block in inputs.blocks]
    plain = [block.dequantized(torch.float32) for block in blocks]
    assert torch.equal(looped(inputs, blocks, dtype), reference_looped(inputs, plain, dtype))
    hidden, head = head_case()
    narrow, targets = Fp8Head.of(head), torch.zeros(2, 16, dtype=torch.int64)
    rows, weights = torch.arange(5), torch.ones(5)

    def results(ops, head):
        return (
            ops.head_logits(hidden, head, compute_dtype=dtype),
            ops.sample_rows(hidden, head, rows, row_rng(5), compute_dtype=dtype).log_prob,
            ops.masked_cross_entropy(hidden, head, targets, rows, weights, compute_dtype=dtype)[1],
        )

    plain_head = narrow.dequantized(torch.float32)
    for out, expected in zip(results(lk, narrow), results(reference, plain_head), strict=True):
        assert torch.equal(out, expected)


def reference_looped(inputs, blocks, dtype):
    return reference.looped_blocks(
        inputs.x, blocks, inputs.modulation, 2, num_heads=inputs.num_heads, compute_dtype=dtype
    )


def test_under_compile():
    inputs = looped_inputs().to(torch.float32)
    blocks = [Fp8BlockWeights.of(block) for block in inputs.blocks]
    hidden, head = head_case()
    narrow, rows, rng = Fp8Head.of(head), torch.arange(5), row_rng(5)
    targets = torch.zeros(2, 16, dtype=torch.int64)

    def step(x, hidden):
        options = {"compute_dtype": torch.float32}
        drawn = lk.sample_rows(hidden, narrow, rows, rng, **options)
        _, nll = lk.masked_cross_entropy(hidden, narrow, targets, rows, torch.ones(5), **options)
        logits = lk.head_logits(hidden, narrow, **options)
        return looped(inputs._replace(x=x), blocks), drawn.token, drawn.log_prob, nll, logits

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(step(inputs.x, hidden), compiled(inputs.x, hidden), strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_what_is_refused():
    inputs = looped_inputs().to(torch.float32)
    blocks = [Fp8BlockWeights.of(block) for block in inputs.blocks]
    hidden, head = head_case()
    narrow = Fp8Head.of(head)
    with pytest.raises(ValueError, match=r"blocks: fp8 weights are for inference.* of x; expected .*no_grad"):
        looped(inputs._replace(x=inputs.x.clone().requires_grad_()), blocks)
    with pytest.raises(ValueError, match=r"head: fp8 weights are for inference.* of hidden;"):
        lk.head_logits(hidden.requires_grad_(), narrow, compute_dtype=BF16)
    with torch.no_grad():
        lk.head_logits(hidden, narrow, compute_dtype=BF16)
    with pytest.raises(ValueError, match=r"compute_dtype: got None, .* head holds fp8 weights"):
        lk.head_logits(hidden, narrow)
    with pytest.raises(TypeError, match="blocks: got some with fp8 weights, expected all or none"):
        looped(inputs, [blocks[0], inputs.blocks[1]])
    wrong = narrow._replace(weight=Fp8Weight(narrow.weight.values, torch.ones(3)))
    with pytest.raises(ValueError, match=r"head.weight.scale: got shape \[3\], expected \[20\]"):
        lk.head_logits(hidden.detach(), wrong, compute_dtype=BF16)
    with (
        lk.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' .*: it has no kernels for fp8 weights"),
    ):
        looped(inputs, blocks)
