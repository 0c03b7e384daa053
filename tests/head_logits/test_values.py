"""head_logits: values against float64, rows at the edges of fp32, the same bits for any rows."""

import pytest
import torch
import torch.nn.functional as F

import loopmdm_kernels as lk
from loopmdm_kernels.testing import assert_matches_oracle, reference
from tests.head_logits.cases import BF16, FLOAT, case, exact_logits
from tests.near import assert_near
from tests.sample_rows.cases import case as rows_case

pytestmark = pytest.mark.usefixtures("no_gradients")
SMALL = (2, 9, 40, 300)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


# (B, L, D, V) around the widths of lanes, register tiles, tiles (256 tokens), chunks (1024), batches (132);
# on Hopper rows that begin at even elements and such that do not, tiles of 64 and of 128 rows.
@pytest.mark.by_backend(
    "size",
    reference=[(2, 3, 7, 15)],
    cpu=[
        (1, 1, 1, 1), (2, 3, 7, 15), (1, 5, 33, 64), (3, 11, 64, 257), (2, 67, 37, 1031), (1, 265, 96, 97),
        (1, 6, 130, 2111),
    ],
    triton=[(1, 1, 1, 1), (3, 11, 36, 301)],
    cuda=[(3, 50, 72, 300), (3, 11, 72, 257)],
)  # fmt: skip
@pytest.mark.parametrize("per_sequence", [False, True])
def test_values(backend, size, dtype, per_sequence):
    hidden, head = case(backend, size, dtype, per_sequence=per_sequence)
    logits = lk.head_logits(hidden, head)
    assert logits.dtype == dtype
    exact = exact_logits(hidden, head)
    assert_matches_oracle(logits, reference.head_logits(hidden, head), exact)
    assert_near(logits, exact, head.weight.dtype)


def test_bf16_products_of_a_float32_weight(backend):
    hidden, head = case(backend, SMALL, FLOAT)
    logits, plain = (op.head_logits(hidden, head, compute_dtype=BF16) for op in (lk, reference))
    assert logits.dtype == BF16
    exact = exact_logits(hidden, head)
    assert_matches_oracle(logits, plain, exact)
    assert_near(logits, exact, logits.dtype)


@pytest.mark.by_backend("dtype", cpu=[FLOAT, BF16], triton=[BF16], cuda=[BF16])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(backend, dtype, threads):
    length, vocab_size = (150, 300) if backend.emulated else (300, 1500)
    hidden, head = case(backend, (1, length, 48, vocab_size), dtype)
    threads(1)
    whole = lk.head_logits(hidden, head)
    threads(3)
    for begin, end in ((0, 1), (7, 9), (100, length), (0, length)):
        assert torch.equal(lk.head_logits(hidden[:, begin:end], head), whole[:, begin:end])


def test_strided_hidden_and_weight(backend):
    hidden, head = case(backend, SMALL, per_sequence=False)
    strided = (hidden.mT.contiguous().mT, head._replace(weight=head.weight.T.contiguous().T))
    torch.testing.assert_close(lk.head_logits(*strided), lk.head_logits(hidden, head), rtol=0, atol=0)


def test_sampling_sees_the_same_logits(backend):
    """Where logits come from does not matter: the most probable token is that of the row's logits."""
    hidden, head, rows, rng = rows_case(backend, excluded=False)
    logits = lk.head_logits(hidden, head).flatten(0, 1)[rows]
    drawn = lk.sample_rows(hidden, head, rows, rng, temperature=0.0)
    if backend.name == "cuda":  # whose logits are rounded: two may be the largest
        assert torch.equal(logits.gather(1, drawn.token[:, None])[:, 0], logits.amax(1))
    else:
        assert torch.equal(drawn.token, logits.argmax(-1))


def test_nan_stays_in_its_column_and_row(backend):
    hidden, head = case(backend, (1, 3, 16, 300))
    hidden[0, 1] = float("nan")
    head.weight[70] = float("nan")
    expected = torch.zeros(3, 300, dtype=torch.bool)
    expected[1] = expected[:, 70] = True
    assert torch.equal(lk.head_logits(hidden, head)[0].isnan().cpu(), expected)


@pytest.mark.by_backend(
    "width", reference=[16, 30, 100, 768], best=[16, 30, 100, 768], triton=[30], cuda=[72]
)
@pytest.mark.parametrize("constant", [0.0, 1e-3, 1.1, 40.7, -123.4, 1e4 / 3, 1e10 / 3])
def test_a_constant_row_has_a_norm_of_zero(backend, constant, width):
    """So its logits are those of the shift alone, whatever its mean was rounded to."""
    hidden, head = case(backend, (1, 4, width, 20))
    hidden[0, 1] = constant
    logits = lk.head_logits(hidden, head)[0, 1]
    want = F.linear(head.modulation[0, 0].float(), head.weight.float(), head.bias.float()).to(logits.dtype)
    rtol, atol = (2**-7, 1e-3) if backend.name == "cuda" else (1e-5, 2e-5)
    torch.testing.assert_close(logits, want, rtol=rtol, atol=atol)


@pytest.mark.backends("best", "triton", "cuda", "gpu")  # PyTorch's own layer_norm is wrong at 1e19
@pytest.mark.parametrize("scale", [1e10, 1e15, 1e18, 3e18, 1e19, 1e20, 1e30, 1e38])
def test_a_large_row_is_right_or_not_finite(backend, scale):
    """Not finite and wrong, where 1 / sqrt(infinity) is 0. Other rows are what they were."""
    hidden, head = case(backend, (1, 4, 32, 20))
    want = lk.head_logits(hidden, head)
    hidden[0, 0] *= scale
    exact = exact_logits(hidden, head)[0, 0]
    got = lk.head_logits(hidden, head)
    allowed = 1e-3 + (2**-7 * float(exact.abs().max()) if backend.name == "cuda" else 0)
    assert not torch.isfinite(got[0, 0]).any() or (got[0, 0] - exact).abs().max() < allowed
    assert torch.isfinite(got[0, 0]).all() or scale > 1e18
    if backend.name == "cuda" and scale >= 1e20:
        assert got[0, 0].isnan().all()
    torch.testing.assert_close(got[0, 1:], want[0, 1:], rtol=0, atol=0)
