"""Every dtype is named: what torch.set_default_dtype says changes no bit (Lightning's bf16-true sets it)."""

from contextlib import contextmanager

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig, sample
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.sampling import ORDERS
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.types import Head

DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]
CONFIG = LoopMDMConfig(
    vocab_size=12, mask_token_id=11, hidden_size=32, num_heads=2, num_layers=4, cond_dim=16,
    max_length=10, loop_start=1, loop_end=3, max_loops=3, dropout=0.1,
)  # fmt: skip


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LoopMDM(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def same(run, default):
    want = run()
    with default_dtype(default):
        got = run()
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def attention():
    q, k, v = (torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float32)
               .requires_grad_() for i in range(3))  # fmt: skip
    out = lk.attention(q, k, v)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def looped(recompute):
    inputs = looped_inputs(key_mask=False).to(torch.float32, requires_grad=True)
    out = lk.looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=inputs.num_heads,
        dropout=0.25, dropout_seed=3, recompute=recompute,
    )  # fmt: skip
    return [out, *torch.autograd.grad(out.sum(), list(inputs.leaves().values()))]


def exits():
    inputs = looped_inputs().to(torch.float32)
    return lk.looped_blocks(
        inputs.x, inputs.blocks, inputs.modulation, 5, num_heads=inputs.num_heads, exit_threshold=0.5
    )


def head_case():
    hidden, head = head_inputs(2, 6, 16, 20, excluded_token=19)
    hidden, *rest = (t.float().requires_grad_() for t in (hidden, *head[:4]))
    return hidden, Head(*rest, 19)


def cross_entropy():
    hidden, head = head_case()
    targets = torch.arange(12).view(2, 6)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32)
    total, nll = lk.masked_cross_entropy(hidden, head, targets, torch.tensor([1, 5, 8]), weights)
    return [total, nll, *torch.autograd.grad(total, (hidden, *head[:4]))]


def logits():
    hidden, head = head_case()
    out = lk.head_logits(hidden, head)
    return [out, *torch.autograd.grad(out.square().sum(), (hidden, *head[:4]))]


def draws(**options):
    with torch.no_grad():
        hidden, head = head_case()
        return lk.sample_rows(hidden, head, torch.arange(12), row_rng(12), **options)


RUNS = {
    "attention": attention,
    "looped_blocks": lambda: looped(False),
    "looped_blocks, recomputed": lambda: looped(True),
    "looped_blocks, exits": exits,
    "masked_cross_entropy": cross_entropy,
    "head_logits": logits,
    "sample_rows": draws,
    "sample_rows, top_k": lambda: draws(top_k=3, temperature=0.7),
    "sample_rows, top_p": lambda: draws(top_p=0.8),
}


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_ops(run, backend, default):
    with lk.use_backend(backend):
        same(RUNS[run], default)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_a_training_step(model, default):
    tokens = torch.arange(40).view(4, 10) % 11

    def step():
        model.zero_grad()
        out = model.train().loss(tokens, num_loops=2, seed=5)
        out.loss.backward()
        return [
            out.loss.detach(),
            out.nll_sum,
            out.t,
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    same(step, default)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_samples(model, order, default):
    pace = {} if order == "first_hitting" else {"steps": 5}

    def run():
        out = sample(
            model.eval(),
            num_samples=3,
            length=8,
            order=order,
            plan=2,
            seed=1,
            top_p=0.9,
            progress=False,
            **pace,
        )
        return [out.tokens]

    same(run, default)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_remasked_samples(model, default):
    from loopmdm.sampling.remasking import Remasking

    def run(**options):
        out = sample(
            model.eval(), num_samples=3, length=8, steps=6, plan=2, seed=1, progress=False, **options
        )
        return [out.tokens]

    same(lambda: run(reference_numerics=True), default)
    same(lambda: run(remask=Remasking("rescale", 0.2)), default)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_logits_of_models_made_before(model, default):
    tokens = torch.arange(20).view(2, 10) % 12
    same(lambda: [model.eval()(tokens, num_loops=2).detach()], default)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_evaluation(model, default):
    tokens = torch.arange(20).view(2, 10) % 11

    def run():
        (result,) = evaluate_nll(model.eval(), [tokens], num_loops=[2], num_t=3)
        return [torch.tensor(result.nll, dtype=torch.float64)]

    same(run, default)
