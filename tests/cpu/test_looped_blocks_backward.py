"""Gradients of looped_blocks on the CPU: of every input, kept or recomputed, the same bits on any threads."""

import gc
import sys

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.cpu.looped_blocks import _RecordMemory
from loopmdm_kernels.testing import LoopedInputs, assert_matches_oracle, looped_inputs
from loopmdm_kernels.types import BlockWeights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAMES = len(BlockWeights._fields)


def cpu(*args, **options):
    with lk.use_backend("cpu"):
        return lk.looped_blocks(*args, **options)


def gradients(inputs: LoopedInputs, num_loops, op=cpu, **options):
    """Of x, each weight and the modulation, for a fixed gradient of the result."""
    tensors = {"x": inputs.x, "modulation": inputs.modulation}
    for index, block in enumerate(inputs.blocks):
        tensors |= {f"blocks[{index}].{name}": w for name, w in block._asdict().items()}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    weights = list(leaves.values())[2:]
    blocks = [BlockWeights(*weights[i : i + NAMES]) for i in range(0, len(weights), NAMES)]
    arguments = {
        "num_heads": inputs.num_heads,
        "rotary": inputs.rotary,
        "key_mask": inputs.key_mask,
        **options,
    }
    out = op(leaves["x"], blocks, leaves["modulation"], num_loops, **arguments)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def check(inputs: LoopedInputs, num_loops, dtype, **options):
    """fp32 parameters, products in `dtype`."""
    rounded = inputs.to(torch.float32)
    options["compute_dtype"] = dtype
    plain = {name: value for name, value in options.items() if name != "recompute"}
    exact = gradients(
        inputs.to(torch.float64), num_loops, reference.looped_blocks, **plain | {"compute_dtype": None}
    )
    baseline = gradients(rounded, num_loops, reference.looped_blocks, **plain)
    for name, grad in gradients(rounded, num_loops, **options).items():
        assert grad.dtype == torch.float32
        assert_matches_oracle(grad, baseline[name], exact[name], name=name)


@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads", "blocks", "loops"),
    [
        (1, 16, 64, 2, 1, 1),
        (2, 37, 64, 4, 2, 3),
        (3, 5, 60, 3, 1, 2),
        (1, 131, 80, 1, 2, 2),
        (2, 1, 48, 2, 1, 2),
        (5, 33, 96, 6, 1, 4),
    ],
)
def test_sizes(isa, dtype, recompute, batch, length, hidden, heads, blocks, loops):
    inputs = looped_inputs(batch, length, hidden, heads, blocks)
    check(inputs, loops, dtype, recompute=recompute)


@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
def test_options(isa, dtype, recompute):
    """A mask, one modulation for all sequences, no positions, dropout."""
    inputs = looped_inputs(3, 21, 64, 2, 2, key_mask=True)
    inputs = inputs._replace(modulation=inputs.modulation[:, :1].contiguous())
    check(inputs, 2, dtype, rotary=None, recompute=recompute)
    check(inputs, 2, dtype, dropout=0.25, dropout_seed=7, recompute=recompute)


@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
def test_loops_of_each_sequence(isa, dtype, recompute):
    check(looped_inputs(3, 18, 64, 2, 2), torch.tensor([1, 3, 2]), dtype, recompute=recompute)


@pytest.mark.parametrize("length", [300, 700])
@DTYPES
def test_more_rows_than_one_task(isa, dtype, length):
    check(looped_inputs(2, length, 64, 1, 1), 1, dtype)


def test_bf16_parameters_get_bf16_gradients(isa):
    """Summed in fp32 and rounded once: within half a step of the gradient of the same fp32 values."""
    inputs = looped_inputs(2, 12, 64, 2, 1).to(torch.bfloat16)
    wide = inputs.to(torch.float32)
    grads = gradients(inputs, 2)
    for name, grad in gradients(wide, 2, compute_dtype=torch.bfloat16).items():
        assert grads[name].dtype == (torch.float32 if name == "x" else torch.bfloat16)
        assert torch.equal(grads[name], grad.to(grads[name].dtype)), name


