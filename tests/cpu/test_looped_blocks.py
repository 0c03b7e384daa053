"""looped_blocks on the CPU: values in all sizes and options; the same bits in any batch on any threads."""

import itertools
import random

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.testing import LoopedInputs, assert_matches_oracle, error_over_loops, looped_inputs
from loopmdm_kernels.types import BlockWeights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def cpu(*args, **options):
    """The op, which must be done by the CPU kernels."""
    with torch.no_grad(), lk.use_backend("cpu"):
        return lk.looped_blocks(*args, **options)


def run(inputs: LoopedInputs, num_loops, op=cpu, **options):
    arguments = {
        "num_heads": inputs.num_heads,
        "rotary": inputs.rotary,
        "key_mask": inputs.key_mask,
        **options,
    }
    return op(inputs.x, inputs.blocks, inputs.modulation, num_loops, **arguments)


def narrow_mlp(inputs: LoopedInputs, width: int) -> LoopedInputs:
    """The same with the first `width` columns of the MLP."""
    return inputs._replace(
        blocks=[
            b._replace(
                mlp_in=b.mlp_in[:width], mlp_in_bias=b.mlp_in_bias[:width], mlp_out=b.mlp_out[:, :width]
            )
            for b in inputs.blocks
        ]
    )


def check(inputs: LoopedInputs, num_loops, dtype, *, weights=None, **options):
    """Compares with float64; `weights`: their dtype if not that of the computation."""
    rounded = inputs.to(weights or dtype)
    options["compute_dtype"] = dtype
    exact = run(
        inputs.to(torch.float64), num_loops, reference.looped_blocks, **{**options, "compute_dtype": None}
    )
    baseline = run(rounded, num_loops, reference.looped_blocks, **options)
    out = run(rounded, num_loops, **options)
    if "exit_threshold" in options:
        assert out[1].dtype == torch.int64
        assert out[1].tolist() == exact[1].tolist()
        assert_matches_oracle(out[0], baseline[0], exact[0])
    else:
        assert_matches_oracle(out, baseline, exact)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@DTYPES
def test_error_over_loops(isa, dtype):
    inputs = looped_inputs(batch=1, length=11, hidden=48, num_heads=3, num_blocks=1, key_mask=True)
    for num_loops, error, baseline, step in error_over_loops(cpu, inputs, dtype):
        assert error <= 2 * baseline + step, num_loops


