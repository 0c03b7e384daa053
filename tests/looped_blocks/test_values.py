"""looped_blocks: values against float64 in all sizes and options."""

import random

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import LoopedInputs, error_over_loops, looped_inputs
from tests.looped_blocks.cases import BF16, FLOAT, HALF, call, case, check, run

pytestmark = pytest.mark.backends("reference", "cpu", "triton")
WITHOUT_TRITON = pytest.mark.backends("reference", "cpu")  # in whose interpreter a loop takes a second


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


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("sizes", "options"), [((1, 11, 48, 3, 1), {"key_mask": True}), ((2, 16, 32, 4, 2), {})], ids=str
)
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_error_over_loops(backend, dtype, sizes, options):
    curve = error_over_loops(lk.looped_blocks, case(backend, *sizes, **options), dtype)
    assert [row[0] for row in curve] == list(range(1, 25))
    for num_loops, error, baseline, step in curve:
        assert error <= 2 * baseline + step, num_loops
    assert curve[-1][2] > 0  # the oracle is not the thing tested


def random_sizes(count):
    generator = random.Random(5)
    for index in range(count):
        hidden = (12, 60, 64, 80, 96, 128, 200)[index % 7]
        heads = generator.choice(
            [h for h in range(1, hidden // 2 + 1) if hidden % (2 * h) == 0 and hidden // h <= 64]
        )
        sizes = generator.randint(1, 3), generator.randint(1, 200), hidden, heads, generator.randint(1, 3)
        width = generator.randint(1, 4 * hidden)
        options = {
            "per_sequence_modulation": generator.random() < 0.5,
            "rotary": generator.random() < 0.7,
            "key_mask": generator.random() < 0.5,
        }
        yield sizes, width, options


PLAIN = {"rotary": False, "per_sequence_modulation": True}
USUAL = ((2, 19, 48, 3, 2), 96, {"per_sequence_modulation": True, "key_mask": True})
SMALL = [(1, 1, 12, 1, 1), (3, 5, 20, 2, 1), (1, 40, 132, 2, 1), (2, 32, 64, 1, 1)]


@pytest.mark.by_backend(
    "given",
    reference=[(USUAL, dtype) for dtype in (FLOAT, BF16, HALF)],
    cpu=[(sizes, dtype) for sizes in random_sizes(14) for dtype in (FLOAT, BF16)],
    triton=[(USUAL, dtype) for dtype in (FLOAT, BF16, HALF)]
    + [((sizes, ratio * sizes[2], PLAIN), BF16) for sizes, ratio in zip(SMALL, (1, 3, 2, 4), strict=True)],
)
def test_sizes(backend, given):
    (sizes, width, options), dtype = given
    check(narrow_mlp(case(backend, *sizes, **options, seed=sizes[1]), width), 2, dtype)


@WITHOUT_TRITON
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("head_dim", [2, 4, 6, 10, 16, 18, 32, 34, 48, 62, 64, 66, 130])
def test_head_sizes(backend, dtype, head_dim):
    check(looped_inputs(2, 37, 2 * head_dim, 2, 1, key_mask=True, seed=head_dim), 2, dtype)


@pytest.mark.backends("cpu")
def test_lengths(backend, dtype):
    """Around the widths of panels and of blocks of rows."""
    for length in (1, 2, 3, 5, 6, 7, 8, 15, 16, 17, 63, 64, 65, 95, 96, 97, 98, 128, 193):
        check(looped_inputs(1, length, 24, 2, 1, seed=length), 1, dtype)


@pytest.mark.backends("cpu")
def test_many_short_sequences(backend, dtype):
    check(looped_inputs(65, 1, 16, 2, per_sequence_modulation=True), 3, dtype)
    check(looped_inputs(65, 3, 16, 2, key_mask=True), 2, dtype)
    check(looped_inputs(7, 31, 36, 6, per_sequence_modulation=True), 2, dtype)
    check(looped_inputs(130, 1, 24, 2), 2, dtype, dropout=0.3, dropout_seed=4)


@pytest.mark.by_backend(
    "dtypes",
    reference=[(FLOAT, BF16)],
    cpu=[(FLOAT, FLOAT), (FLOAT, BF16), (BF16, FLOAT), (BF16, BF16)],
    triton=[(FLOAT, BF16), (BF16, FLOAT)],
)
def test_dtypes_of_weights(backend, dtypes):
    weights, computed = dtypes
    sizes, loops = ((1, 10, 24, 2, 1), 2) if backend.emulated else ((2, 20, 40, 4), 3)
    check(case(backend, *sizes), loops, computed, weights=weights)


@WITHOUT_TRITON
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_large_scores(backend, dtype):
    """Softmax near one key, scores in the hundreds: sums of exponentials must not overflow."""
    inputs = looped_inputs(2, 70, 64, 2, 1, key_mask=True)
    inputs = inputs._replace(blocks=[b._replace(qkv=b.qkv * 8) for b in inputs.blocks])
    check(inputs, 1, dtype)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("recompute", [False, True])
def test_huge_scores_stay_finite(backend, dtype, recompute):
    """And their gradients, where PyTorch's own are not."""
    inputs = looped_inputs(length=24)
    blocks = [b._replace(qkv=torch.cat((b.qkv[:64] * 3e4, b.qkv[64:]))) for b in inputs.blocks]
    inputs = inputs._replace(blocks=blocks).to(dtype, requires_grad=True)
    out = call(inputs, 2, recompute=recompute)
    assert torch.isfinite(out).all()
    grads = torch.autograd.grad(out.sum(), list(inputs.leaves().values()))
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.by_backend("dtype", reference=[FLOAT, BF16], cpu=[FLOAT, BF16], triton=[FLOAT])
def test_large_residual_stream(backend, dtype):
    """The stream is kept in fp32, and its moments are not lost to cancellation."""
    sizes, loops = ((1, 9, 80, 4, 1), 2) if backend.emulated else ((2, 9, 64, 4), 3)
    inputs = case(backend, *sizes)
    check(inputs._replace(x=inputs.x * 100 + 1000), loops, dtype)


@pytest.mark.by_backend("hidden", reference=[16, 100, 768], best=[16, 100, 768], triton=[16])
def test_a_constant_stream_goes_through_the_blocks_as_in_float64(backend, hidden):
    inputs = case(backend, 2, 5, hidden, 2)
    inputs = inputs._replace(x=torch.full_like(inputs.x, 40.7)).to(FLOAT)
    with lk.use_backend("reference"):
        want = run(inputs.to(torch.float64), 1)
    torch.testing.assert_close(run(inputs, 1).double(), want, rtol=0, atol=1e-4)


@pytest.mark.by_backend(
    "given",
    reference=[(FLOAT, 3, 13, 20)],
    cpu=[(dtype, *size) for size in ((3, 13, 20), (1, 1, 12), (2, 40, 64)) for dtype in (FLOAT, BF16)],
    triton=[(FLOAT, 2, 9, 20), (BF16, 2, 9, 68)],
)
def test_dropout(backend, given):
    dtype, *sizes = given
    inputs = case(backend, *sizes, 2, 1 if backend.emulated else 2)
    check(inputs, 2 if backend.emulated else 3, dtype, dropout=0.3, dropout_seed=(7 << 40) + 11)


@WITHOUT_TRITON
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_dropout_is_a_function_of_its_seed(backend, dtype):
    rounded = looped_inputs(3, 13, 20, 2).to(dtype)
    first, again, other = (run(rounded, 3, dropout=0.3, dropout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(run(rounded, 3, dropout_seed=1), run(rounded, 3))


@WITHOUT_TRITON
def test_dropout_is_unbiased(backend):
    """One block, attention gate open, MLP gate closed: dropout acts on that branch, scaled by 1/(1-p)."""
    inputs = looped_inputs(batch=4, length=64).to(FLOAT)
    mod = torch.zeros_like(inputs.modulation[:1])
    mod[:, :, 2] = 1.0
    one = inputs._replace(blocks=inputs.blocks[:1], modulation=mod)
    branch = run(one, 1) - one.x
    dropped = run(one, 1, dropout=0.25, dropout_seed=3) - one.x
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (branch / 0.75)[kept], rtol=1e-3, atol=1e-5)
    share = kept.float().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / kept.numel()) ** 0.5


@pytest.mark.parametrize("hidden", [4, 12])
def test_nan_leaves_rows_that_are_dropped_whole(backend, hidden):
    """The columns that pad such a row have none either, which its next norm would see."""
    given = looped_inputs(8, 8, hidden, num_heads=1, num_blocks=1)
    given = given.to(FLOAT, device=backend.device)
    given.blocks[0].norm1[1] = float("nan")
    options = {"num_heads": 1, "dropout": 0.8, "dropout_seed": 3}
    with lk.use_backend("reference"):
        want = lk.looped_blocks(given.x, given.blocks, given.modulation, 2, **options)
    got = lk.looped_blocks(given.x, given.blocks, given.modulation, 2, **options)
    assert 0 < int(want.isnan().sum()) < want.numel()
    assert torch.equal(got.isnan(), want.isnan())
