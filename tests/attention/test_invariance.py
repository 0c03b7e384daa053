"""attention: the same bits for any batch, heads, threads, padding and layout, with gradients and without."""

import pytest
import torch

import loopmdm_kernels as lk
from tests.attention.cases import BF16, FLOAT, angles, assert_same, interleaved, random_mask, run, tensors

pytestmark = pytest.mark.backends("cpu", "triton")


def run_leaves(leaves, grad, op=lk.attention, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(*leaves, **options)
    out.backward(grad)
    return [out, *(leaf.grad for leaf in leaves)]


@pytest.mark.by_backend("length", cpu=[1, 5, 16, 17, 33])
def test_padding_changes_no_bit(backend, dtype, length):
    """A sequence alone and as the attended part of a longer one: the same output and gradients."""
    for padded in (length + 1, 16, 33, 64, 100):
        if padded <= length:
            continue
        qkv, grad = interleaved(backend, dtype, 2, 2, padded, 40)
        grad[:, length:] = 0
        mask = (torch.arange(padded) < length).expand(2, -1)
        alone = run(qkv[:, :length], grad[:, :length])
        out, *grads = run(qkv, grad, key_mask=mask)
        assert_same(alone, [out[:, :, :length], *(of[:, :length] for of in grads)])


@pytest.mark.by_backend("length", cpu=[1, 7, 40], triton=[7])
def test_the_same_bits_with_and_without_gradients(backend, dtype, length):
    q, k, v = tensors(backend, dtype, 2, 2, length, 32)
    kept = lk.attention(q.clone().requires_grad_(), k, v)
    assert kept.requires_grad
    assert torch.equal(lk.attention(q, k, v), kept.detach())


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[FLOAT])
def test_masked_keys_may_hold_anything_finite(backend, dtype):
    length = 40 if backend.emulated else 70
    mask = random_mask(backend, 1, length)
    q, k, v, grad = tensors(backend, dtype, 1, 2, length, 32, number=4)
    results = []
    for fill in (0.0, 1e4):
        hidden = (t.masked_fill(~mask[:, None, :, None], fill) for t in (k, v))
        results.append(run_leaves([q, *hidden], grad, key_mask=mask))
    assert_same(*results)


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[FLOAT])
def test_strides(backend, dtype):
    """The same bits from any layout: interleaved, transposed, expanded, sliced."""
    q, k, v, grad = tensors(backend, dtype, 1 if backend.emulated else 2, 3, 50, 20, number=4)
    k = k[:, :1].expand_as(k)

    def results(arrange):
        leaves = (arrange(t.clone()) for t in (q, k, v))
        return run_leaves(leaves, arrange(grad.clone()), rotary=angles(backend, 50, 20))

    expected = results(lambda t: t.contiguous())
    layouts = (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat((t, t), -1)[..., 20:],
        lambda t: torch.stack((t, t), -1)[..., 1],
        lambda t: t.flip(2).contiguous().flip(2),
    )
    for arrange in layouts[:1] if backend.emulated else layouts:
        assert_same(expected, results(arrange))
    assert torch.equal(lk.attention(q, k, v), lk.attention(q, k.contiguous(), v))


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[BF16])
def test_same_bits_for_any_number_of_threads_and_batch(backend, dtype, threads):
    size = (3, 2, 33, 16) if backend.emulated else (3, 3, 300, 32)
    qkv, grad = interleaved(backend, dtype, *size)
    mask, rotary = random_mask(backend, 3, size[2]), angles(backend, *size[2:])
    threads(1)
    expected = run(qkv, grad, key_mask=mask, rotary=rotary)
    for number in () if backend.emulated else (1, 2, 4, 5, 16):
        threads(number)
        assert_same(expected, run(qkv, grad, key_mask=mask, rotary=rotary))
    for b in range(3):
        part = slice(b, b + 1)
        alone = run(qkv[part], grad[part], key_mask=mask[part], rotary=rotary)
        assert_same([value[part] for value in expected], alone)
    head = run(qkv[:, :, :, 1:2], grad[:, :, 1:2], key_mask=mask, rotary=rotary)
    assert_same([expected[0][:, 1:2], *(of[:, :, 1:2] for of in expected[1:])], head)


@pytest.mark.by_backend("dtype", best=[FLOAT, BF16], triton=[FLOAT])
def test_compiled(backend, dtype):
    torch._dynamo.reset()
    length = 8 if backend.emulated else 40
    *leaves, grad = tensors(backend, dtype, 2, 2, length, 16, number=4)
    options = {"key_mask": random_mask(backend, 2, length), "rotary": angles(backend, length, 16)}
    compiled = torch.compile(lk.attention, fullgraph=True, backend="aot_eager")
    assert_same(run_leaves(leaves, grad, **options), run_leaves(leaves, grad, compiled, **options))
