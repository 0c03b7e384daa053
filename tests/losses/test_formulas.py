"""loopmdm.losses: the values and gradients of the formulas that take logits, written out here."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopmdm.losses import (
    BlockDiffusionCrossEntropyLoss,
    DLLMLossOutput,
    HybridDiffusionLLMLoss,
    MDLMCrossEntropyLoss,
    mdlm_loss,
)
from loopmdm_kernels import Head
from loopmdm_kernels.testing import assert_matches_oracle

B, L, D, V = 3, 11, 32, 257
CLASSES = (MDLMCrossEntropyLoss, BlockDiffusionCrossEntropyLoss, HybridDiffusionLLMLoss)


class Batch(NamedTuple):
    hidden: torch.Tensor
    causal: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    noise: torch.Tensor
    p_mask: torch.Tensor
    t: torch.Tensor


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    t = torch.rand(B, generator=g, dtype=torch.float64) * 0.8 + 0.1
    tokens = torch.randint(V, (B, L), generator=g)
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[1, 8:] = -100
    noise = torch.rand(B, L, generator=g) < 0.6
    noise[0] = False  # a sequence without a masked token
    return Batch(
        normal(B, L, D), normal(B, L, D), normal(V, D) / D**0.5, normal(V) / 4, tokens, labels, noise,
        t[:, None].repeat(1, L), t,
    )  # fmt: skip


def nll_of(hidden, weight, bias, targets):
    """-log p of each token, from logits [B, L, V]."""
    logits = hidden @ weight.T + bias
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def nemo_mdlm(nll, batch, supervised, count):
    weighted = nll * (batch.noise & supervised).to(nll.dtype) / batch.p_mask.clamp(min=1e-8).to(nll.dtype)
    return weighted.sum() if count is None else weighted.sum() / max(count, 1)


def nemo_block(nll, supervised, count):
    total = (nll * supervised.to(nll.dtype)).sum()
    return total / max(int(supervised.sum()) if count is None else count, 1)


def nemo_hybrid(nll, ar_nll, batch, supervised, ar_weights, count, ar_count, alpha):
    """ar_nll [B, L - 1]: position l predicts token l + 1."""
    ar = (ar_nll * ar_weights[:, 1:].to(ar_nll.dtype)).sum()
    return alpha * nemo_mdlm(nll, batch, supervised, count) + ar / max(ar_count, 1)


def dllm(nll, batch, weights, norm):
    maskable = batch.labels != -100
    token_nll = nll * weights * (batch.noise & maskable).to(nll.dtype)
    if norm == "token":
        return token_nll, (token_nll / maskable.sum().clamp_min(1)).sum()
    if norm == "sequence":
        return token_nll, (token_nll / (maskable.sum(-1, keepdim=True).clamp_min(1) * B)).sum()
    return token_nll, (token_nll / B).sum()


def assert_same(batch, ours, formula, dtype, *, names=("hidden", "weight", "bias")):
    """Loss and gradients of `ours` and `formula`, functions of a batch, in `dtype`."""

    def run(function, kind):
        leaves = {
            name: getattr(batch, name).detach().clone().to(dtype).to(kind).requires_grad_() for name in names
        }
        floats = {n: v.float() for n, v in batch._asdict().items() if v.is_floating_point()}
        loss = function(batch._replace(**(floats | leaves)))
        loss.backward()
        # A leaf in half precision has a gradient in half precision.
        return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    exact, exact_grads = run(formula, torch.float64)
    plain, plain_grads = run(formula, dtype)
    got, got_grads = run(ours, dtype)
    wide = torch.float32
    assert got.dtype == wide
    assert_matches_oracle(got, plain.to(wide), exact.double(), name="loss")
    for name in names:
        assert got_grads[name].dtype == dtype
        assert_matches_oracle(got_grads[name], plain_grads[name], exact_grads[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [None, 0, 17])
def test_mdlm_of_nemo(batch, dtype, count):
    supervised = batch.labels != -100

    def ours(b):
        head = Head.of(b.weight, bias=b.bias)
        given = (b.tokens, b.noise, b.p_mask, supervised.long())
        return MDLMCrossEntropyLoss()(b.hidden, head, *given, num_diffusion_tokens=count).total_loss

    def formula(b):
        return nemo_mdlm(nll_of(b.hidden, b.weight, b.bias, b.tokens), b, supervised, count)

    assert_same(batch, ours, formula, dtype)


@pytest.mark.parametrize("count", [None, 17])
def test_block_diffusion_of_nemo(batch, count):
    supervised = batch.labels != -100

    def ours(b):
        head = Head.of(b.weight, bias=b.bias)
        given = (b.tokens, b.noise, b.p_mask, supervised)
        return BlockDiffusionCrossEntropyLoss()(b.hidden, head, *given, num_diffusion_tokens=count).total_loss

    def formula(b):
        return nemo_block(nll_of(b.hidden, b.weight, b.bias, b.tokens), supervised, count)

    assert_same(batch, ours, formula, torch.float32)


@pytest.mark.parametrize("layout", ["apart", "joined"])
def test_hybrid_of_nemo(batch, layout):
    supervised = batch.labels != -100
    ar_weights = torch.arange(B * L).view(B, L) % 3

    def ours(b):
        head = Head.of(b.weight, bias=b.bias)
        hidden, causal = (
            (b.hidden, b.causal) if layout == "apart" else (torch.cat([b.hidden, b.causal], 1), None)
        )
        out = HybridDiffusionLLMLoss(alpha=0.3)(
            hidden, head, b.tokens, b.noise, b.p_mask, supervised, ar_weights, 17, 9, causal
        )
        nll = nll_of(b.hidden, b.weight, b.bias, b.tokens)
        assert torch.allclose(out.dllm_loss, 0.3 * nemo_mdlm(nll, b, supervised, 17).detach(), rtol=1e-4)
        return out.total_loss

    def formula(b):
        nll = nll_of(b.hidden, b.weight, b.bias, b.tokens)
        ar_nll = nll_of(b.causal[:, :-1], b.weight, b.bias, b.tokens[:, 1:])
        return nemo_hybrid(nll, ar_nll, b, supervised, ar_weights, 17, 9, 0.3)

    assert_same(batch, ours, formula, torch.float32, names=("hidden", "causal", "weight", "bias"))


def test_hybrid_without_an_autoregressive_part_is_the_diffusion_loss(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    given = (b.hidden, b.weight, b.tokens, b.noise, b.p_mask, b.labels != -100)
    plain = MDLMCrossEntropyLoss()(*given)
    for more in ({}, {"causal_hidden": b.causal}, {"loss_mask_ar": b.noise}):
        assert torch.equal(HybridDiffusionLLMLoss(alpha=2.0)(*given, **more).total_loss, 2 * plain.total_loss)


@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("weight_type", ["scheduler", "uniform"])
def test_dllm(batch, weight_type, norm, shifted):
    # w(t) = -alpha'(t) / (1 - alpha(t)) of the linear schedule; dllm adds 1e-6 below.
    weights = 1 / (batch.p_mask + 1e-6) if weight_type == "scheduler" else torch.ones_like(batch.tokens)
    masked = batch.noise & (batch.labels != -100)

    def ours(b):
        out = mdlm_loss(
            b.hidden, Head.of(b.weight, bias=b.bias), b.tokens, b.labels, masked,
            weights if weight_type == "uniform" else weights.float(),
            loss_norm_type=norm, right_shift_logits=shifted,
        )  # fmt: skip
        assert not out.token_nll.requires_grad
        assert torch.allclose(out.token_nll, formula_of_tokens(b)[0].detach(), rtol=1e-4, atol=1e-4)
        return out.loss

    def formula_of_tokens(b):
        hidden = torch.cat([b.hidden[:, :1], b.hidden[:, :-1]], dim=1) if shifted else b.hidden
        nll = nll_of(hidden, b.weight, b.bias, b.tokens)
        return dllm(nll, b, weights.to(nll.dtype), norm)

    assert_same(batch, ours, lambda b: formula_of_tokens(b)[1], torch.float32)


def test_heads(batch):
    """A weight, a Linear and a Head are one head; a LoopMDM's has a norm, a modulation and no mask."""
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    given = (b.tokens, b.noise, b.p_mask, torch.ones_like(b.noise))
    linear = nn.Linear(D, V)
    loss = MDLMCrossEntropyLoss()
    of_linear = loss(b.hidden, linear, *given).total_loss
    assert torch.equal(of_linear, loss(b.hidden, Head.of(linear.weight, bias=linear.bias), *given).total_loss)
    bare = nn.Linear(D, V, bias=False)
    assert torch.equal(
        loss(b.hidden, bare, *given).total_loss, loss(b.hidden, bare.weight, *given).total_loss
    )
    whole = Head.of(b.weight, norm=torch.ones(D), modulation=torch.randn(B, 2, D), excluded_token=V - 1)
    tokens = b.tokens.clamp(max=V - 2)
    normed = F.layer_norm(b.hidden, (D,)) * (1 + whole.modulation[:, 1:]) + whole.modulation[:, :1]
    logits = (normed @ b.weight.T)[..., : V - 1]
    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(B, L)
    expected = (nll * b.noise / b.p_mask).sum()
    assert torch.allclose(loss(b.hidden, whole, tokens, *given[1:]).total_loss, expected, rtol=1e-5)


