"""Gradients of head_logits on the CPU: every instruction set against float64; invariances; as an operator."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import loopmdm_kernels as lk
from loopmdm_kernels import _C, reference
from loopmdm_kernels.testing import assert_head_gradients, head_gradients, head_inputs
from loopmdm_kernels.types import Head

BF16, FLOAT = torch.bfloat16, torch.float32
ISAS = _C.usable_cpu_isas().split(", ")

# (B, L, D, V) around the widths of lanes, panels, tiles (192 tokens), chunks (768) and groups (512 rows).
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 7, 15),
    (1, 33, 33, 193),
    (3, 11, 64, 257),
    (2, 67, 37, 1543),
    (1, 130, 96, 97),
    (2, 291, 24, 61),
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What torch.empty gives is filled with NaN, so that a number which a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(size, dtype=FLOAT, *, per_sequence=True):
    hidden, head = head_inputs(*size, per_sequence_modulation=per_sequence)
    return hidden.float(), Head(*(t.to(dtype) for t in head[:4]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "compute_dtype"), [(FLOAT, None), (BF16, None), (FLOAT, BF16)])
def test_gradients(monkeypatch, isa, size, dtype, compute_dtype):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", isa)
    with lk.use_backend("cpu"):
        assert_head_gradients(lk.head_logits, *case(size, dtype), compute_dtype=compute_dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_one_modulation(dtype):
    with lk.use_backend("cpu"):
        assert_head_gradients(lk.head_logits, *case((3, 7, 40, 70), dtype, per_sequence=False))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4)])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_frozen_leaves(wanted, dtype):
    inputs = case((2, 21, 40, 301), dtype)
    with lk.use_backend("cpu"):
        everything = head_gradients(lk.head_logits, *inputs)
        some = head_gradients(lk.head_logits, *inputs, wanted=wanted)
    for index, (one, other) in enumerate(zip(some[1:], everything[1:], strict=True)):
        assert (one is not None) == (index in wanted)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_bits_do_not_depend_on_threads(dtype):
    inputs = case((2, 300, 40, 2001), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            with lk.use_backend("cpu"):
                results.append(head_gradients(lk.head_logits, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides():
    hidden, head = case((2, 9, 24, 70))
    strided = (hidden.mT.contiguous().mT, head._replace(weight=head.weight.T.contiguous().T))
    with lk.use_backend("cpu"):
        for one, other in zip(
            head_gradients(lk.head_logits, *strided),
            head_gradients(lk.head_logits, hidden, head),
            strict=True,
        ):
            assert torch.equal(one, other)
        logits = lk.head_logits(hidden.requires_grad_(), head)
        every_other = torch.ones(2, 9, 140)[..., ::2]
        ones = torch.ones_like(logits)
        first, second = (
            torch.autograd.grad(logits, hidden, grad, retain_graph=True)[0] for grad in (every_other, ones)
        )
    assert torch.equal(first, second)


def test_nan_stays_in_its_row_and_column():
    hidden, head = case((1, 5, 16, 300))
    head.weight.requires_grad_()
    with lk.use_backend("cpu"):
        logits = lk.head_logits(hidden.requires_grad_(), head)
        grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        grad[0, 2, 70] = float("nan")
        of_hidden, of_weight = torch.autograd.grad(logits, (hidden, head.weight), grad)
    assert of_hidden.isnan().all(-1)[0].tolist() == [False, False, True, False, False]
    assert of_weight.isnan().any(-1).nonzero().flatten().tolist() == [70]


def test_gradcheck_of_the_reference():
    hidden, head = head_inputs(2, 3, 5, 7, per_sequence_modulation=True)
    leaves = [t.requires_grad_() for t in (hidden, *head[:4])]
    assert torch.autograd.gradcheck(lambda x, *rest: lk.head_logits(x, Head(*rest)), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_compiled(dtype):
    inputs = case((2, 9, 24, 70), dtype)
    counter = CompileCounterWithBackend("aot_eager")
    with lk.use_backend("cpu"):
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


def test_operator_backward_on_every_backend():
    hidden, head = case((2, 5, 16, 33))
    grad = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    arguments = (grad, (True, True, True, True, False), hidden, *head[:2], None, *head[2:4], FLOAT)
    for backend in ("reference", "cpu"):
        with lk.use_backend(backend):
            out = torch.ops.loopmdm.head_logits_backward(*arguments)
        assert out[-1].numel() == 0
        expected = reference.head_logits_backward(grad, hidden, head, (True,) * 5)
        for name, one, other in zip(("hidden", *Head._fields), out[:-1], expected, strict=False):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5, msg=name)
