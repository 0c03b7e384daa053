"""looped_blocks in Triton: values in several sizes and with all options, loops of each sequence, exits."""

import itertools

import pytest
import torch

from loopmdm_kernels import reference
from loopmdm_kernels.testing import looped_inputs
from tests.triton.looped_cases import check, on, run

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)


def inputs_on(device, *sizes, **options):
    return on(looped_inputs(*sizes, **options), device)


@DTYPES
def test_loops(device, dtype):
    check(inputs_on(device, 2, 19, 48, 3, 2, 2, per_sequence_modulation=True, key_mask=True), 2, dtype)


@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads", "mlp_ratio"),
    [(1, 1, 12, 1, 1), (3, 5, 20, 2, 3), (1, 40, 132, 2, 2), (2, 32, 64, 1, 4)],
)
def test_sizes(device, batch, length, hidden, heads, mlp_ratio):
    inputs = inputs_on(
        device, batch, length, hidden, heads, 1, mlp_ratio, rotary=False, per_sequence_modulation=True
    )
    check(inputs, 2, BF16)


@pytest.mark.parametrize(("weights", "computed"), [(FLOAT, BF16), (BF16, FLOAT)])
def test_dtypes_of_weights(device, weights, computed):
    check(inputs_on(device, 1, 10, 24, 2, 1), 2, computed, weights=weights)


def test_large_residual_stream(device):
    """The stream is kept in fp32, and its moments are not lost to cancellation."""
    inputs = inputs_on(device, 1, 9, 80, 4, 1)
    check(inputs._replace(x=inputs.x * 100 + 1000), 2, FLOAT)


def test_loops_of_each_sequence(device):
    inputs = inputs_on(device, 4, 9, 32, 2, 1, per_sequence_modulation=True)
    num_loops = torch.tensor([3, 1, 4, 1], device=device)
    check(inputs, num_loops, BF16)
    rounded = inputs.to(BF16)
    together = run(rounded, num_loops)
    for loops in (1, 3):
        chosen = num_loops == loops
        assert torch.equal(together[chosen], run(rounded, loops)[chosen])


def shrinking(device):
    """Streams of different size, to which the blocks add little: sequences settle at different loops."""
    inputs = looped_inputs(4, 5, 72, 3, 1, 1, per_sequence_modulation=True)
    scales = torch.logspace(-0.5, 0.2, 4, dtype=torch.float64)
    inputs.modulation[:, :, [2, 5]] *= 0.5
    return on(inputs._replace(x=inputs.x * scales[:, None, None]), device)


def best_threshold(inputs, num_loops):
    """A threshold well between the relative changes in float64 that tells most sequences apart."""
    states = [inputs.x] + [run(inputs, n, reference.looped_blocks) for n in range(1, num_loops + 1)]
    changes = torch.stack(
        [
            (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
            for old, new in itertools.pairwise(states)
        ]
    )
    choices = []
    for low, high in itertools.pairwise(changes.flatten().sort().values.tolist()):
        if high > 1.03 * low:
            threshold = (low * high) ** 0.5
            below = torch.cat((changes < threshold, torch.ones_like(changes[:1], dtype=torch.bool)))
            choices.append(((below.int().argmax(dim=0) + 1).clamp(max=num_loops).tolist(), threshold))
    return max(choices, key=lambda choice: len(set(choice[0])))


def test_exit(device):
    inputs, dtype = shrinking(device), BF16
    loops, threshold = best_threshold(inputs, 4)
    assert len(set(loops)) >= 3
    check(inputs, 4, dtype, exit_threshold=threshold)
    out, used = run(inputs.to(dtype), 4, exit_threshold=threshold)
    assert used.tolist() == loops
    assert torch.equal(out, run(inputs.to(dtype), used))
    limits = torch.tensor([1, 4, 2, 3], device=device)
    _, used = run(inputs.to(dtype), limits, exit_threshold=threshold)
    assert used.tolist() == torch.minimum(limits.cpu(), torch.tensor(loops)).tolist()


def test_max_loops_spares_reading_the_loops(device, monkeypatch):
    inputs = shrinking(device).to(BF16)
    limits = torch.tensor([1, 3, 2, 1], device=device)
    out = run(inputs, limits)

    def read(self):
        raise AssertionError("loops were read")

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    monkeypatch.setattr("loopmdm_kernels.ops.checks.can_read", lambda value: False)
    assert torch.equal(run(inputs, limits, max_loops=4), out)


def test_exit_at_once_and_never(device):
    inputs = shrinking(device).to(FLOAT)
    out, used = run(inputs, 2, exit_threshold=0.0)
    assert used.tolist() == [2] * 4 and torch.equal(out, run(inputs, 2))
    out, used = run(inputs, 2, exit_threshold=float("inf"))
    assert used.tolist() == [1] * 4 and torch.equal(out, run(inputs, 1))


@pytest.mark.parametrize(("dtype", "hidden"), [(FLOAT, 20), (BF16, 68)])
def test_dropout(device, dtype, hidden):
    inputs = inputs_on(device, 2, 9, hidden, 2, 1)
    check(inputs, 2, dtype, dropout=0.3, dropout_seed=(7 << 40) + 11)


def test_masked_keys_and_nan_stay_where_they_are(device):
    """Whatever stands at a masked position, the others do not see it; NaN stays in its sequence."""
    inputs = looped_inputs(2, 20, 32, 2, 1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 12:], mask[1, ::3] = False, False
    inputs = on(inputs._replace(key_mask=mask), device).to(BF16)
    clean = run(inputs, 2)
    other = torch.where(inputs.key_mask[:, :, None], inputs.x, inputs.x * -3 + 7)
    assert torch.equal(clean[inputs.key_mask], run(inputs._replace(x=other), 2)[inputs.key_mask])
    broken = inputs.x.clone()
    broken[1, 1, 3] = float("nan")
    out, used = run(inputs._replace(x=broken), 2, exit_threshold=float("inf"))
    assert bool(out[1].isnan().all()) and used.tolist() == [1, 2]
    assert torch.equal(out[0], run(inputs, 1)[0])


def test_layout_of_arguments(device):
    """Tensors in any memory layout give the bits of contiguous ones."""
    inputs = inputs_on(device, 2, 6, 16, 2, 1, per_sequence_modulation=True).to(FLOAT)

    def strided(value):
        axes = tuple(reversed(range(value.ndim)))
        return value.permute(axes).contiguous().repeat_interleave(2, dim=-1)[..., ::2].permute(axes)

    spread = inputs._replace(
        x=strided(inputs.x),
        blocks=[type(b)(*(strided(w) for w in b)) for b in inputs.blocks],
        modulation=strided(inputs.modulation),
    )
    assert not spread.x.is_contiguous()
    assert torch.equal(run(spread, 2), run(inputs, 2))
