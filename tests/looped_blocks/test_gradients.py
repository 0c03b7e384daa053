"""looped_blocks: gradients of every input against float64, kept or recomputed."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import looped_inputs
from tests.looped_blocks.cases import BF16, FLOAT, HALF, call, case, check_gradients, gradients, part_of, run

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True])


def of(sizes, dtypes, recompute=(False, True), **options):
    """(sizes, loops, dtype, recompute, options), each with each."""
    return [(*size, dtype, again, options) for size in sizes for dtype in dtypes for again in recompute]


ALL_OPTIONS = {"per_sequence_modulation": True, "key_mask": True, "mlp_ratio": 2}
ODD = [((1, 1, 24, 1, 1), 2), ((2, 33, 20, 2, 1), 2), ((1, 40, 68, 1, 1), 2)]


@pytest.mark.by_backend(
    "given",
    reference=of([((2, 37, 64, 4, 2), 3)], (FLOAT, BF16), (False,)),
    cpu=of(
        [
            ((1, 16, 64, 2, 1), 1),
            ((2, 37, 64, 4, 2), 3),
            ((3, 5, 60, 3, 1), 2),
            ((1, 131, 80, 1, 2), 2),
            ((2, 1, 48, 2, 1), 2),
            ((5, 33, 96, 6, 1), 4),
        ],
        (FLOAT, BF16),
    ),
    triton=of([((2, 9, 48, 3, 1), 2)], (FLOAT, HALF), (True,), **ALL_OPTIONS)
    + of([((2, 9, 48, 3, 2), 2)], (BF16,), (True,), **ALL_OPTIONS)
    + of(ODD, (BF16,), (False,), mlp_ratio=2),
)
def test_sizes(backend, given):
    sizes, loops, dtype, recompute, options = given
    check_gradients(case(backend, *sizes, **options), loops, dtype, recompute=recompute)


@pytest.mark.by_backend("dtype", reference=[FLOAT, BF16, HALF], cpu=[FLOAT, BF16])
def test_parameters_of_the_dtype(backend, dtype):
    inputs = case(backend, key_mask=True)
    check_gradients(inputs, 3, dtype, weights=dtype)


@pytest.mark.backends("cpu")
@RECOMPUTE
def test_options(backend, dtype, recompute):
    """A mask, one modulation for all sequences, no positions, dropout."""
    inputs = looped_inputs(3, 21, 64, 2, 2, key_mask=True)
    inputs = inputs._replace(modulation=inputs.modulation[:, :1].contiguous())
    check_gradients(inputs, 2, dtype, rotary=None, recompute=recompute)
    check_gradients(inputs, 2, dtype, dropout=0.25, dropout_seed=7, recompute=recompute)


@pytest.mark.backends("triton")
def test_dropout(backend):
    inputs = case(backend, 2, 5, 32, 2, 1, 1, rotary=False)
    check_gradients(inputs, 2, FLOAT, dropout=0.25, dropout_seed=7)


@pytest.mark.by_backend(
    "given",
    reference=[(FLOAT, False)],
    cpu=[(dtype, again) for dtype in (FLOAT, BF16) for again in (False, True)],
    triton=[(FLOAT, True)],
)
def test_loops_of_each_sequence(backend, given):
    dtype, recompute = given
    inputs = case(backend, 3, 5, 32, 2, 1, 2) if backend.emulated else case(backend, 3, 18, 64, 2, 2)
    check_gradients(inputs, torch.tensor([1, 3, 2], device=backend.device), dtype, recompute=recompute)


@pytest.mark.by_backend(
    "given",
    reference=[(FLOAT, False)],
    cpu=[(dtype, again) for dtype in (FLOAT, BF16) for again in (False, True)],
    triton=[(BF16, False)],
)
def test_sequences_that_stop_early(backend, given):
    """No sequence uses all the loops that were allowed."""
    dtype, recompute = given
    if backend.emulated:
        inputs, most = case(backend, 3, 5, 32, 2, 1, 2, rotary=False), 4
    else:
        inputs, most = case(backend, 3, 18, 64, 2, 2), 9
    _, used = run(inputs.to(FLOAT), most, exit_threshold=0.75)
    assert int(used.max()) < most
    check_gradients(inputs, most, dtype, exit_threshold=0.75, recompute=recompute)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("length", [300, 700])
def test_more_rows_than_one_task(backend, dtype, length):
    check_gradients(looped_inputs(2, length, 64, 1, 1), 1, dtype)


@pytest.mark.backends("cpu", "triton")
def test_bf16_parameters_get_bf16_gradients(backend):
    """Summed over loops in fp32 and rounded once: those of the same values in fp32, rounded."""
    sizes, loops = ((1, 5, 16, 1, 1), 4) if backend.emulated else ((2, 12, 64, 2, 1), 2)
    inputs = case(backend, *sizes).to(BF16)
    grads = gradients(inputs, loops)
    for name, grad in gradients(inputs.to(FLOAT), loops, compute_dtype=BF16).items():
        assert grads[name].dtype == (FLOAT if name == "x" else BF16)
        assert torch.equal(grads[name], grad.to(grads[name].dtype)), name


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[BF16])
def test_kept_and_recomputed_agree_to_the_bit(backend, dtype):
    """Sums over loops are grouped alike."""
    sizes, loops = ((1, 5, 32, 2, 2, 1), 2) if backend.emulated else ((3, 40, 64, 2, 2), 3)
    inputs, options = case(backend, *sizes).to(dtype), {"dropout": 0.1, "dropout_seed": 1}
    kept, again = (gradients(inputs, loops, recompute=recompute, **options) for recompute in (False, True))
    for name, grad in kept.items():
        assert grad.dtype == (FLOAT if name == "x" else dtype)
        assert torch.equal(grad, again[name]), name
    if not backend.emulated:
        first, second = (run(inputs, loops, recompute=recompute, **options) for recompute in (False, True))
        assert torch.equal(first, second)


@pytest.mark.backends("cpu")
def test_same_bits_on_any_number_of_threads(backend, dtype, threads):
    inputs, results = looped_inputs(3, 70, 64, 2, 2).to(dtype), []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(gradients(inputs, 2))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.backends("best")
def test_gradient_of_x_does_not_depend_on_the_batch(backend):
    inputs = looped_inputs(4, 40, 64, 2, 1).to(BF16)
    together = gradients(inputs, 2)["x"]
    grad = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(3))
    for i in range(4):
        part = part_of(inputs, slice(i, i + 1))
        x = part.x.clone().requires_grad_()
        (alone,) = torch.autograd.grad(call(part._replace(x=x), 2), x, grad[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(("batch", "length"), [(67, 1), (21, 5)])
def test_short_sequences_in_one_product(backend, dtype, batch, length):
    """Gradients over rows of many sequences that stop at different loops, and of x as each has it alone."""
    inputs = looped_inputs(batch, length, 32, 2, 2, per_sequence_modulation=True, key_mask=True)
    loops = 1 + torch.arange(batch) % 3
    for recompute in (False, True):
        check_gradients(inputs, loops, dtype, recompute=recompute)
    inputs = inputs.to(dtype, requires_grad=True)

    def of_x(part):
        out = call(part_of(inputs, part), loops[part])
        return torch.autograd.grad(out.square().sum(), inputs.x)[0][part]

    together = of_x(slice(None))
    for index in range(0, batch, 5):
        assert torch.equal(of_x(slice(index, index + 1))[0], together[index])


@pytest.mark.backends("reference", "best")
def test_only_inputs_that_need_gradients(backend):
    inputs = looped_inputs(1, 9, 32, 2, 1).to(FLOAT)
    x = inputs.x.clone().requires_grad_()
    call(inputs._replace(x=x), 2).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert all(w.grad is None for block in inputs.blocks for w in block)


@pytest.mark.backends("best")
def test_compiled_training_step(backend):
    inputs = looped_inputs(2, 9, 32, 2, 1).to(FLOAT)
    x = inputs.x.clone().requires_grad_()

    def loss(x):
        return lk.looped_blocks(x, inputs.blocks, inputs.modulation, 2, num_heads=2).square().sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
