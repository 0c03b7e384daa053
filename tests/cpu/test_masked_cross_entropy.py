"""masked_cross_entropy of every instruction set: values and gradients against float64; invariances."""

import math

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C, reference
from loopmdm_kernels.cpu import masked_cross_entropy as cpu
from loopmdm_kernels.testing import LEAVES
from loopmdm_kernels.testing import cross_entropy_results as run
from loopmdm_kernels.types import Head
from tests.cpu.cross_entropy_cases import BF16, FLOAT, assert_case, assert_same, case

# (D, V, R): around the widths of lanes, panels, pairs, tiles (192 tokens) and chunks (768).
SIZES = [
    (1, 70, 9),
    (7, 97, 3),
    (32, 192, 33),
    (37, 1543, 40),
    (48, 101, 64),
    (65, 61, 100),
    (64, 2311, 7),
    (70, 197, 1),
    (33, 65, 8),
    (128, 389, 66),
]


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "vocab_size", "num_rows"), SIZES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("compute_dtype", [FLOAT, BF16])
def test_values_and_gradients(isa, width, vocab_size, num_rows, dtype, compute_dtype):
    assert_case(case(width, vocab_size, num_rows, dtype), compute_dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_larger_values_and_gradients(isa, dtype):
    assert_case(case(128, 3203, 200, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_more_rows_than_a_group(isa, dtype):
    assert_case(case(40, 211, _C.CROSS_ENTROPY_GROUP_ROWS + 70, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("sequences", [False, True])
def test_nothing_excluded(isa, dtype, sequences):
    assert_case(case(dtype=dtype, excluded=False, sequences=sequences))


@pytest.mark.parametrize("excluded_token", [0, 388])
def test_excluded_token(isa, excluded_token):
    leaves, targets, rows, _ = case()
    targets[targets == excluded_token] = 7
    leaves["weight"][excluded_token] = math.nan  # is not looked at
    out = run(cpu.masked_cross_entropy, leaves, targets, rows, excluded_token)
    leaves["weight"][excluded_token] = 1
    clean = run(cpu.masked_cross_entropy, leaves, targets, rows, excluded_token)
    assert_same(out, clean)
    assert bool((out["weight"][excluded_token] == 0).all()) and out["bias"][excluded_token] == 0
    assert_case((leaves, targets, rows, excluded_token))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_no_rows(isa, dtype):
    out = run(cpu.masked_cross_entropy, *case(num_rows=0, dtype=dtype))
    assert out["total"].item() == 0 and out["nll"].shape == (0,)
    assert all(bool((out[name] == 0).all()) for name in LEAVES)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_large_logits(isa, dtype):
    assert_case(case(dtype=dtype, spread=3000.0))


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_nan_stays_in_its_row(isa, dtype):
    leaves, targets, rows, excluded = case(dtype=dtype)
    clean = run(cpu.masked_cross_entropy, leaves, targets, rows, excluded)
    leaves["hidden"].view(-1, 48)[rows[3], 5] = math.nan
    out = run(cpu.masked_cross_entropy, leaves, targets, rows, excluded)
    bad = rows == rows[3]
    assert bool(out["nll"][bad].isnan().all()) and bool(out["total"].isnan())
    assert torch.equal(out["nll"][~bad], clean["nll"][~bad])
    assert bool(out["weight"].isnan().any())
    others = torch.ones(33, dtype=torch.bool)
    others[rows[3]] = False
    assert torch.equal(out["hidden"].view(33, -1)[others], clean["hidden"].view(33, -1)[others])


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_strides(isa, dtype):
    leaves, targets, rows, excluded = case(dtype=dtype)
    strided = {
        name: torch.stack((t, t + 1), -1)[..., 0]
        if t.ndim < 2
        else t.transpose(0, 1).contiguous().mT
        if t.ndim == 2
        else t.transpose(1, 2).contiguous().transpose(1, 2)
        for name, t in leaves.items()
    }
    assert not any(t.is_contiguous() for t in strided.values())
    every_other = torch.stack((rows, rows * 0), 1)[:, 0]
    out = run(cpu.masked_cross_entropy, strided, targets.T.contiguous().T, every_other, excluded)
    assert_same(out, run(cpu.masked_cross_entropy, leaves, targets, rows, excluded))


def test_weight_at_an_odd_address(isa):
    leaves, *rest = case(width=46, dtype=BF16)
    shifted = torch.cat((torch.zeros(1, dtype=BF16), leaves["weight"].flatten()))[1:].view_as(
        leaves["weight"]
    )
    assert shifted.data_ptr() % 4 == 2
    expected = run(cpu.masked_cross_entropy, leaves, *rest)
    assert_same(run(cpu.masked_cross_entropy, {**leaves, "weight": shifted}, *rest), expected)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_threads_and_repetition(isa, dtype, threads):
    inputs = case(40, 3203, 70, dtype)
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        results.append(run(cpu.masked_cross_entropy, *inputs))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_a_row_does_not_depend_on_the_others(isa, dtype):
    leaves, targets, _, excluded = case(40, 1601, 33, dtype)
    leaves["row_weights"] = torch.ones(33)
    every = torch.arange(33)

    def nll_and_gradient(rows):
        hidden = leaves["hidden"].detach().requires_grad_()
        head = Head(*(leaves[name] for name in LEAVES[1:5]), excluded)
        total, nll = cpu.masked_cross_entropy(hidden, head, targets, rows, torch.ones(len(rows)))
        return nll.detach(), torch.autograd.grad(total, hidden)[0].view(33, -1)[rows]

    nll, grad = nll_and_gradient(every)
    few = (every[:8], every[:9], every[5:21])  # around those for which weights are transposed
    for rows in (torch.tensor([0]), torch.tensor([32, 7, 11]), *few, every.flip(0)):
        part_nll, part_grad = nll_and_gradient(rows)
        assert torch.equal(part_nll, nll[rows])
        assert torch.equal(part_grad, grad[rows])


@pytest.mark.parametrize("wanted", [(name,) for name in LEAVES] + [("hidden", "bias"), ("norm", "weight")])
def test_only_wanted_gradients(monkeypatch, wanted):
    inputs = case()
    expected = run(cpu.masked_cross_entropy, *inputs)
    asked = []
    backward = _C.masked_cross_entropy_backward

    def spy(**arguments):
        asked.append({name for name, value in arguments.items() if value is not None})
        backward(**arguments)

    monkeypatch.setattr(_C, "masked_cross_entropy_backward", spy)
    out = run(cpu.masked_cross_entropy, *inputs, wanted=wanted)
    assert_same(out, {name: expected[name] for name in out})
    if wanted == ("row_weights",):
        assert not asked
        return
    made = {name for name in asked[0] if name.startswith("grad_")} - {"grad_nll"}
    names = {f"grad_{name}" for name in wanted} - {"grad_modulation"}
    assert made == names | ({"grad_shift", "grad_scale"} if "modulation" in wanted else set())


def test_the_public_op_uses_it():
    leaves, targets, rows, excluded = case()
    with lk.use_backend("cpu"):
        out = run(lk.masked_cross_entropy, leaves, targets, rows, excluded)
    assert_same(out, run(cpu.masked_cross_entropy, leaves, targets, rows, excluded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.float64}, "hidden must be float32, got torch.float64"),
        ({"weight": torch.float16}, "head.weight must be float32 or bfloat16, got torch.float16"),
    ],
)
def test_unsupported_dtypes_go_to_the_reference(change, message):
    leaves, targets, rows, excluded = case()
    for name, dtype in change.items():
        leaves[name] = leaves[name].to(dtype)
    out = run(lk.masked_cross_entropy, leaves, targets, rows, excluded, wanted=("bias",))
    assert_same(out, run(reference.masked_cross_entropy, leaves, targets, rows, excluded, wanted=("bias",)))
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        run(lk.masked_cross_entropy, leaves, targets, rows, excluded)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([99] * 40)}, ValueError, "rows: expected values in 0..32, got 99 at index 0"),
        ({"targets": torch.full((40,), 389)}, ValueError, "targets: expected values in 0..388, got 389"),
        ({"excluded_token": 389}, ValueError, "head.excluded_token: expected -1 or a token"),
        ({"bias": torch.zeros(388)}, ValueError, r"head.bias: expected shape \[389\], got \[388\]"),
        (
            {"weight": torch.zeros(389, 48).half()},
            TypeError,
            "head.weight: expected dtype float32 or bfloat16",
        ),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
        ({"tile_largest": torch.zeros(2, 40)}, ValueError, r"tile_largest: expected shape \[3, 40\], got \[2, 40\]"),
        (
            {"tile_largest": torch.zeros(3, 40), "exponentials": torch.zeros(389, 47)},
            ValueError,
            r"exponentials: expected shape \[389, 48\], got \[389, 47\]",
        ),
        ({"exponentials": torch.zeros(389, 48)}, ValueError, "expected None where tile_largest is None"),
    ],
)
def test_what_the_module_refuses(change, error, message):
    names = ("hidden", "rows", "targets", "norm", "shift", "gain", "weight", "bias")
    leaves, _, rows, _ = case(sequences=False)
    vectors = torch.zeros(1, 48), torch.ones(1, 48)
    values = (leaves["hidden"], rows, rows, leaves["norm"], *vectors, leaves["weight"], leaves["bias"])
    arguments = dict(zip(names, values, strict=True), normalized=True, excluded_token=-1)
    arguments.update(bf16=False, num_threads=1)
    out = {name: torch.zeros(40) for name in ("row_weights", "nll", "largest", "sum")}
    out.update(total=torch.zeros(()), tile_largest=None, exponentials=None)
    with pytest.raises(error, match=message):
        _C.masked_cross_entropy(**{**arguments, **out, **change})
