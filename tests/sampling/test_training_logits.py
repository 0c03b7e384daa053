"""Sampling sees the logits that training computes, bit for bit."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig

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
