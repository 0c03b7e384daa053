"""attention of the CPU kernels: what they and their module refuse."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.calls import AttentionCall
from loopmdm_kernels.cpu.attention import why_not


def test_says_what_it_supports():
    half = torch.zeros(1, 1, 2, 4).half()
    for q in (half.float(), half.bfloat16()):
        assert why_not(AttentionCall(q, q, q)) is None
    assert why_not(AttentionCall(half, half, half)) == "q must be float32 or bfloat16, got torch.float16"
    with (
        lk.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"attention: backend 'cpu' .*: q must be float32 or bfloat16"),
    ):
        lk.attention(half, half, half)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 5, 8).half()}, TypeError, "q: expected dtype float32 or bfloat16"),
        ({"q": torch.zeros(2, 3, 0, 8)}, ValueError, "q: expected no dimension of size 0"),
        ({"q": torch.zeros(2, 3, 8, 5).mT}, ValueError, "q: expected unit stride along the last axis"),
        ({"k": torch.zeros(2, 3, 4, 8)}, ValueError, r"k: expected shape \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
        ({"v": torch.zeros(2, 3, 5, 8).bfloat16()}, TypeError, "v: expected dtype float32, got bfloat16"),
        ({"out": torch.zeros(2, 3, 5)}, ValueError, "out: expected shape"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        ({"cos": torch.ones(5, 4), "sin": torch.ones(5, 3)}, ValueError, "rotary.sin: expected shape"),
        ({"cos": torch.ones(5, 4)}, TypeError, "rotary.sin: expected a torch.Tensor"),
        ({"log_sum_exp": torch.zeros(2, 3, 4)}, ValueError, "log_sum_exp: expected shape"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {
        **{name: torch.zeros(2, 3, 5, 8) for name in ("q", "k", "v")},
        "key_mask": None,
        "cos": None,
        "sin": None,
        "num_threads": 1,
        "out": torch.zeros(2, 3, 5, 8),
        "log_sum_exp": torch.zeros(2, 3, 5),
    }
    with pytest.raises(error, match=message):
        _C.attention(**{**arguments, **changes})
