"""What benchmarks compare with computes what the ops compute."""

import torch

from bench.peers import EAGER, plain_ops
from loopmdm import LoopMDM, LoopMDMConfig


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
