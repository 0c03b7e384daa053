"""masked_cross_entropy of the CPU kernels: what they are asked for, and what they and their module refuse."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from tests.conftest import Backend
from tests.masked_cross_entropy.cases import ALONE, PAIRS, assert_same, case, run

BEST = Backend("best")


@pytest.mark.backends("best")
@pytest.mark.parametrize("wanted", [*ALONE, *PAIRS])
def test_kernels_are_asked_for_wanted_gradients_only(backend, monkeypatch, wanted):
    asked = []
    backward = _C.masked_cross_entropy_backward

    def spy(**arguments):
        asked.append({name for name, value in arguments.items() if value is not None})
        backward(**arguments)

    monkeypatch.setattr(_C, "masked_cross_entropy_backward", spy)
    run(case(backend), wanted=wanted)
    if wanted == ("row_weights",):
        assert not asked
        return
    made = {name for name in asked[0] if name.startswith("grad_")} - {"grad_nll"}
    names = {f"grad_{name}" for name in wanted} - {"grad_modulation"}
    assert made == names | ({"grad_shift", "grad_scale"} if "modulation" in wanted else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.float64}, "hidden must be float32, got torch.float64"),
        ({"weight": torch.float16}, "head.weight must be float32 or bfloat16, got torch.float16"),
    ],
)
def test_unsupported_dtypes_go_to_the_reference(change, message):
    leaves, *rest = case(BEST)
    for name, dtype in change.items():
        leaves[name] = leaves[name].to(dtype)
    out = run((leaves, *rest), wanted=("bias",))
    with lk.use_backend("reference"):
        assert_same(out, run((leaves, *rest), wanted=("bias",)))
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        run((leaves, *rest))


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
        (
            {"tile_largest": torch.zeros(2, 40)},
            ValueError,
            r"tile_largest: expected shape \[3, 40\], got \[2, 40\]",
        ),
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
    leaves, _, rows, _ = case(BEST, sequences=False)
    vectors = torch.zeros(1, 48), torch.ones(1, 48)
    values = (leaves["hidden"], rows, rows, leaves["norm"], *vectors, leaves["weight"], leaves["bias"])
    arguments = dict(zip(names, values, strict=True), normalized=True, excluded_token=-1)
    arguments.update(bf16=False, num_threads=1)
    out = {name: torch.zeros(40) for name in ("row_weights", "nll", "largest", "sum")}
    out.update(total=torch.zeros(()), tile_largest=None, exponentials=None)
    with pytest.raises(error, match=message):
        _C.masked_cross_entropy(**{**arguments, **out, **change})
