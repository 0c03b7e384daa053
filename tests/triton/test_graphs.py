"""Network calls of the Triton kernels as CUDA graphs; without a GPU, recorded from the interpreter."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, sample
from loopmdm_kernels.graphs import captured_by, padded_batch
from loopmdm_kernels.testing import RecordedGraphs, looped_inputs
from loopmdm_kernels.triton.launch import Processor, recording
from loopmdm_kernels.triton.padding import launches

BF16 = torch.bfloat16


def tiny_model(device):
    config = LoopMDMConfig(
        12, 11, hidden_size=16, num_heads=1, num_layers=2, cond_dim=8, max_length=3, loop_start=0, loop_end=1
    )
    model = LoopMDM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        for block in model.blocks:
            block.adaLN_modulation.bias.add_(1)
    return model.to(device, BF16)


def test_sampling_waits_for_nothing(device):
    """Sequences with different limits and early exits: nothing is read inside the graph."""
    model, recorded = tiny_model(device), RecordedGraphs()
    parts = [(1, ComputePlan.adaptive(0.5, most)) for most in (3, 2, 3)]
    run = partial(sample, model, 2, order="first_hitting", plan=ComputePlan.segments(parts), history=True)
    with lk.use_backend("triton"):
        plain = run()
        with captured_by(recorded) if device.type == "cpu" else nullcontext():
            graphed = run(cuda_graphs=True)
    assert torch.equal(plain.tokens, graphed.tokens) and torch.equal(plain.loops, graphed.loops)
    for event, other in zip(plain.history, graphed.history, strict=True):
        assert all(map(torch.equal, event[1:], other[1:]))
    assert device.type == "cuda" or (recorded.captures == 1 and recorded.replays >= 1)


def test_fp8_weights(device):
    """They are rounded before the capture, and lie where it reads them."""
    model, recorded = tiny_model(device), RecordedGraphs()
    model.use_fp8_weights()
    run = partial(sample, model, 1, plan=1, order="left_to_right")
    with lk.use_backend("triton"):
        plain = run()
        with captured_by(recorded) if device.type == "cpu" else nullcontext():
            graphed = run(cuda_graphs=True)
    assert torch.equal(plain.tokens, graphed.tokens)
    assert device.type == "cuda" or recorded.replays >= 1


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_padding_ends_where_tiles_change(arch):
    """128 tokens of the small preset; padded or not, a batch is computed in the same tiles."""
    block = looped_inputs(1, 2, 768, 12, 1).blocks[0]
    arguments = (128, block, 12, BF16, torch.device("cpu"))
    with recording(Processor(arch, 132)), lk.use_backend("triton"):
        padded = [padded_batch(batch, 40, *arguments) for batch in range(1, 41)]
        kinds = [launches(batch, *arguments) for batch in range(1, 41)]
    buckets = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40}
    changes = {batch for batch in range(1, 40) if kinds[batch - 1] != kinds[batch]}
    assert changes and set(padded) <= buckets | changes
    assert all(size >= batch and kinds[size - 1] == kinds[batch - 1] for batch, size in enumerate(padded, 1))
    assert len(set(padded)) < 16
