"""Tensors whose memory is not what they show: lazy signs, strides, offsets, subclasses; on every backend."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.ops import checks
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Rotary

pytestmark = pytest.mark.backends("reference", "best")


class Named(torch.Tensor):
    """A subclass that changes nothing."""


def negative(x):
    return torch._neg_view(-x)


def imaginary(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else negative(x)


def transposed(x):
    return x if x.ndim < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)


def spaced(x):
    return torch.stack((x, torch.zeros_like(x)), dim=-1).flatten(-2)[..., ::2] if x.ndim else x


def offset(x):
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) if x.numel() else x


def subclass(x):
    return x.as_subclass(Named)


DISGUISES = [negative, imaginary, transposed, spaced, offset, subclass]


def disguised(value, disguise):
    """All tensors of floats and ints, in tuples and lists of any depth."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bool and disguise in (negative, imaginary):
            return value
        out = disguise(value.detach())
        assert torch.equal(out.as_subclass(torch.Tensor), value.detach())
        return out.requires_grad_(value.requires_grad) if out.is_leaf else out
    if isinstance(value, list):
        return [disguised(item, disguise) for item in value]
    if isinstance(value, tuple):
        return type(value)(*(disguised(item, disguise) for item in value))
    return value


def head_case(gradients=False):
    hidden, head = head_inputs(2, 6, 16, 20, per_sequence_modulation=True, excluded_token=19)
    tensors = (hidden, *head[:4])
    hidden, *rest = (t.float().requires_grad_(gradients) for t in tensors)
    return hidden, type(head)(*rest, 19)


def outputs(op, disguise=None):
    """What an op returns and the gradients of what it takes, with every argument disguised."""

    def of(value):
        return value if disguise is None else disguised(value, disguise)

    if op == "attention":
        generator = torch.Generator().manual_seed(0)
        q, k, v = (of(torch.randn(2, 3, 5, 8, generator=generator).requires_grad_()) for _ in range(3))
        angle = torch.randn(5, 4, generator=generator)
        out = lk.attention(
            q, k, v, key_mask=of(torch.ones(2, 5) > 0), rotary=of(Rotary(angle.cos(), angle.sin()))
        )
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    if op == "looped_blocks":
        inputs = looped_inputs(key_mask=True).to(torch.float32, requires_grad=True)
        x, blocks, modulation = of(inputs.x), of(inputs.blocks), of(inputs.modulation)
        out = lk.looped_blocks(
            x, blocks, modulation, of(torch.tensor([1, 3])), num_heads=inputs.num_heads,
            rotary=of(inputs.rotary), key_mask=of(inputs.key_mask),
        )  # fmt: skip
        return [
            out,
            *torch.autograd.grad(out.square().sum(), (x, modulation, *(w for b in blocks for w in b))),
        ]
    if op == "masked_cross_entropy":
        hidden, head = (of(value) for value in head_case(gradients=True))
        targets, rows = of(torch.arange(12).view(2, 6)), of(torch.tensor([1, 5, 7, 11]))
        total, nll = lk.masked_cross_entropy(hidden, head, targets, rows, of(torch.arange(1.0, 5.0)))
        return [total, nll, *torch.autograd.grad(total, (hidden, *head[:4]))]
    hidden, head = (of(value) for value in head_case())
    if op == "head_logits":
        return [lk.head_logits(hidden, head)]
    rng = row_rng(4, step=3)
    rows = of(torch.tensor([1, 5, 7, 11]))
    return [
        *lk.sample_rows(hidden, head, rows, of(rng)),
        *lk.sample_rows(hidden, head, rows, of(rng), top_k=3),
    ]


OPS = ["attention", "looped_blocks", "masked_cross_entropy", "head_logits", "sample_rows"]


@pytest.mark.parametrize("disguise", DISGUISES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("op", OPS)
def test_an_op_reads_what_a_tensor_shows(backend, op, disguise):
    for want, got in zip(outputs(op), outputs(op, disguise), strict=True):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-6)