@DTYPES
def test_same_bits_on_any_number_of_threads(isa, dtype):
    inputs = looped_inputs(3, 70, 64, 2, 2).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(gradients(inputs, 2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_kept_and_recomputed_agree_to_the_bit():
    inputs = looped_inputs(3, 40, 64, 2, 2).to(torch.bfloat16)
    options = {"dropout": 0.1, "dropout_seed": 1}
    kept, again = (gradients(inputs, 3, recompute=recompute, **options) for recompute in (False, True))
    assert torch.equal(kept["x"], again["x"])
    for name in kept:  # sums over loops are grouped alike
        assert torch.equal(kept[name], again[name]), name


def test_gradient_of_x_does_not_depend_on_the_batch():
    inputs = looped_inputs(4, 40, 64, 2, 1).to(torch.bfloat16)
    together = gradients(inputs, 2)["x"]
    grad = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(3))
    for i in range(4):
        x = inputs.x[i : i + 1].clone().requires_grad_()
        modulation = inputs.modulation if inputs.modulation.shape[1] == 1 else inputs.modulation[:, i : i + 1]
        out = cpu(x, inputs.blocks, modulation, 2, num_heads=2, rotary=inputs.rotary)
        (alone,) = torch.autograd.grad(out, x, grad[i : i + 1])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize(("batch", "length"), [(67, 1), (21, 5)])
@DTYPES
def test_short_sequences_in_one_product(isa, dtype, batch, length):
    """Gradients over rows of many sequences that stop at different loops, and of x as each has it alone."""
    inputs = looped_inputs(batch, length, 32, 2, 2, per_sequence_modulation=True, key_mask=True)
    loops = 1 + torch.arange(batch) % 3
    for recompute in (False, True):
        check(inputs, loops, dtype, recompute=recompute)
    inputs = inputs.to(dtype, requires_grad=True)

    def of_x(part):
        out = cpu(
            inputs.x[part],
            inputs.blocks,
            inputs.modulation[:, part],
            loops[part],
            num_heads=2,
            rotary=inputs.rotary,
            key_mask=inputs.key_mask[part],
        )
        return torch.autograd.grad(out.square().sum(), inputs.x)[0][part]

    together = of_x(slice(None))
    for index in range(0, batch, 5):
        assert torch.equal(of_x(slice(index, index + 1))[0], together[index])


def test_only_inputs_that_need_gradients():
    inputs = looped_inputs(1, 9, 32, 2, 1).to(torch.float32)
    x = inputs.x.clone().requires_grad_()
    out = cpu(x, inputs.blocks, inputs.modulation, 2, num_heads=2)
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert all(w.grad is None for block in inputs.blocks for w in block)


def test_compiled_training_step():
    inputs = looped_inputs(2, 9, 32, 2, 1).to(torch.float32)
    x = inputs.x.clone().requires_grad_()

    def loss(x):
        return lk.looped_blocks(x, inputs.blocks, inputs.modulation, 2, num_heads=2).square().sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_what_the_kernels_cannot_do_is_said():
    inputs = looped_inputs(1, 9, 32, 2, 1)
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="x must be float32"):
        run = inputs.to(torch.float64)
        lk.looped_blocks(run.x, run.blocks, run.modulation, 1, num_heads=2)
    run = inputs.to(torch.float32)
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="same number of loops"):
        lk.looped_blocks(run.x, run.blocks, run.modulation, 1, num_heads=2, dropout=0.1, exit_threshold=0.1)


@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
def test_sequences_that_stop_early(isa, dtype, recompute):
    """No sequence uses all the loops that were allowed."""
    inputs = looped_inputs(3, 18, 64, 2, 2)
    options = {"exit_threshold": 0.75, "rotary": inputs.rotary}
    _, used = cpu(
        inputs.x.float(),
        inputs.to(torch.float32).blocks,
        inputs.modulation.float(),
        9,
        num_heads=2,
        **options,
    )
    assert int(used.max()) < 9
    check(inputs, 9, dtype, exit_threshold=0.75, recompute=recompute)


def test_no_memory_for_the_records(monkeypatch):
    """The error is the allocation's alone."""
    after = []
    monkeypatch.setattr(sys, "unraisablehook", after.append)
    with pytest.raises(RuntimeError, match="alloc"):
        _RecordMemory((1 << 60,))
    gc.collect()
    assert not after
