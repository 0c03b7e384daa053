"""Sampling sees the logits that training computes, bit for bit."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.types import RowRng

LOOPS = 3


@pytest.fixture(scope="module")
def model():
    config = LoopMDMConfig(
        vocab_size=130,
        mask_token_id=129,
        hidden_size=32,
        num_heads=2,
        num_layers=4,
        cond_dim=16,
        max_length=24,
        dropout=0.0,
        max_loops=LOOPS,
        gate_init=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LoopMDM(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 129, (3, 20), generator=generator)
    return torch.where(torch.rand(3, 20, generator=generator) < 0.5, 129, clean)


def logits(model, tokens, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.hidden(tokens, num_loops=LOOPS)
        return hidden, lk.head_logits(hidden, model.head(), compute_dtype=model.compute_dtype)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.by_backend(
    "dtype", reference=[torch.float32, torch.bfloat16], cpu=[torch.float32, torch.bfloat16]
)
def test_logits_of_sampling_are_those_of_training(backend, dtype, model, tokens):
    model.train()
    trained = logits(model, tokens, dtype)
    assert all(value.requires_grad for value in trained)  # the pass that is recorded for backward
    model.eval()
    with torch.inference_mode():  # as the sampler runs it
        sampled = logits(model, tokens, dtype)
        for ours, theirs in zip(trained, sampled, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours.detach(), theirs)
        if backend.kind != "reference":  # PyTorch's own products depend on the number of rows
            for row in range(len(tokens)):
                for ours, theirs in zip(trained, logits(model, tokens[row : row + 1], dtype), strict=True):
                    assert torch.equal(ours[row].detach(), theirs[0])


@pytest.mark.backends("reference", "cpu")
@pytest.mark.by_backend(
    "dtype", reference=[torch.float32, torch.bfloat16], cpu=[torch.float32, torch.bfloat16]
)
def test_log_probabilities_of_sampling_and_of_training(backend, dtype, model, tokens):
    """The loss has the same bits with and without gradients; the draw's differ by the rounding of a sum."""
    hidden, rows = logits(model, tokens, dtype)[0].detach(), (tokens == 129).flatten().nonzero().squeeze(1)
    plain = model.head()
    # Of fp32 parameters a loss in bf16 rounds the weight only where the processor multiplies in bf16.
    head = plain._replace(weight=plain.weight.detach().to(dtype))

    def nll(values, targets):
        ones = torch.ones(len(rows))
        return lk.masked_cross_entropy(values, head, targets, rows, ones, compute_dtype=dtype)[1]

    with torch.no_grad():
        rng = RowRng(3, rows // 20, torch.zeros_like(rows), rows % 20)
        drawn = lk.sample_rows(hidden, head, rows, rng, compute_dtype=dtype)
        targets = tokens.flatten().scatter(0, rows, drawn.token).view_as(tokens)
        sampled = nll(hidden, targets)
    trained = nll(hidden.clone().requires_grad_(), targets)
    assert trained.requires_grad and torch.equal(trained.detach(), sampled)
    # A sum of V numbers one by one, its logarithm, and a difference of numbers up to `size`.
    size = float(sampled.max()) + 8
    assert (sampled + drawn.log_prob).abs().max() <= (130 + 4 * size) * 2.0**-24