def test_expanded_tensors(backend):
    hidden, head = head_case()
    hidden, rows = hidden[:1, :1].expand(2, 6, 16), torch.tensor([3]).expand(4)
    ones = torch.tensor([1.0]).expand(4)
    targets = torch.tensor([[2]]).expand(2, 6)
    modulation = head.modulation[:, :, :1].expand(2, 2, 16)
    norm, bias = head.norm[:1].expand(16), head.bias[:1].expand(20)
    weight = head.weight[:1].expand(20, 16)
    lazy = head._replace(modulation=modulation, norm=norm, bias=bias, weight=weight)
    dense = head._replace(
        **{k: getattr(lazy, k).contiguous() for k in ("modulation", "norm", "bias", "weight")}
    )
    want = lk.masked_cross_entropy(
        hidden.contiguous(), dense, targets.contiguous(), rows.contiguous(), ones.contiguous()
    )
    for a, b in zip(lk.masked_cross_entropy(hidden, lazy, targets, rows, ones), want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(lk.head_logits(hidden, lazy), lk.head_logits(hidden.contiguous(), dense))
    q = torch.randn(1, 1, 1, 8).expand(2, 3, 5, 8)
    torch.testing.assert_close(lk.attention(q, q, q), q.contiguous())


def test_weights_with_the_negative_bit_are_packed_with_their_sign():
    """Also when the tensor behind the view changes between calls."""
    hidden, head = head_case()
    behind = -head.weight
    lazy = head._replace(weight=torch._neg_view(behind))
    assert torch.equal(lk.head_logits(hidden, lazy), lk.head_logits(hidden, head))
    behind.mul_(2)
    want = lk.head_logits(hidden, head._replace(weight=head.weight * 2))
    assert torch.equal(lk.head_logits(hidden, lazy), want)


def test_gradients_with_the_negative_bit(backend):
    for op in ("attention", "looped_blocks", "head_logits", "masked_cross_entropy"):
        if op == "attention":
            leaf = torch.randn(1, 2, 4, 8, requires_grad=True)
            out = lk.attention(leaf, leaf, leaf)
        elif op == "looped_blocks":
            inputs = looped_inputs().to(torch.float32)
            leaf = inputs.x.requires_grad_()
            out = lk.looped_blocks(leaf, inputs.blocks, inputs.modulation, 2, num_heads=inputs.num_heads)
        elif op == "head_logits":
            hidden, head = head_case()
            leaf = hidden.requires_grad_()
            out = lk.head_logits(leaf, head)
        else:
            hidden, head = head_case()
            leaf = hidden.requires_grad_()
            rows = torch.arange(4)
            _, out = lk.masked_cross_entropy(
                leaf, head, torch.zeros(2, 6, dtype=torch.int64), rows, torch.ones(4)
            )
        upstream = torch.randn_like(out)
        (want,) = torch.autograd.grad(out, leaf, upstream, retain_graph=op != "masked_cross_entropy")
        if op == "masked_cross_entropy":
            _, out = lk.masked_cross_entropy(
                leaf, head, torch.zeros(2, 6, dtype=torch.int64), rows, torch.ones(4)
            )
        (got,) = torch.autograd.grad(out, leaf, negative(upstream))
        assert torch.equal(got, want), op


def test_rows_with_the_negative_bit_choose_the_targets_that_are_checked(backend):
    """PyTorch's own indexing by such a tensor reads the numbers in its memory, here rows -1, -5, ..."""
    hidden, head = head_case()
    rows = torch.tensor([1, 5, 7])
    targets = torch.full((2, 6), -100)
    targets.view(-1)[rows] = torch.tensor([3, 4, 5])
    want = lk.masked_cross_entropy(hidden, head, targets, rows)
    for a, b in zip(lk.masked_cross_entropy(hidden, head, targets, negative(rows)), want, strict=True):
        assert torch.equal(a, b)
    targets.view(-1)[5] = 20
    with pytest.raises(ValueError, match=r"targets: got values in 3\.\.20"):
        lk.masked_cross_entropy(hidden, head, targets, negative(rows))


def test_plain_leaves_other_tensors_alone():
    value = (torch.ones(2), [torch.zeros(1)], 3, None)
    assert checks.plain(value) is value


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.flatten(0, -2).to_sparse_csr(), "sparse_csr"),
        (lambda x: x.to_mkldnn(), "_mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_floats_are_refused(make, kind):
    hidden, head = head_case()
    with pytest.raises(TypeError, match=f"hidden: got .*{kind}"):
        lk.head_logits(make(hidden), head)
    with pytest.raises(TypeError, match=f"head.weight: got .*{kind}"):
        lk.head_logits(hidden, head._replace(weight=make(head.weight)))
