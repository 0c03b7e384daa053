"""Network calls of the CUDA kernels as CUDA graphs, recorded launch by launch from the emulation."""

from functools import partial

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, sample
from loopmdm_kernels import graphs
from loopmdm_kernels.testing import RecordedGraphs, looped_inputs
from tests.cuda import emulated_ops

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model():
    config = LoopMDMConfig(
        12, 11, hidden_size=64, num_heads=4, num_layers=2, cond_dim=8, max_length=3, loop_start=0, loop_end=1
    )
    made, generator = LoopMDM(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        for block in made.blocks:
            block.adaLN_modulation.bias.add_(1)
    return made.to(BF16)


@pytest.fixture(params=["looped_blocks_sm90", "looped_rows_sm90"])
def gpu(request, emulated_kernels, tmp_path):
    by_rows = request.param == "looped_rows_sm90"
    with emulated_ops.emulation(emulated_kernels, tmp_path, by_rows=by_rows) as state:
        state.looped = request.param
        yield state


def test_sampling_waits_for_nothing(model, gpu):
    """Sequences with different limits and early exits: nothing is read inside the graph."""
    recorded = RecordedGraphs()
    parts = [(1, ComputePlan.adaptive(0.5, most)) for most in (3, 2, 3)]
    run = partial(sample, model, 2, order="first_hitting", plan=ComputePlan.segments(parts), history=True)
    with lk.use_backend("cuda"):
        plain = run()
        launched = len(gpu.launches)
        with graphs.captured_by(recorded):
            graphed = run(cuda_graphs=True)
    assert torch.equal(plain.tokens, graphed.tokens) and torch.equal(plain.loops, graphed.loops)
    for event, other in zip(plain.history, graphed.history, strict=True):
        assert all(map(torch.equal, event[1:], other[1:]))
    assert recorded.captures == 1 and recorded.replays >= 1
    names = {name for name, _ in gpu.launches[launched:]}
    assert {gpu.looped, "sample_rows_sm90", "sample_rows_combine_sm90"} <= names


@pytest.mark.parametrize("chosen", ["cuda", "triton", "cuda,triton"])
def test_backends_that_can_be_captured(chosen, monkeypatch):
    monkeypatch.setenv("LOOPMDM_BACKEND", chosen)
    assert graphs.why_not(torch.device("cuda")) is None


@pytest.mark.parametrize("chosen", ["", "reference", "cuda,reference"])
def test_other_backends_are_refused(chosen, monkeypatch):
    monkeypatch.setenv("LOOPMDM_BACKEND", chosen)
    assert "only the backends cuda and triton can be captured" in graphs.why_not(torch.device("cuda"))


def test_padding_of_a_backend_whose_bits_know_no_tiles(monkeypatch):
    """Triton, if it may do a call in place of CUDA, keeps its tiles."""
    launch = pytest.importorskip("loopmdm_kernels.triton.launch", reason="Triton is not installed")
    block = looped_inputs(1, 2, 768, 12, 1).blocks[0]
    sizes = {}
    with launch.recording(launch.Processor(90, 132)):
        for chosen in ("cuda", "triton", "cuda,triton"):
            monkeypatch.setenv("LOOPMDM_BACKEND", chosen)
            arguments = (40, 128, block, 12, BF16, torch.device("cpu"))
            sizes[chosen] = [graphs.padded_batch(batch, *arguments) for batch in (5, 7, 9, 13, 30)]
    assert sizes["cuda"] == [6, 8, 12, 16, 32]
    assert sizes["cuda,triton"] == sizes["triton"]