def random_sizes(count):
    generator = random.Random(5)
    for index in range(count):
        hidden = (12, 60, 64, 80, 96, 128, 200)[index % 7]
        heads = generator.choice(
            [h for h in range(1, hidden // 2 + 1) if hidden % (2 * h) == 0 and hidden // h <= 64]
        )
        yield pytest.param(
            generator.randint(1, 3),
            generator.randint(1, 200),
            hidden,
            heads,
            generator.randint(1, 3),
            generator.randint(1, 4 * hidden),
            {
                "per_sequence_modulation": generator.random() < 0.5,
                "rotary": generator.random() < 0.7,
                "key_mask": generator.random() < 0.5,
            },
            id=f"{index}-D{hidden}-H{heads}",
        )


@DTYPES
@pytest.mark.parametrize(
    ("batch", "length", "hidden", "heads", "blocks", "width", "options"), list(random_sizes(14))
)
def test_sizes(isa, dtype, batch, length, hidden, heads, blocks, width, options):
    inputs = looped_inputs(batch, length, hidden, heads, blocks, **options, seed=length)
    check(narrow_mlp(inputs, width), 2, dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [2, 4, 6, 10, 16, 18, 32, 34, 48, 62, 64, 66, 130])
def test_head_sizes(isa, dtype, head_dim):
    check(looped_inputs(2, 37, 2 * head_dim, 2, 1, key_mask=True, seed=head_dim), 2, dtype)


@DTYPES
def test_lengths(isa, dtype):
    """Around the widths of panels and of blocks of rows."""
    for length in (1, 2, 3, 5, 6, 7, 8, 15, 16, 17, 63, 64, 65, 95, 96, 97, 98, 128, 193):
        check(looped_inputs(1, length, 24, 2, 1, seed=length), 1, dtype)


@DTYPES
def test_many_short_sequences(isa, dtype):
    check(looped_inputs(65, 1, 16, 2, per_sequence_modulation=True), 3, dtype)
    check(looped_inputs(65, 3, 16, 2, key_mask=True), 2, dtype)
    check(looped_inputs(7, 31, 36, 6, per_sequence_modulation=True), 2, dtype)
    check(looped_inputs(130, 1, 24, 2), 2, dtype, dropout=0.3, dropout_seed=4)


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32 weights", "bf16 weights"])
def test_dtypes_of_weights(isa, weights, computed):
    check(looped_inputs(2, 20, 40, 4), 3, computed, weights=weights)


@DTYPES
def test_large_scores(isa, dtype):
    """Softmax near one key, scores in the hundreds: sums of exponentials must not overflow."""
    inputs = looped_inputs(2, 70, 64, 2, 1, key_mask=True)
    inputs = inputs._replace(blocks=[b._replace(qkv=b.qkv * 8) for b in inputs.blocks])
    check(inputs, 1, dtype)


@DTYPES
def test_large_residual_stream(isa, dtype):
    """The stream is kept in fp32, and its moments are not lost to cancellation."""
    inputs = looped_inputs(2, 9, 64, 4)
    check(inputs._replace(x=inputs.x * 100 + 1000), 3, dtype)


@DTYPES
def test_loops_of_each_sequence(isa, dtype):
    inputs = looped_inputs(5, 9, 48, 3, per_sequence_modulation=True, key_mask=True)
    num_loops = torch.tensor([3, 1, 7, 1, 4])
    check(inputs, num_loops, dtype)
    rounded = inputs.to(dtype)
    together = run(rounded, num_loops)
    for loops in (1, 3, 4, 7):
        chosen = num_loops == loops
        assert torch.equal(together[chosen], run(rounded, loops)[chosen])


def shrinking(batch=6, length=10):
    """Streams of different size, to which the blocks add little: sequences settle at different loops."""
    inputs = looped_inputs(batch, length, 48, 3, per_sequence_modulation=True)
    scales = torch.logspace(-0.5, 0.2, batch, dtype=torch.float64)
    inputs.modulation[:, :, [2, 5]] *= 0.5
    return inputs._replace(x=inputs.x * scales[:, None, None])


def thresholds(inputs, num_loops):
    """Thresholds well between the relative changes of float64, with the loops after which each stops."""
    states = [inputs.x] + [run(inputs, loops, reference.looped_blocks) for loops in range(1, num_loops + 1)]
    changes = torch.stack(
        [
            (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
            for old, new in itertools.pairwise(states)
        ]
    )
    values = changes.flatten().sort().values
    for low, high in itertools.pairwise(values.tolist()):
        if high > 1.03 * low:
            threshold = (low * high) ** 0.5
            below = torch.cat((changes < threshold, torch.ones(1, changes.shape[1], dtype=torch.bool)))
            yield threshold, (below.int().argmax(dim=0) + 1).clamp(max=num_loops).tolist()


@DTYPES
def test_exit(isa, dtype):
    inputs = shrinking()
    choices = sorted(thresholds(inputs, 8), key=lambda choice: -len(set(choice[1])))[:3]
    assert len(set(choices[0][1])) >= 4 and max(choices[0][1]) > 3
    for threshold, loops in choices:
        check(inputs, 8, dtype, exit_threshold=threshold)
        out, used = run(inputs.to(dtype), 8, exit_threshold=threshold)
        assert used.tolist() == loops
        assert torch.equal(out, run(inputs.to(dtype), used))


@DTYPES
def test_exit_with_limits_of_each_sequence(isa, dtype):
    inputs = shrinking()
    limits = torch.tensor([1, 8, 2, 5, 3, 8])
    threshold, loops = max(thresholds(inputs, 8), key=lambda choice: len(set(choice[1])))
    check(inputs, limits, dtype, exit_threshold=threshold)
    _, used = run(inputs.to(dtype), limits, exit_threshold=threshold)
    assert used.tolist() == torch.minimum(limits, torch.tensor(loops)).tolist()


def test_exit_at_once_and_never(isa):
    inputs = shrinking().to(torch.float32)
    out, used = run(inputs, 5, exit_threshold=0.0)
    assert used.tolist() == [5] * 6 and torch.equal(out, run(inputs, 5))
    out, used = run(inputs, 5, exit_threshold=float("inf"))
    assert used.tolist() == [1] * 6 and torch.equal(out, run(inputs, 1))


@DTYPES
@pytest.mark.parametrize("shape", [(3, 13, 20), (1, 1, 12), (2, 40, 64)])
def test_dropout(isa, dtype, shape):
    inputs = looped_inputs(*shape, 2)
    check(inputs, 3, dtype, dropout=0.3, dropout_seed=(7 << 40) + 11)
    rounded = inputs.to(dtype)
    first = run(rounded, 3, dropout=0.3, dropout_seed=1)
    assert torch.equal(first, run(rounded, 3, dropout=0.3, dropout_seed=1))
    assert not torch.equal(first, run(rounded, 3, dropout=0.3, dropout_seed=2))
    assert torch.equal(run(rounded, 3, dropout_seed=1), run(rounded, 3))


@DTYPES
@pytest.mark.parametrize(
    ("num_loops", "options"),
    [(3, {}), (3, {"exit_threshold": 0.3}), (torch.tensor([2, 1, 4, 3, 1]), {})],
    ids=["", "exit", "own loops"],
)
def test_a_sequence_is_its_own(isa, dtype, threads, num_loops, options):
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
            one = inputs._replace(
                x=inputs.x[index : index + 1],
                modulation=inputs.modulation[:, index : index + 1],
                key_mask=inputs.key_mask[index : index + 1],
            )
            limit = num_loops if isinstance(num_loops, int) else num_loops[index : index + 1]
            for got, want in zip(outputs(one, limit), expected, strict=True):
                assert torch.equal(got[0], want[index]), (number, index)


@DTYPES
@pytest.mark.parametrize("length", [1, 3, 48])
@pytest.mark.parametrize("exits", [False, True], ids=["own loops", "exit"])
def test_short_sequences_are_their_own(isa, dtype, threads, length, exits):
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
        part = inputs._replace(
            x=inputs.x[one], modulation=inputs.modulation[:, one], key_mask=inputs.key_mask[one]
        )
        alone, _ = outputs(part, loops[one])
        assert torch.equal(alone[0], expected[index])


@DTYPES
def test_dropout_on_any_number_of_threads(isa, dtype, threads):
    inputs = looped_inputs(3, 99, 32, 2).to(dtype)
    outputs = []
    for number in (1, 2, 3, 8):
        threads(number)
        outputs.append(run(inputs, 2, dropout=0.2, dropout_seed=5))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_layout_of_arguments(isa):
    """Tensors in any memory layout give the bits of contiguous ones, and are not written to."""
    inputs = looped_inputs(3, 10, 32, 2, key_mask=True, per_sequence_modulation=True).to(torch.float32)
    expected = run(inputs, 2)

    def strided(value):
        """The same values, every other element of memory, axes reversed."""
        axes = tuple(reversed(range(value.ndim)))
        wide = value.permute(axes).contiguous().repeat_interleave(2, dim=-1)
        return wide[..., ::2].permute(axes)

    spread = LoopedInputs(
        strided(inputs.x),
        [BlockWeights(*(strided(w) for w in block)) for block in inputs.blocks],
        strided(inputs.modulation),
        type(inputs.rotary)(*(strided(angle) for angle in inputs.rotary)),
        strided(inputs.key_mask),
        inputs.num_heads,
    )
    assert not spread.x.is_contiguous() and not spread.blocks[0].norm1.is_contiguous()
    before = [value.clone() for value in spread.leaves().values()]
    out = run(spread, 2)
    assert out.is_contiguous() and torch.equal(out, expected)
    for value, old in zip(spread.leaves().values(), before, strict=True):
        assert torch.equal(value, old)


@DTYPES
def test_nan_stays_in_its_sequence(isa, dtype, threads):
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


@DTYPES
def test_masked_keys_do_not_count(isa, dtype):
    """Whatever stands at a masked position, the others do not see it."""
    inputs = looped_inputs(2, 70, 32, 2)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 40:], mask[1, ::3] = False, False
    inputs = inputs._replace(key_mask=mask).to(dtype)
    other = torch.where(mask[:, :, None], inputs.x, inputs.x * -3 + 7)
    first, second = run(inputs, 3), run(inputs._replace(x=other), 3)
    assert torch.equal(first[mask], second[mask])
    shorter = inputs._replace(
        x=inputs.x[:1, :40],
        key_mask=None,
        rotary=type(inputs.rotary)(*(angle[:40] for angle in inputs.rotary)),
    )
    assert_close = torch.testing.assert_close
    assert_close(run(shorter, 3)[0], first[0, :40], rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)
