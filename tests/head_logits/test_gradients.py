"""Gradients of head_logits: against float64, with frozen leaves, rows in several groups; as an operator."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import loopmdm_kernels as lk
from loopmdm_kernels.testing import (
    assert_head_gradients,
    assert_matches_oracle,
    head_gradients,
    head_inputs,
    reference,
)
from loopmdm_kernels.types import Head
from tests.head_logits.cases import BF16, FLOAT, HALF, case

ALL = pytest.mark.backends("reference", "cpu", "triton")
SMALL = (2, 5, 18, 71)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What torch.empty gives is filled with NaN, so that a number which a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# (B, L, D, V) around the widths of lanes, panels, tiles (192 tokens), chunks (768) and groups (512 rows).
@pytest.mark.by_backend(
    "size",
    reference=[SMALL],
    cpu=[
        (1, 1, 1, 1), (2, 3, 7, 15), (1, 33, 33, 193), (3, 11, 64, 257), (2, 67, 37, 1543), (1, 130, 96, 97),
        (2, 291, 24, 61),
    ],
    triton=[(1, 1, 1, 1), SMALL, (3, 11, 33, 131), (1, 70, 40, 128)],
)  # fmt: skip
@pytest.mark.by_backend(
    "dtypes",
    reference=[(FLOAT, None), (BF16, None)],
    cpu=[(FLOAT, None), (BF16, None), (FLOAT, BF16)],
    triton=[(FLOAT, None), (BF16, None), (HALF, None), (FLOAT, BF16)],
)
def test_gradients(backend, size, dtypes):
    dtype, compute_dtype = dtypes
    assert_head_gradients(lk.head_logits, *case(backend, size, dtype), compute_dtype=compute_dtype)


@ALL
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_one_modulation(backend, dtype):
    assert_head_gradients(lk.head_logits, *case(backend, (3, 7, 40, 70), dtype, per_sequence=False))


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[FLOAT])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4)], ids=str)
def test_frozen_leaves(backend, wanted, dtype):
    inputs = case(backend, SMALL if backend.emulated else (2, 21, 40, 301), dtype)
    everything, some = (head_gradients(lk.head_logits, *inputs, wanted=each) for each in (range(5), wanted))
    for index, (one, other) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (one is not None) == (index in wanted)
        assert one is None or torch.equal(one, other)


@pytest.mark.backends("triton")
def test_rows_in_groups(backend, monkeypatch):
    from loopmdm_kernels.triton import head as module

    monkeypatch.setattr(module, "_GROUP_ELEMENTS", 1)
    assert module.rows_at_once(71, 300) == 128
    assert_head_gradients(lk.head_logits, *case(backend, (2, 150, 18, 71)))


@pytest.mark.backends("cpu")
def test_bits_do_not_depend_on_threads(backend, dtype, threads):
    inputs, results = case(backend, (2, 300, 40, 2001), dtype), []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(head_gradients(lk.head_logits, *inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.by_backend(
    "dtypes",
    reference=[(FLOAT, None)],
    cpu=[(FLOAT, None), (BF16, None), (FLOAT, BF16)],
    triton=[(FLOAT, None)],
)
def test_rows_without_gradients(backend, dtypes):
    """As MDLM's loss leaves them: zeros of both signs in most rows, in one all but the last number."""
    dtype, compute_dtype = dtypes
    size = SMALL if backend.emulated else (2, 301, 24, 131)
    hidden, head = case(backend, size, dtype)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(*size[:2], size[3], generator=generator).to(backend.device, compute_dtype or dtype)
    zero = torch.rand(size[:2], generator=generator) < 0.7
    zero[0, 0], zero[-1, -1] = True, False
    grad[zero.to(backend.device)] *= 0.0
    grad[-1, -1, :-1] = 0.0

    def results(op, kind=None, **options):
        leaves = [t.to(kind or t.dtype).detach().requires_grad_() for t in (hidden, *head.tensors)]
        logits = op(leaves[0], Head(*leaves[1:]), **options)
        return torch.autograd.grad(logits, leaves, grad.to(logits.dtype))

    options = {"compute_dtype": compute_dtype}
    out, baseline = results(lk.head_logits, **options), results(reference.head_logits, **options)
    oracle = results(reference.head_logits, torch.float64)
    for name, *values in zip(("hidden", *Head._fields), out, baseline, oracle, strict=False):
        assert_matches_oracle(*values, name=name)
    assert torch.equal(out[0][zero.to(backend.device)], torch.zeros_like(out[0][zero.to(backend.device)]))


