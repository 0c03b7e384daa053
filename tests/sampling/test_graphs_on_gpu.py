"""CUDA graphs of network calls on a GPU (`make gpu`): the bits of runs without them, and bounded memory."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, sample
from loopmdm.sampling import graphs as network_graphs
from loopmdm_kernels.graphs import CudaGraphs

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "num_heads": 4, "vocab_size": 1003, "mask_token_id": 1002, "max_loops": 12}
PLANS = [
    12,
    ComputePlan.table([2] * 40 + [5] * 48 + [3] * 40),
    ComputePlan.by_mask_ratio([4, 12, 7, 2]),
    ComputePlan.adaptive(0.05, 12, 2),
]


@pytest.fixture
def reserved(monkeypatch):
    """Bytes that torch holds after each capture."""
    capture, sizes = CudaGraphs.__call__, []

    def noting(self, call):
        replay = capture(self, call)
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_reserved())
        return replay

    monkeypatch.setattr(CudaGraphs, "__call__", noting)
    return sizes


def check(model, reserved, *, backend="triton", **options):
    """Samples without and with graphs are the same bits."""
    with lk.use_backend(backend):
        plain = sample(model, history=True, **options)
        graphed = sample(model, history=True, cuda_graphs=True, **options)
    assert reserved
    assert torch.equal(plain.tokens, graphed.tokens) and torch.equal(plain.loops, graphed.loops)
    for event, other in zip(plain.history, graphed.history, strict=True):
        assert all(map(torch.equal, event[1:], other[1:]))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_samples(make_model, reserved, plan, order, dtype):
    model = make_model(**SIZES, max_length=96).to("cuda", dtype)
    check(model, reserved, length=[96] * 9 + [50] * 4, steps=128, plan=plan, order=order, seed=3)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_cuda_kernels(make_model, reserved, plan):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    model = make_model(**SIZES, max_length=96).to("cuda", torch.bfloat16)
    check(model, reserved, backend="cuda", length=[96] * 9 + [50] * 4, steps=64, plan=plan, seed=3)


def test_autocast_and_conditioning_on_time(make_model, reserved):
    model = make_model(**SIZES, max_length=64, time_conditioning=True).cuda()
    check(model, reserved, num_samples=5, length=64, steps=64, plan=3, dtype=torch.bfloat16)


def test_draws_behind_the_graph(make_model, reserved):
    model = make_model(**SIZES, max_length=64).to("cuda", torch.bfloat16)
    check(model, reserved, num_samples=5, length=64, steps=64, plan=3, top_k=20, top_p=0.9)


def test_two_models_and_changed_weights(make_model, reserved):
    heavy, light = (make_model(**SIZES, max_length=64, num_layers=n).cuda() for n in (4, 3))
    plan = ComputePlan.parse("L16,H32,L16", light=light, heavy=heavy)
    for _ in range(2):
        check(heavy, reserved, num_samples=5, length=64, steps=64, plan=plan)
        with torch.no_grad():
            heavy.blocks[1].attn_qkv.weight.mul_(1.5)
            light.blocks[1].attn_out.weight = torch.nn.Parameter(light.blocks[1].attn_out.weight * 1.5)


def test_graphs_share_memory(make_model, reserved, monkeypatch):
    """All graphs of a run take the pool of the largest."""
    monkeypatch.setattr(network_graphs, "MAX_GRAPHS", 4)
    model = make_model(**SIZES, max_length=256).to("cuda", torch.bfloat16)
    plan = ComputePlan.table([loops for loops in range(1, 9) for _ in range(4)] * 2)
    with lk.use_backend("triton"):
        sample(model, 16, length=256, plan=plan, order="random", cuda_graphs=True)
    assert len(reserved) == 16
    assert max(reserved) < 1.2 * reserved[0]
