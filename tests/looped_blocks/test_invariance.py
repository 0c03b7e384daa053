"""looped_blocks: a sequence is its own, in any batch, on any threads, from any layout, beside NaN."""

import pytest
import torch

from loopmdm_kernels.testing import looped_inputs
from loopmdm_kernels.types import BlockWeights, Rotary
from tests.looped_blocks.cases import BF16, FLOAT, case, check, part_of, run


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("num_loops", "options"),
    [(3, {}), (3, {"exit_threshold": 0.3}), (torch.tensor([2, 1, 4, 3, 1]), {})],
    ids=["", "exit", "own loops"],
)
def test_a_sequence_is_its_own(backend, dtype, threads, num_loops, options):
    """The same bits alone as in a batch of five, on one, two and three threads, and every time."""
    inputs = looped_inputs(5, 99, 32, 2, per_sequence_modulation=True, key_mask=True).to(dtype)

    def outputs(inputs, num_loops):
        result = run(inputs, num_loops, **options)
        return result if isinstance(result, tuple) else (result,)

    threads(1)
    expected = outputs(inputs, num_loops)
    for number in (1, 2, 3, 3):
        threads(number)
        for got, want in zip(outputs(inputs, num_loops), expected, strict=True):
            assert torch.equal(got, want), number
        for index in range(5):
            one = slice(index, index + 1)
            limit = num_loops if isinstance(num_loops, int) else num_loops[one]
            for got, want in zip(outputs(part_of(inputs, one), limit), expected, strict=True):
                assert torch.equal(got[0], want[index]), (number, index)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("length", [1, 3, 48])
@pytest.mark.parametrize("exits", [False, True], ids=["own loops", "exit"])
def test_short_sequences_are_their_own(backend, dtype, threads, length, exits):
    """Those that go through the products together, leave at different loops and make room for others."""
    batch = 100 if length == 1 else 37
    inputs = looped_inputs(batch, length, 32, 2, per_sequence_modulation=True, key_mask=True).to(dtype)
    size = 0.5 + torch.arange(batch) % 4  # a larger stream changes less
    inputs = inputs._replace(x=inputs.x * size[:, None, None])
    loops = 1 + torch.arange(batch) * 7 % 5
    options = {"exit_threshold": 0.4} if exits else {}

    def outputs(inputs, loops):
        result = run(inputs, loops, **options)
        return result if exits else (result, loops)

    threads(1)
    expected, used = outputs(inputs, loops)
    assert len(used.unique()) > 2
    for number in (2, 3):
        threads(number)
        again, used_again = outputs(inputs, loops)
        assert torch.equal(again, expected) and torch.equal(used_again, used)
    for index in range(0, batch, 9):
        one = slice(index, index + 1)
        alone, _ = outputs(part_of(inputs, one), loops[one])
        assert torch.equal(alone[0], expected[index])


@pytest.mark.backends("cpu")
def test_dropout_on_any_number_of_threads(backend, dtype, threads):
    inputs = looped_inputs(3, 99, 32, 2).to(dtype)
    outputs = []
    for number in (1, 2, 3, 8):
        threads(number)
        outputs.append(run(inputs, 2, dropout=0.2, dropout_seed=5))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.backends("cpu", "triton")
def test_layout_of_arguments(backend):
    """Tensors in any memory layout give the bits of contiguous ones, and are not written to."""
    sizes = (2, 6, 16, 2, 1) if backend.emulated else (3, 10, 32, 2)
    inputs = case(backend, *sizes, key_mask=True, per_sequence_modulation=True).to(FLOAT)
    expected = run(inputs, 2)

    def strided(value):
        """The same values, every other element of memory, axes reversed."""
        axes = tuple(reversed(range(value.ndim)))
        return value.permute(axes).contiguous().repeat_interleave(2, dim=-1)[..., ::2].permute(axes)

    spread = inputs._replace(
        x=strided(inputs.x),
        blocks=[BlockWeights(*(strided(w) for w in block)) for block in inputs.blocks],
        modulation=strided(inputs.modulation),
        rotary=Rotary(*(strided(angle) for angle in inputs.rotary)),
        key_mask=strided(inputs.key_mask),
    )
    assert not spread.x.is_contiguous() and not spread.blocks[0].norm1.is_contiguous()
    before = [value.clone() for value in spread.leaves().values()]
    out = run(spread, 2)
    assert out.is_contiguous() and torch.equal(out, expected)
    run(spread, torch.tensor(range(1, len(out) + 1), device=backend.device) % 3 + 1)
    for value, old in zip(spread.leaves().values(), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16])
def test_nan_stays_in_its_sequence(backend, dtype, threads):
    inputs = looped_inputs(4, 99, 32, 2, per_sequence_modulation=True)
    clean = run(inputs.to(dtype), 2)
    broken = inputs.x.clone()
    broken[1, 98, 3] = float("nan")
    inputs = inputs._replace(x=broken)
    for number in (1, 3):
        threads(number)
        check(inputs, 2, dtype)
        out = run(inputs.to(dtype), 2)
        assert out[1].isnan().all()
        for other in (0, 2, 3):
            assert torch.equal(out[other], clean[other])
    _, used = run(inputs.to(dtype), 3, exit_threshold=float("inf"))
    assert used.tolist() == [1, 3, 1, 1]


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[BF16])
def test_masked_keys_do_not_count(backend, dtype):
    """Whatever stands at a masked position, the others do not see it. NaN stays in its sequence."""
    length, blocks, loops = (20, 1, 2) if backend.emulated else (70, 2, 3)
    few = length * 4 // 7
    inputs = looped_inputs(2, length, 32, 2, blocks)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, few:], mask[1, ::3] = False, False
    inputs = case(backend, 2, length, 32, 2, blocks)._replace(key_mask=mask.to(backend.device)).to(dtype)
    mask = inputs.key_mask
    other = torch.where(mask[:, :, None], inputs.x, inputs.x * -3 + 7)
    first, second = run(inputs, loops), run(inputs._replace(x=other), loops)
    assert torch.equal(first[mask], second[mask])
    if not backend.emulated:
        rotary = Rotary(*(angle[:few] for angle in inputs.rotary))
        shorter = inputs._replace(x=inputs.x[:1, :few], key_mask=None, rotary=rotary)
        atol = 1e-5 if dtype == FLOAT else 1e-2
        torch.testing.assert_close(run(shorter, loops)[0], first[0, :few], rtol=1e-5, atol=atol)
    broken = inputs.x.clone()
    broken[1, 1, 3] = float("nan")
    out, used = run(inputs._replace(x=broken), 2, exit_threshold=float("inf"))
    assert bool(out[1].isnan().all()) and used.tolist() == [1, 2]
    assert torch.equal(out[0], run(inputs, 1)[0])