def test_ignored_targets_count_nothing(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    everywhere = torch.ones_like(b.noise)
    loss = MDLMCrossEntropyLoss()
    given = (b.hidden, b.weight)
    ignored = loss(*given, b.labels, everywhere, b.p_mask, everywhere)
    left_out = loss(*given, b.tokens, everywhere, b.p_mask, b.labels != -100)
    assert torch.equal(ignored.total_loss, left_out.total_loss)


def test_nothing_masked(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    hidden = b.hidden.requires_grad_()
    none = torch.zeros_like(b.noise)
    for loss in (
        MDLMCrossEntropyLoss()(hidden, b.weight, b.tokens, none, b.p_mask, ~none).total_loss,
        BlockDiffusionCrossEntropyLoss()(hidden, b.weight, b.tokens, ~none, b.p_mask, none).total_loss,
        mdlm_loss(hidden, b.weight, b.tokens, torch.full_like(b.tokens, -100), none, b.p_mask).loss,
    ):
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, hidden)
        assert not grad.any()


def test_output_is_a_pair_for_logging(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    out = MDLMCrossEntropyLoss()(
        b.hidden.requires_grad_(), b.weight, b.tokens, b.noise, b.p_mask, torch.ones_like(b.noise)
    )
    assert isinstance(out, DLLMLossOutput)
    assert out.total_loss.requires_grad and not out.dllm_loss.requires_grad
    assert torch.equal(out.total_loss.detach(), out.dllm_loss)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_arguments_are_those_of_nemo(cls):
    """Theirs, with hidden states and the head for logits."""
    theirs = [
        "logits", "target_ids", "noise_mask", "p_mask", "loss_mask", "loss_mask_ar", "num_diffusion_tokens",
        "num_ar_tokens", "causal_logits",
    ]  # fmt: skip
    wanted = ["self", "hidden", "head", *theirs[1:-1], "causal_hidden"]
    assert list(inspect.signature(cls.forward).parameters) == wanted
    cls(fp32_upcast=False)


def test_compiled_in_one_graph(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    given = (b.hidden.requires_grad_(), b.weight, b.tokens, b.noise, b.p_mask, b.labels != -100)
    loss = MDLMCrossEntropyLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given).total_loss, loss(*given).total_loss)


def test_wrong_arguments(batch):
    b = Batch(*(v.float() if v.is_floating_point() else v for v in batch))
    supervised = torch.ones_like(b.noise)
    loss = MDLMCrossEntropyLoss()
    with pytest.raises(TypeError, match=r"hidden: got int64"):
        loss(b.tokens, b.weight, b.tokens, b.noise, b.p_mask, supervised)
    with pytest.raises(ValueError, match=r"noise_mask: got shape \[3, 1\]"):
        loss(b.hidden, b.weight, b.tokens, b.noise[:, :1], b.p_mask, supervised)
    with pytest.raises(ValueError, match=r"p_mask: got shape \[3\]"):
        loss(b.hidden, b.weight, b.tokens, b.noise, b.t, supervised)
    with pytest.raises(ValueError, match=r"target_ids: got shape"):
        loss(b.hidden, b.weight, b.tokens[:, 1:], b.noise, b.p_mask, supervised)
    with pytest.raises(ValueError, match=r"targets: got values in"):
        loss(b.hidden, b.weight, b.tokens + V, b.noise, b.p_mask, supervised)
    with pytest.raises(TypeError, match=r"head: got Embedding"):
        loss(b.hidden, nn.Embedding(V, D), b.tokens, b.noise, b.p_mask, supervised)
    with pytest.raises(ValueError, match=r"loss_norm_type: got 'mean'"):
        mdlm_loss(b.hidden, b.weight, b.tokens, b.labels, b.noise, b.p_mask, loss_norm_type="mean")
