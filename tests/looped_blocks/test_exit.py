"""looped_blocks: loops of each sequence, and sequences that stop early."""

import pytest
import torch

from tests.looped_blocks.cases import BF16, FLOAT, case, check, run, shrinking, thresholds

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
DTYPE = pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[BF16])


def settling(backend):
    """(inputs, most loops)"""
    if backend.emulated:
        return shrinking(backend, 4, 5, 72, 3, 1, 1), 4
    return shrinking(backend, 6, 10, 48, 3), 8


@DTYPE
def test_loops_of_each_sequence(backend, dtype):
    loops = [3, 1, 4, 1] if backend.emulated else [3, 1, 7, 1, 4]
    sizes, masked = ((9, 32, 2, 1), False) if backend.emulated else ((9, 48, 3), True)
    inputs = case(backend, len(loops), *sizes, per_sequence_modulation=True, key_mask=masked)
    num_loops = torch.tensor(loops, device=backend.device)
    check(inputs, num_loops, dtype)
    if backend.kind == "reference":  # has no kernel whose bits are the same in any batch
        return
    rounded = inputs.to(dtype)
    together = run(rounded, num_loops)
    for number in sorted(set(loops[:3] if backend.emulated else loops))[: 2 if backend.emulated else None]:
        chosen = num_loops == number
        assert torch.equal(together[chosen], run(rounded, number)[chosen])


@DTYPE
def test_exit(backend, dtype):
    inputs, most = settling(backend)
    choices = thresholds(inputs, most)[: 1 if backend.emulated else 3]
    assert len(set(choices[0][1])) >= (3 if backend.emulated else 4) and max(choices[0][1]) > most // 3
    for threshold, loops in choices:
        check(inputs, most, dtype, exit_threshold=threshold)
        out, used = run(inputs.to(dtype), most, exit_threshold=threshold)
        assert used.tolist() == loops
        assert torch.equal(out, run(inputs.to(dtype), used))


@DTYPE
def test_exit_with_limits_of_each_sequence(backend, dtype):
    inputs, most = settling(backend)
    threshold, loops = thresholds(inputs, most)[0]
    limits = torch.tensor([1, 4, 2, 3] if backend.emulated else [1, 8, 2, 5, 3, 8], device=backend.device)
    if not backend.emulated:
        check(inputs, limits, dtype, exit_threshold=threshold)
    _, used = run(inputs.to(dtype), limits, exit_threshold=threshold)
    assert used.tolist() == [min(pair) for pair in zip(limits.tolist(), loops, strict=True)]


@pytest.mark.backends("cpu", "triton")
def test_exit_at_once_and_never(backend):
    inputs, _ = settling(backend)
    inputs, most = inputs.to(FLOAT), 2 if backend.emulated else 5
    out, used = run(inputs, most, exit_threshold=0.0)
    assert used.tolist() == [most] * len(used) and torch.equal(out, run(inputs, most))
    out, used = run(inputs, most, exit_threshold=float("inf"))
    assert used.tolist() == [1] * len(used) and torch.equal(out, run(inputs, 1))


@pytest.mark.backends("triton")
def test_max_loops_spares_reading_the_loops(backend, monkeypatch):
    inputs = settling(backend)[0].to(BF16)
    limits = torch.tensor([1, 3, 2, 1], device=backend.device)
    out = run(inputs, limits)

    def read(self):
        raise AssertionError("loops were read")

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    monkeypatch.setattr("loopmdm_kernels.ops.checks.can_read", lambda value: False)
    assert torch.equal(run(inputs, limits, max_loops=4), out)