@ALL
def test_no_row_has_a_gradient(backend):
    hidden, head = case(backend, SMALL)
    leaves = [t.requires_grad_() for t in (hidden, *head.tensors)]
    logits = lk.head_logits(hidden, head)
    for found in torch.autograd.grad(logits, leaves, torch.zeros_like(logits)):
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("tokens", [1, 2, 3, 2047, 2049])
def test_a_gradient_anywhere_in_a_row_is_seen(backend, dtype, tokens):
    """Of a row as long as what is looked through at a time, and of one that ends within a word."""
    hidden, head = case(backend, (1, 4, 8, tokens), dtype)
    logits = lk.head_logits(hidden.requires_grad_(), head)
    for token in {0, tokens // 2, tokens - 1}:
        grad = torch.zeros_like(logits)
        grad[0, 2, token] = 1e-30
        (found,) = torch.autograd.grad(logits, hidden, grad, retain_graph=True)
        assert found.any(-1).flatten().tolist() == [False, False, True, False]


@ALL
def test_strides(backend):
    hidden, head = case(backend, (2, 9, 24, 70))
    strided = (hidden.mT.contiguous().mT, head._replace(weight=head.weight.T.contiguous().T))
    for one, other in zip(
        head_gradients(lk.head_logits, *strided), head_gradients(lk.head_logits, hidden, head), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    logits = lk.head_logits(hidden.requires_grad_(), head)
    ones = torch.ones_like(logits)
    every_other = torch.ones(2, 9, 140, device=backend.device)[..., ::2]
    first, second = (
        torch.autograd.grad(logits, hidden, grad, retain_graph=True)[0] for grad in (every_other, ones)
    )
    assert torch.equal(first, second)


@ALL
def test_nan_stays_in_its_row_and_column(backend):
    hidden, head = case(backend, (1, 5, 16, 300))
    head.weight.requires_grad_()
    logits = lk.head_logits(hidden.requires_grad_(), head)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(backend.device)
    grad[0, 2, 70] = float("nan")
    of_hidden, of_weight = torch.autograd.grad(logits, (hidden, head.weight), grad)
    assert of_hidden.isnan().all(-1)[0].tolist() == [False, False, True, False, False]
    assert of_weight.isnan().any(-1).nonzero().flatten().tolist() == [70]


def test_gradcheck_of_the_reference():
    hidden, head = head_inputs(2, 3, 5, 7, per_sequence_modulation=True)
    leaves = [t.requires_grad_() for t in (hidden, *head[:4])]
    assert torch.autograd.gradcheck(lambda x, *rest: lk.head_logits(x, Head(*rest)), leaves, fast_mode=True)


@pytest.mark.by_backend("dtype", best=[FLOAT, BF16], triton=[FLOAT])
def test_compiled(backend, dtype):
    inputs = case(backend, SMALL, dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lk.head_logits, fullgraph=True, backend=counter)
    out = head_gradients(compiled, *inputs)
    expected = head_gradients(lk.head_logits, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    frozen = head_gradients(compiled, *inputs, wanted=(2,))
    assert torch.equal(frozen[3], expected[3])
    names = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert any("loopmdm.head_logits" in name for name in names)


@pytest.mark.parametrize("dtype", [FLOAT, torch.float64])
def test_operator(dtype):
    hidden, head = head_inputs(2, 3, 8, 11, per_sequence_modulation=True)
    norm, weight, bias, modulation = (t.to(dtype).requires_grad_() for t in head[:4])
    arguments = (hidden.to(dtype).requires_grad_(), norm, weight, None, bias, modulation, dtype)
    torch.library.opcheck(torch.ops.loopmdm.head_logits, arguments)


@ALL
def test_operator_backward(backend):
    hidden, head = case(backend, (2, 5, 16, 33))
    grad = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0)).to(backend.device)
    arguments = ([grad], (True, True, True, True, False), hidden, *head[:2], None, *head[2:4], FLOAT)
    out = torch.ops.loopmdm.head_logits_backward(*arguments)
    assert out[-1].numel() == 0
    leaves = [t.requires_grad_() for t in (hidden, *head.tensors)]
    expected = torch.autograd.grad(reference.head_logits(hidden, head), leaves, grad)
    for name, one, other in zip(("hidden", *Head._fields), out[:-1], expected, strict=False):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5, msg=name)
