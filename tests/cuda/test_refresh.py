"""Packed weights after writes that no version shows: the kernel's source on the CPU, and who launches it."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels.cuda import driver, refresh, weights
from loopmdm_kernels.testing import looped_inputs
from tests.cuda import emulated


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.compile_kernel(refresh.SOURCE, {}, tmp_path_factory.mktemp("refresh"))


def run(library, work):
    arguments = refresh.Arguments(work.chunks.data_ptr(), work.fingerprints.data_ptr())
    finished = library.run_kernel(ctypes.byref(arguments), len(work.chunks), refresh.THREADS, 0)
    assert finished, emulated.fault(library)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def case(request):
    weights.clear()
    inputs = looped_inputs(1, 4, 128, 2).to(torch.bfloat16)
    blocks = [type(block)(*(t.to(request.param) for t in block)) for block in inputs.blocks]
    packed = weights.packed(blocks)
    (entry,) = weights._known.values()
    yield blocks, packed, entry.refresh
    weights.clear()


def test_what_was_written_through_data_is_packed_again(library, case):
    blocks, packed, work = case
    expected = [tensor.clone() for tensor in packed]
    packed.buffer.zero_()  # as if never packed: the first time, no fingerprint is like the parameter's
    for name in ("norms", "mlp_in_bias", "mlp_out_bias"):
        getattr(packed, name).zero_()
    run(library, work)
    for got, wanted in zip(packed, expected, strict=True):
        assert torch.equal(got, wanted)
    # Every parameter, in a run of 256 bytes that begins anywhere.
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        for parameter in block:
            number = 256 // parameter.element_size()
            flat = parameter.data.view(-1)
            first = int(torch.randint(flat.numel() - min(number, flat.numel()) + 1, (), generator=generator))
            flat[first : first + number].add_(1)
    run(library, work)
    again = weights._pack(blocks)
    for got, wanted in zip(packed, again, strict=True):
        assert torch.equal(got, wanted)


def test_what_was_not_written_to_is_left_alone(library, case):
    blocks, packed, work = case
    run(library, work)
    before = work.fingerprints.clone()
    packed.buffer.fill_(7)
    blocks[1].mlp_in.data[-2:].neg_()
    run(library, work)
    assert (work.fingerprints != before).sum() == 1
    assert (packed.buffer != 7).sum() <= refresh.CHUNK
    assert torch.equal(packed.mlp_in[1, -2:], blocks[1].mlp_in[-2:].bfloat16())


def test_parameters_that_the_kernel_cannot_read_are_packed_at_each_call():
    weights.clear()
    inputs = looped_inputs(1, 4, 128, 2)
    blocks = [block._replace(qkv=block.qkv.T.contiguous().T) for block in inputs.blocks]
    for unlike in (blocks, inputs.to(torch.float64).blocks):
        assert weights.packed(unlike) is not weights.packed(unlike)
    assert not weights._known


def test_a_call_that_finds_packed_weights_refreshes_them(monkeypatch):
    """And a graph keeps what it reads; one that packs itself is not remembered."""
    weights.clear()
    launched, capturing = [], [False]
    monkeypatch.setattr(refresh.Refresh, "launch", lambda self: launched.append(self))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(weights, "Shared", lambda *tensors: SimpleNamespace(writing=nullcontext))
    monkeypatch.setattr(driver, "release_l2", lambda device: None)
    kept = []
    monkeypatch.setattr(weights, "keep_for_graphs", lambda entry: kept.append((entry.packed, capturing[0])))
    blocks = looped_inputs(1, 4, 128, 2).to(torch.bfloat16).blocks
    capturing[0] = True
    assert weights.packed(blocks) is not weights.packed(blocks)
    assert not weights._known and not launched
    capturing[0] = False
    first = weights.packed(blocks)
    assert len(launched) == 1 and weights.packed(blocks) is first and len(launched) == 2
    capturing[0] = True
    assert weights.packed(blocks) is first and len(launched) == 3
    weights.clear()
    assert kept == [(first, False), (first, True)]


def test_the_kernel_compiles(tmp_path):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from loopmdm_kernels.cuda import compiler, sources

    source = sources.folder() / "cuda" / refresh.SOURCE
    for architecture in ("sm_80", "sm_90a"):
        assert compiler.with_nvrtc(source, ["-std=c++17"], architecture)
