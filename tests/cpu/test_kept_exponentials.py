"""What masked_cross_entropy keeps for its backward pass: the same bits whatever the share; for how long."""

import gc
import weakref

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.cpu import head as shared
from loopmdm_kernels.cpu import masked_cross_entropy as cpu
from loopmdm_kernels.testing import LEAVES
from loopmdm_kernels.testing import cross_entropy_results as run
from loopmdm_kernels.types import Head
from tests.conftest import Backend
from tests.masked_cross_entropy.cases import BF16, FLOAT, assert_same, check
from tests.masked_cross_entropy.cases import case as sized_case

masked_cross_entropy = lk.use_backend("cpu")(lk.masked_cross_entropy)


def case(width=48, vocab_size=389, num_rows=40, dtype=FLOAT):
    return sized_case(Backend("best"), dtype, (width, vocab_size, num_rows))


@pytest.fixture
def memories(monkeypatch):
    """The tensors that weight gradients are written to, filled with NaN when they are made."""
    made = []
    make = cpu.weight_gradient_memory

    def spy(*args):
        memory = make(*args)
        memory.view(torch.uint8).fill_(255)
        made.append(memory)
        return memory

    for module in (cpu, shared):
        monkeypatch.setattr(module, "weight_gradient_memory", spy)
    return made


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of the kernel's forward pass."""
    seen = []
    forward = _C.masked_cross_entropy

    def spy(**arguments):
        seen.append(arguments)
        forward(**arguments)

    monkeypatch.setattr(_C, "masked_cross_entropy", spy)
    return seen


def keep_nothing(monkeypatch):
    for name in ("masked_cross_entropy", "masked_cross_entropy_backward"):
        kernel = getattr(_C, name)
        monkeypatch.setattr(
            _C, name, lambda kernel=kernel, **arguments: kernel(**{**arguments, "exponentials": None})
        )


def loss_of(leaves, targets, rows, excluded_token):
    hidden, norm, weight, bias, modulation, row_weights = leaves.values()
    head = Head(norm, weight, bias, modulation, excluded_token)
    return masked_cross_entropy(hidden, head, targets, rows, row_weights)


@pytest.mark.parametrize("width", [3, 130, 320])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("compute_dtype", [FLOAT, BF16])
def test_the_share_changes_no_bits(isa, monkeypatch, memories, width, dtype, compute_dtype):
    inputs = case(width, 1544, 150, dtype)
    kept = []
    backward = _C.masked_cross_entropy_backward

    def spy(**arguments):
        kept.append(int((~memories[0].flatten().view(compute_dtype).isnan()).sum()) / 1544)
        backward(**arguments)

    monkeypatch.setattr(_C, "masked_cross_entropy_backward", spy)
    out = run(masked_cross_entropy, *inputs, compute_dtype=compute_dtype)
    # Whole panels of 8 to 64 rows; 150 rows are at most 160 with the padding.
    room = memories[0][0].nbytes // compute_dtype.itemsize
    low, high = (150, 160) if room >= 160 else (8, room) if room >= 64 else (0, 0)
    assert low <= kept[0] <= high
    keep_nothing(monkeypatch)
    assert_same(out, run(masked_cross_entropy, *inputs, compute_dtype=compute_dtype))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_only_the_first_group_of_rows_is_kept(isa, monkeypatch, dtype):
    inputs = case(600, 211, _C.CROSS_ENTROPY_GROUP_ROWS + 70, dtype)
    out = run(masked_cross_entropy, *inputs)
    keep_nothing(monkeypatch)
    assert_same(out, run(masked_cross_entropy, *inputs))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_values_where_all_is_kept(isa, dtype):
    with lk.use_backend("cpu"):
        check(Backend("best"), case(320, 1544, 150, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_the_backward_pass_reads_what_was_kept(isa, memories, dtype):
    leaves, targets, rows, excluded = case(320, 1544, 150, dtype)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    total, _ = loss_of(leaves, targets, rows, excluded)
    memories[0].zero_()
    total.backward()
    targeted = torch.zeros(1544, dtype=torch.bool)
    targeted[targets.flatten()[rows]] = True
    assert torch.equal(leaves["bias"].grad != 0, targeted)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_backward_twice(isa, memories, dtype):
    leaves, targets, rows, excluded = case(320, 389, 150, dtype)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    total, _ = loss_of(leaves, targets, rows, excluded)
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    before = [grad.clone() for grad in first]
    second = torch.autograd.grad(total, list(leaves.values()))
    assert len(memories) == 2
    for name, *grads in zip(LEAVES, before, first, second, strict=True):
        assert all(torch.equal(grads[0], grad) for grad in grads), name


def test_the_gradient_takes_the_memory_over(memories):
    leaves, targets, rows, excluded = case()
    leaves["weight"].requires_grad_()
    total, _ = loss_of(leaves, targets, rows, excluded)
    address = memories.pop().data_ptr()  # autograd copies a gradient that somebody else refers to
    total.backward()
    assert leaves["weight"].grad.data_ptr() == address
    assert not memories


def test_a_loss_without_a_backward_pass_frees_its_memory(memories):
    leaves, targets, rows, excluded = case()
    leaves["weight"].requires_grad_()
    total, nll = loss_of(leaves, targets, rows, excluded)
    memory = weakref.ref(memories.pop())
    gc.collect()
    assert memory() is not None
    del total, nll
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize(
    ("wanted", "grad", "tops"), [(LEAVES, False, False), ((), True, False), (("hidden",), True, True)]
)
def test_nothing_is_kept_for_gradients_that_nobody_wants(calls, memories, wanted, grad, tops):
    leaves, targets, rows, excluded = case()
    for name in wanted:
        leaves[name].requires_grad_()
    with torch.set_grad_enabled(grad):
        total, nll = loss_of(leaves, targets, rows, excluded)
    assert total.requires_grad == nll.requires_grad == tops
    assert calls[0]["exponentials"] is None and not memories
    assert (calls[0]["tile_largest"] is not None) == tops


def test_a_compiled_loss_keeps_nothing_between_its_passes(calls):
    inputs = case()
    with lk.use_backend("cpu"):
        expected = run(lk.masked_cross_entropy, *inputs)
        calls.clear()
        compiled = torch.compile(lk.masked_cross_entropy, fullgraph=True, backend="aot_eager")
        out = run(compiled, *inputs)
    assert_same(out, expected)
    forward, again = calls  # the second one belongs to the backward pass
    assert forward["exponentials"] is None and forward["tile_largest"] is None
    assert again["exponentials"] is not None
