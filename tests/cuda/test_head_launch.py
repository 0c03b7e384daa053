"""A call of the head's ops on its way to the driver, by a driver that takes notes."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels.cuda import driver, head, launch, sample_rows, tensor_maps
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head
from tests.cuda.emulated import on_cuda
from tests.cuda.fake_driver import SUCCESS, FakeDriver, real


@pytest.fixture
def notes(monkeypatch):
    """What is compiled, mapped and launched."""
    notes = SimpleNamespace(compiled=[], maps=[], launches=[])

    def encode(kind, rank, address, sizes, strides, box, *_):
        notes.maps.append((int(address), *([int(word) for word in words] for words in (sizes, strides, box))))
        return SUCCESS, real.CUtensorMap()

    def start(config, function, pointers, extra):
        (address,) = (ctypes.c_void_p * 1).from_address(pointers)
        name = function.decode()
        size = ctypes.sizeof(sample_rows.Parameters) if name == "sample_rows_sm90" else 0
        notes.launches.append((name, config, ctypes.string_at(address, size)))
        return (SUCCESS,)

    def compiled(source, macros, architecture):
        notes.compiled.append((source, macros, architecture))
        return b"cubin"

    FakeDriver(cuTensorMapEncodeTiled=encode, cuLaunchKernelEx=start).install(monkeypatch)
    monkeypatch.setattr(launch, "compile_kernel", compiled)
    monkeypatch.setattr(driver, "facts", lambda device: SimpleNamespace(sms=132))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    for cached in (launch.loaded, tensor_maps.encode):
        cached.cache_clear()
    yield notes
    for cached in (launch.loaded, tensor_maps.encode):
        cached.cache_clear()


@pytest.mark.parametrize(("num_rows", "rows_of_tile", "blocks"), [(40, 64, 5), (3000, 128, 132)])
def test_a_draw(notes, num_rows, rows_of_tile, blocks):
    hidden, weights = head_inputs(1, 3000, 72, 2500)
    head_ = Head(*(t.to(torch.bfloat16) for t in weights[:4]), 2499)
    rng = row_rng(num_rows, seed=3)
    on_cuda("sample_rows")(hidden.float(), head_, torch.arange(num_rows), rng)

    names = [name for name, _, _ in notes.launches]
    assert names == ["modulated_rows_sm90", "sample_rows_sm90", "sample_rows_combine_sm90"]
    assert notes.compiled[1] == ("head/sample_rows_sm90.cu", {"LOOPMDM_ROWS": rows_of_tile}, "sm_90a")
    for _, config, _ in notes.launches:
        assert int(config.hStream) == 77
    rows, product, combine = (config for _, config, _ in notes.launches)
    assert rows.numAttrs == combine.numAttrs == 0, "in order, not cooperative"
    pair = rows_of_tile // 64  # blocks in a cluster
    sizes = [attribute.value.clusterDim.x for attribute in product.attrs[: product.numAttrs]]
    assert sizes == ([2] if pair == 2 else [])
    assert (
        (rows.gridDimX, rows.blockDimX) == (combine.gridDimX, combine.blockDimX) == (-(-num_rows // 8), 256)
    )
    kernel = head.with_logits(sample_rows.SOURCE, rows_of_tile)
    assert (product.gridDimX, product.blockDimX) == (blocks, 384)
    assert product.sharedMemBytes == kernel.shared_bytes

    # Rows [R, D] in boxes of a tile, the weight [V, D] in boxes of a chunk.
    (_, sizes, strides, box), (address, *weight) = notes.maps
    assert (sizes, strides[0], box) == ([72, num_rows, 1], 144, [64, rows_of_tile, 1])
    assert address == head_.weight.data_ptr()
    assert weight == [[72, 2500, 1], [144, 144 * 2500], [64, 256 // pair, 1]]

    given = sample_rows.Parameters.from_buffer_copy(notes.launches[1][2])
    problem = given.problem
    tiles = -(-num_rows // (pair * rows_of_tile)), -(-10 // (128 // rows_of_tile))
    assert (problem.row_tiles, problem.column_tiles, problem.tiles) == (*tiles, tiles[0] * tiles[1])
    assert (problem.num_rows, problem.vocab_size, problem.excluded_token) == (num_rows, 2500, 2499)
    assert problem.steps == 2
    assert (given.seed, given.inverse_temperature) == (3, 1.0)
    assert given.sequence == rng.sequence.data_ptr() and given.position == rng.position.data_ptr()


def test_nothing_is_launched_for_no_rows(notes):
    hidden, weights = head_inputs(1, 8, 72, 300)
    head_ = Head(*(t.to(torch.bfloat16) for t in weights[:4]))
    on_cuda("sample_rows")(hidden.float(), head_, torch.arange(0), row_rng(0))
    assert not notes.launches and not notes.compiled
