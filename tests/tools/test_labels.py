"""forward(input_ids, labels=...): the loss, to trainers and wrappers that know `forward` only."""

from __future__ import annotations

import pytest
import torch


def test_labels_give_the_loss_of_the_same_draws(model, tokens):
    model.train()
    torch.manual_seed(5)
    expected = model.loss(tokens)
    torch.manual_seed(5)
    got = model(tokens, labels=tokens.clone())
    assert torch.equal(got.loss, expected.loss) and got.num_loops == expected.num_loops
    assert got[0] is got.loss


def test_ignored_labels_are_given_tokens(model, tokens):
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :6] = True
    torch.manual_seed(5)
    expected = model.loss(tokens, prompt_mask=prompt, num_loops=2)
    torch.manual_seed(5)
    got = model(tokens, labels=tokens.masked_fill(prompt, -100), num_loops=2)
    assert torch.equal(got.loss, expected.loss) and int(got.num_tokens) == 20


def test_autocast_reaches_the_loss(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        narrow = model(tokens, labels=tokens).loss
    torch.manual_seed(5)
    wide = model(tokens, labels=tokens).loss
    assert narrow != wide
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=2e-2)


def test_bad_labels(model, tokens):
    with pytest.raises(ValueError, match=r"labels: differ from input_ids .* mlm=False"):
        model(tokens, labels=tokens.flip(1))
    with pytest.raises(ValueError, match=r"labels: got torch\.int64 of shape \(2, 15\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match=r"labels: got torch\.float32"):
        model(tokens, labels=tokens.float())
    with pytest.raises(ValueError, match="timesteps: given with labels"):
        model(tokens, torch.rand(2), labels=tokens)
    with pytest.raises(ValueError, match="contains the mask token 39"):
        model(tokens.fill_(39), labels=tokens)
    with pytest.raises(ValueError, match="no token is left to count"):
        model(tokens.fill_(0), labels=torch.full_like(tokens, -100))


def test_rows_may_be_a_mask(model, tokens):
    import loopmdm_kernels as lk

    hidden, head = model.hidden(tokens, num_loops=1).detach().requires_grad_(), model.head()
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    rows = masked.flatten().nonzero().squeeze(1)
    total, nll = lk.masked_cross_entropy(hidden, head, tokens, rows, weights.flatten()[rows])
    (expected,) = torch.autograd.grad(total + nll.square().sum(), hidden, retain_graph=True)
    got_total, got_nll = lk.masked_cross_entropy(hidden, head, tokens, masked, weights)
    (got,) = torch.autograd.grad(got_total + got_nll.square().sum(), hidden)
    assert torch.equal(got_total, total) and torch.equal(got, expected)
    assert torch.equal(got_nll[masked], nll) and not got_nll[~masked].any()
    with pytest.raises(ValueError, match="row_weights: got shape"):
        lk.masked_cross_entropy(hidden, head, tokens, masked, weights.flatten()[rows])
    with pytest.raises(ValueError, match="rows: got shape"):
        lk.masked_cross_entropy(hidden, head, tokens, masked[:1], weights)
