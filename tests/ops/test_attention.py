"""attention: values, gradients, masks, rotary angles."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import reference
from loopmdm_kernels.reference.attention import apply_rotary
from loopmdm_kernels.testing import assert_matches_oracle
from loopmdm_kernels.types import Rotary


def inputs(dtype=torch.float64, length=20, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.rand(2, length, generator=generator) < 0.6
    mask[:, 0] = True
    angle = torch.outer(torch.arange(length).double(), 0.5 ** torch.arange(head_dim // 2).double())
    return [t.to(dtype) for t in (q, k, v)], mask, Rotary(angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_the_oracle(dtype):
    results = []
    for op, kind in (
        (lk.attention, dtype),
        (reference.attention, dtype),
        (reference.attention, torch.float64),
    ):
        tensors, mask, rotary = inputs(kind)
        for tensor in tensors:
            tensor.requires_grad_()
        out = op(*tensors, key_mask=mask, rotary=rotary)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for name, out, baseline, oracle in zip("oqkv", *results, strict=True):
        assert_matches_oracle(out, baseline, oracle, name=name)


def test_rotary_scores_depend_on_distance_only():
    (q, k, _), _, rotary = inputs()
    same_q, same_k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    scores = apply_rotary(same_q, rotary) @ apply_rotary(same_k, rotary).transpose(-1, -2)
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-9, atol=1e-9)


def test_all_keys_equal_gives_the_mean():
    (q, k, v), mask, _ = inputs()
    out = lk.attention(q, torch.zeros_like(k), v, key_mask=mask)
    for b in range(2):
        mean = v[b][:, mask[b]].mean(1, keepdim=True).expand_as(out[b])
        torch.testing.assert_close(out[b], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (1, torch.zeros(2, 3, 20, 4, dtype=torch.float64), ValueError, r"k: got shape \[2, 3, 20, 4\]"),
        (2, torch.zeros(2, 3, 20, 8), TypeError, "v: got float32, expected float64"),
        (0, torch.zeros(3, 20, 8, dtype=torch.float64), ValueError, r"q: got shape \[3, 20, 8\]"),
        (0, torch.zeros(2, 3, 0, 8, dtype=torch.float64), ValueError, "q: got shape"),
    ],
)
def test_bad_input(position, value, error, message):
    tensors, _, _ = inputs()
    tensors[position] = value
    with pytest.raises(error, match=message):
        lk.attention(*tensors)


@pytest.mark.parametrize("wrong", [1, "x", (), (torch.zeros(20, 4),), torch.zeros(2, 20, 4), [None, None]])
def test_rotary_that_is_none(wrong):
    tensors, _, _ = inputs()
    with pytest.raises(TypeError, match=r"rotary: got .*, expected a Rotary or None"):
        lk.attention(*tensors, rotary=wrong)
