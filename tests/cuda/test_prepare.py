"""What is done before a call's kernel, by its source on the CPU: weights, modulation, counters."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels.cuda import driver, prepare, refresh, weights
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.schedule import BlockShape, Tiles, build
from loopmdm_kernels.schedule.table import FINAL
from loopmdm_kernels.testing import looped_inputs
from tests.cuda import emulated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = BlockShape(3, 20, 128, 2, 512, 2)
TILES = Tiles(64, 128, 64, 128, 64, 2)


@pytest.fixture(autouse=True)
def forgotten():
    weights.clear()
    yield
    weights.clear()


def named(dtype):
    return str(dtype).removeprefix("torch.")


def stack(dtype, seed=0):
    inputs = looped_inputs(3, 20, 128, 2, per_sequence_modulation=True, seed=seed)
    return inputs, [type(block)(*(t.to(dtype) for t in block)) for block in inputs.blocks]


def run(packed, modulation, loops=2, *, adaptive=False):
    """What the kernel begins with."""
    table = build(SHAPE, TILES, adaptive=adaptive)
    buffers = op.Buffers.allocate(table, torch.empty(3, 20, 128), packed, modulation, loops, None, None)
    for tensor in prepare.written(buffers).values():
        tensor.fill_(7)
    emulated.run_prepare(table, packed, modulation, loops, buffers)
    return table, buffers


def folded(modulation, norms):
    """(affine, gate) by PyTorch; norms [n, 2, D]."""
    n, sequences, _, hidden = modulation.shape
    shift, scale, gate = modulation.reshape(n, sequences, 2, 3, hidden).float().unbind(3)
    norm = norms[:, None].expand_as(scale)
    gain = torch.addcmul(norm, norm, scale)
    pairs = [values.unflatten(-1, (-1, 2)) for values in (gain, shift)]
    return torch.cat(pairs, -1), gate


@pytest.fixture(params=DTYPES, ids=named)
def case(request):
    inputs, blocks = stack(request.param)
    return blocks, weights.packed(blocks), inputs.modulation


def test_what_was_written_through_data_is_packed_again(case):
    blocks, packed, modulation = case
    expected = [tensor.clone() for tensor in packed[:8]]
    packed.buffer.zero_()  # as if never packed: the first time, no fingerprint is like the parameter's
    for name in ("norms", "mlp_in_bias", "mlp_out_bias"):
        getattr(packed, name).zero_()
    run(packed, modulation)
    for got, wanted in zip(packed, expected, strict=False):
        assert torch.equal(got, wanted)
    # Every parameter, in a run of 256 bytes that begins anywhere.
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        for parameter in block:
            number = 256 // parameter.element_size()
            flat = parameter.data.view(-1)
            first = int(torch.randint(flat.numel() - min(number, flat.numel()) + 1, (), generator=generator))
            flat[first : first + number].add_(1)
    _, buffers = run(packed, modulation)
    again = weights._pack(blocks)
    for got, wanted in zip(packed[:8], again, strict=False):
        assert torch.equal(got, wanted)
    affine, gate = folded(modulation, again.norms)
    assert torch.equal(buffers.affine, affine) and torch.equal(buffers.gate, gate), "norms of the last launch"


def test_what_was_not_written_to_is_left_alone(case):
    blocks, packed, modulation = case
    run(packed, modulation)
    before = packed.refresh.fingerprints.clone()
    packed.buffer.fill_(7)
    blocks[1].mlp_in.data[-2:].neg_()
    run(packed, modulation)
    assert (packed.refresh.fingerprints != before).sum() == 1
    assert (packed.buffer != 7).sum() <= refresh.CHUNK
    assert torch.equal(packed.mlp_in[1, -2:], blocks[1].mlp_in[-2:].bfloat16())


def strided(modulation):
    """A part of the modulation of more layers, and of all six vectors of more sequences."""
    n, sequences, _, hidden = modulation.shape
    whole = torch.full((n + 2, sequences + 1, 6, hidden), torch.nan, dtype=modulation.dtype)
    whole[1:-1, 1:] = modulation
    return whole[1:-1, 1:]


def misaligned(modulation):
    whole = torch.empty(modulation.numel() + 1, dtype=modulation.dtype)
    whole[1:] = modulation.flatten()
    return whole[1:].view(modulation.shape)


def odd_rows(modulation):
    """A part of longer rows, which are an odd number of elements apart."""
    n, sequences, _, hidden = modulation.shape
    whole = torch.full((n, sequences, 6 * hidden + 1), torch.nan, dtype=modulation.dtype)
    whole[..., :-1] = modulation.flatten(2)
    return whole[..., :-1].unflatten(-1, (6, hidden))


LAYOUTS = {
    "dense": lambda modulation: modulation,
    "part": strided,
    "misaligned": misaligned,
    "odd rows": odd_rows,
    "for all sequences": lambda modulation: modulation[:, :1],
    "one row of many": lambda modulation: strided(modulation)[:, :1],
    "columns first": lambda modulation: modulation.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda modulation: modulation[:, :1].expand(modulation.shape),
}


@pytest.mark.parametrize("of_weights", DTYPES, ids=named)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_and_modulation_are_folded(layout, dtype, of_weights):
    """To the bits of the operations that PyTorch has for it."""
    inputs, blocks = stack(of_weights)
    modulation = LAYOUTS[layout](inputs.modulation.to(dtype))
    packed = weights.packed(blocks)
    affine, gate = folded(modulation, packed.norms)
    norms_only = refresh.Refresh(*(each[: packed.norms.shape[0] * 2] for each in packed.refresh))
    for given in (norms_only, None):
        _, buffers = run(packed._replace(refresh=given), modulation)
        assert torch.equal(buffers.affine, affine) and torch.equal(buffers.gate, gate)


def test_what_the_kernel_reads_is_not_copied():
    modulation = stack(torch.float32)[0].modulation
    for dtype in DTYPES:
        for layout in ("dense", "part", "for all sequences", "one row of many", "expanded"):
            given = LAYOUTS[layout](modulation.to(dtype))
            assert prepare.modulation_for_kernel(given) is given
        copied = prepare.modulation_for_kernel(LAYOUTS["columns first"](modulation.to(dtype)))
        assert copied.is_contiguous() and copied.dtype == torch.float32


@pytest.mark.parametrize("adaptive", [False, True])
def test_counters_begin_where_the_schedule_says(case, adaptive):
    table, buffers = run(case[1], case[2], 4, adaptive=adaptive)
    progress = 0 if adaptive else FINAL
    assert buffers.counters.tolist() == [0] * table.num_counters + [progress] * 3 + [0, 0]
    assert buffers.stop.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("loops", "expected"),
    [
        (torch.tensor([2, 9, 1]), [2, 9, 1, 9]),
        (torch.tensor([[2, 0], [3, 0], [5, 0]])[:, 0], [2, 3, 5, 5]),
        (torch.tensor([6]), [6, 6, 6, 6]),
    ],
    ids=["each", "a column", "one for all"],
)
def test_loops_of_each_sequence(case, loops, expected):
    assert run(case[1], case[2], loops)[1].stop.tolist() == expected


def test_more_sequences_than_lanes():
    inputs = looped_inputs(70, 2, 64, 1, num_blocks=1, per_sequence_modulation=True)
    table = build(BlockShape(70, 2, 64, 1, 256, 1), Tiles(64, 64, 64, 64, 64, 2))
    loops = torch.arange(70).flip(0) % 37 + 1
    packed = weights.packed(inputs.blocks)
    given = table, inputs.x, packed, inputs.modulation, loops, None, None
    buffers = op.Buffers.allocate(*given)
    emulated.run_prepare(table, packed, inputs.modulation, loops, buffers)
    assert buffers.stop.tolist() == [*loops.tolist(), 37]
    assert (buffers.counters == 0).sum() == table.num_counters + 2
    assert torch.equal(buffers.affine, folded(inputs.modulation, packed.norms)[0])


def test_parameters_that_the_kernel_cannot_read_are_packed_at_each_call():
    inputs = looped_inputs(1, 4, 128, 2)
    blocks = [block._replace(qkv=block.qkv.T.contiguous().T) for block in inputs.blocks]
    odd = [block._replace(qkv=misaligned(block.qkv.bfloat16())) for block in inputs.blocks]
    for unlike in (blocks, odd, inputs.to(torch.float64).blocks):
        packed = weights.packed(unlike)
        assert weights.packed(unlike) is not packed and packed.refresh is None
    assert not weights._known


def test_packed_weights_are_found_again(monkeypatch):
    """And a graph keeps what it reads; weights that it packs itself are not remembered."""
    capturing, kept = [True], []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(weights, "Shared", lambda *tensors: SimpleNamespace(writing=nullcontext))
    monkeypatch.setattr(driver, "release_l2", lambda device: None)
    monkeypatch.setattr(weights, "keep_for_graphs", lambda entry: kept.append((entry.packed, capturing[0])))
    blocks = stack(torch.bfloat16)[1]
    own = weights.packed(blocks)
    assert own.refresh is own.shared is None and weights.packed(blocks) is not own and not weights._known
    capturing[0] = False
    first = weights.packed(blocks)
    assert weights.packed(blocks) is first and first.refresh is not None
    capturing[0] = True
    assert weights.packed(blocks) is first
    weights.clear()
    assert [packed is first and captured for packed, captured in kept] == [False, True]


def test_the_kernel_compiles():
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from loopmdm_kernels.cuda import compiler, sources

    source = sources.folder() / "cuda" / prepare.SOURCE
    for architecture in ("sm_80", "sm_90a"):
        assert compiler.with_nvrtc(source, ["-std=c++17"], architecture)
