"""What benchmarks compare with computes what the ops compute."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.peers import EAGER, flashinfer_rows, linear_losses, plain_ops, row_logits
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.testing import head_inputs


def test_a_model_of_plain_functions_is_the_model():
    torch.manual_seed(0)
    config = LoopMDMConfig(
        65,
        64,
        hidden_size=32,
        num_heads=2,
        num_layers=4,
        cond_dim=8,
        max_length=16,
        dropout=0.0,
        gate_init=1.0,
    )
    model, ids = LoopMDM(config), torch.randint(0, 64, (3, 16))
    torch.nn.init.normal_(model.output_layer.linear.weight, std=0.1)

    def results():
        loss = model.loss(ids, num_loops=2, seed=0).loss
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        return [model(ids, num_loops=2), loss, *gradients]

    ours = results()
    assert ours[0].std() > 0.1
    with plain_ops(EAGER):
        theirs = results()
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_losses_of_torch_are_those_of_these_rows():
    hidden, head = head_inputs(2, 9, 16, 40)
    targets, rows = torch.randint(40, (2, 9)), torch.tensor([1, 4, 17])
    logits = F.linear(hidden.flatten(0, 1)[rows], head.weight, head.bias)
    expected = F.cross_entropy(logits, targets.flatten()[rows], reduction="sum")
    losses = linear_losses(hidden, head, targets, rows)
    assert {"linear_cross_entropy, plain", "linear_cross_entropy, auto"} < set(losses)
    for loss in losses.values():
        torch.testing.assert_close(loss(), expected)


def test_flashinfer_draws_from_the_logits_of_these_rows(monkeypatch):
    greedy = SimpleNamespace(sampling_from_logits=lambda logits: logits.argmax(-1))
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(sampling=greedy))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", greedy)
    hidden, head = head_inputs(2, 9, 16, 40, excluded_token=3)
    rows = torch.tensor([1, 4, 17])
    logits = row_logits(hidden, head, rows, head.bias, torch.float32)
    logits[:, 3] = float("-inf")
    assert torch.equal(flashinfer_rows(hidden, head, rows), logits.argmax(-1))
