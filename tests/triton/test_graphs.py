"""Network calls of the Triton kernels as CUDA graphs; without a GPU, recorded from the interpreter."""

from contextlib import nullcontext

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, sample
from loopmdm.sampling import graphs as network_graphs
from loopmdm_kernels.graphs import CudaGraphs, captured_by, padded_batch
from loopmdm_kernels.testing import RecordedGraphs, looped_inputs
from loopmdm_kernels.triton.launch import Processor, recording
from loopmdm_kernels.triton.padding import launches

BF16 = torch.bfloat16


def random_model(device, dtype=BF16, **sizes):
    settings = {"vocab_size": 12, "mask_token_id": 11, "hidden_size": 16, "num_heads": 1, "num_layers": 2}
    settings |= {"cond_dim": 8, "max_length": 3, "loop_start": 0, "loop_end": 1, "max_loops": 3}
    model = LoopMDM(LoopMDMConfig(**{**settings, **sizes}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        for block in model.blocks:
            block.adaLN_modulation.bias.add_(1)
    return model.to(device, dtype)


def both(model, **options):
    """Samples without and with graphs: the same bits."""
    with lk.use_backend("triton"):
        plain = sample(model, history=True, **options)
        graphed = sample(model, history=True, cuda_graphs=True, **options)
    assert torch.equal(plain.tokens, graphed.tokens) and torch.equal(plain.loops, graphed.loops)
    for event, other in zip(plain.history, graphed.history, strict=True):
        assert all(map(torch.equal, event[1:], other[1:]))


def test_sampling_waits_for_nothing(device):
    """Sequences with different limits and early exits: nothing is read inside the graph."""
    parts = [(1, ComputePlan.adaptive(0.5, most)) for most in (3, 2, 3)]
    options = {"num_samples": 2, "length": 3, "order": "first_hitting", "plan": ComputePlan.segments(parts)}
    recorded = RecordedGraphs()
    with captured_by(recorded) if device.type == "cpu" else nullcontext():
        both(random_model(device), **options)
    assert device.type == "cuda" or (recorded.captures == 1 and recorded.replays >= 1)


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


GPU_PLANS = [
    12,
    ComputePlan.table([2] * 40 + [5] * 48 + [3] * 40),
    ComputePlan.by_mask_ratio([4, 12, 7, 2]),
    ComputePlan.adaptive(0.05, 12, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS, ids=str)
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_sampling_on_a_gpu(device, plan, order):
    sizes = {"hidden_size": 256, "num_heads": 4, "vocab_size": 1003, "mask_token_id": 1002, "cond_dim": 64}
    model = random_model(device, max_length=96, num_layers=4, loop_start=1, loop_end=3, max_loops=12, **sizes)
    both(model, num_samples=13, length=[96] * 9 + [50] * 4, steps=128, plan=plan, order=order, seed=3)


@pytest.mark.gpu
def test_models_conditioned_on_time_on_a_gpu(device):
    model = random_model(device, max_length=64, num_layers=3, hidden_size=128, time_conditioning=True)
    both(model, num_samples=5, length=64, steps=64, plan=3)


@pytest.mark.gpu
def test_graphs_share_memory(device, monkeypatch):
    """Many graphs of one run take the pool of the largest; those that are forgotten give theirs back."""
    model = random_model(device, max_length=256, hidden_size=512, num_heads=8)
    captures, reserved = [], []
    capture = CudaGraphs.__call__

    def counting(self, call):
        replay = capture(self, call)
        captures.append(1)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(device))
        return replay

    monkeypatch.setattr(CudaGraphs, "__call__", counting)
    monkeypatch.setattr(network_graphs, "MAX_GRAPHS", 4)
    plan = ComputePlan.table([1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6] * 3)
    with lk.use_backend("triton"):
        sample(model, 16, length=256, plan=plan, order="random", cuda_graphs=True)
    assert len(captures) >= 18
    assert max(reserved) < 1.5 * reserved[0]
