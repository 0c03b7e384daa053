"""Tile sizes, their table, how launches are written down, and offsets beyond 2^31."""

import json
from contextlib import contextmanager

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.calls import CrossEntropyCall, Draw, LoopedCall, SampleCall
from loopmdm_kernels.testing import head_inputs, looped_inputs, reference, row_rng
from loopmdm_kernels.triton import launch as launching
from loopmdm_kernels.triton import looped_blocks, masked_cross_entropy, sample_rows
from loopmdm_kernels.triton.config import KERNELS, Tiles, default_tiles, key, tiles
from loopmdm_kernels.triton.launch import Processor, recording
from loopmdm_kernels.types import BlockWeights, Head, RowRng

H200 = Processor(90, 132)
BF16 = torch.bfloat16


def test_large_tiles_where_they_fill_the_processor():
    small, large = (default_tiles("linear", (rows, 3072, 768), BF16, H200) for rows in (128, 16384))
    assert small.m * small.n < large.m * large.n
    assert default_tiles("linear", (16384, 3072, 768), torch.float32, H200) != large


@pytest.mark.parametrize("kernel", ["vocabulary", "sample"])
def test_tiles_of_the_vocabulary_do_not_depend_on_the_rows(kernel):
    """So that a row's draw does not depend on its batch: V and D are all they are told."""
    assert len({default_tiles(kernel, (50258, 768), BF16, Processor(90, n)) for n in (1, 132, 1000)}) == 1


def test_tuned_table(tmp_path, monkeypatch):
    shape = (1024, 3072, 768)
    expected = Tiles(64, 128, 32, 4, 5)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({key("linear", shape, BF16, 90): list(expected)}))
    monkeypatch.setenv("LOOPMDM_TRITON_TILES", str(path))
    assert tiles("linear", shape, BF16, H200) == expected
    for other in (("linear", shape, torch.float16, H200), ("linear", shape, BF16, Processor(80, 132))):
        assert tiles(*other) == default_tiles(*other)
    path = tmp_path / "broken.json"
    path.write_text('{"linear": 5}')
    monkeypatch.setenv("LOOPMDM_TRITON_TILES", str(path))
    with pytest.raises(ValueError, match=r"LOOPMDM_TRITON_TILES: .*broken.json is no table of tiles"):
        tiles("linear", shape, BF16, H200)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel: got 'conv', expected one of " + ", ".join(KERNELS)):
        tiles("conv", (1,), BF16, H200)


def test_recorded_launches_are_those_of_the_processor():
    """Nothing runs, so tensors need no memory; one block of rows has a program for each chunk of tokens."""
    hidden, head = head_inputs(1, 64, 32, 4096)
    head = Head(*(t.to("meta", BF16) for t in head[:4]), 4095)
    rows = torch.arange(64, device="meta")
    rng = RowRng(0, *(name.to("meta") for name in row_rng(64)[1:]))
    with recording(H200) as launches:
        out = sample_rows.run(SampleCall(hidden.float().to("meta"), head, None, rows, Draw(rng)))
    assert out.token.shape == (64,)
    sample = launches[1]
    tile = default_tiles("sample", (4096, 32), BF16, H200)
    assert sample.grid == (64 // tile.m, 4096 // (4 * tile.n)) and sample.processor == H200
    assert sample.arguments["num_rows"] == 64 and sample.options["num_warps"] == tile.num_warps


class Kernel:
    """Notes its arguments and the device that was current."""

    def __init__(self, current):
        self.current, self.calls = current, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options, self.current[-1]))


@pytest.mark.parametrize("tensors_on", [0, 1])
def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch, tensors_on):
    """Device 0 is the current one, and is so again afterwards; it is not set where it is already."""
    current, entered = [0], []

    @contextmanager
    def device(wanted):
        entered.append(wanted.index)
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", tensors_on)

    tensor, kernel = torch.zeros(2).as_subclass(OnGpu), Kernel(current)
    launching.launch(kernel, (3,), None, tensor, 5, SIZE=7, num_warps=4, num_stages=2)
    launching.launch(kernel, (3, 0), tensor, num_warps=4, num_stages=2)  # nothing to do
    (call,) = kernel.calls
    assert call[0] == (3,) and call[1][0] is None and call[1][1] is tensor and call[1][2] == 5
    assert call[2] == {"SIZE": 7, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert call[3] == tensors_on and entered == [1] * tensors_on and current == [0]


@pytest.mark.gpu
def test_on_another_stream():
    """Results are ordered behind what the stream does before the call, and seen by what it does after."""
    q = torch.randn(1, 4, 256, 64, device="cuda", dtype=BF16)
    expected = reference.attention(2 * q, q, q).sum()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), lk.use_backend("triton"):
        torch.cuda._sleep(10_000_000)
        doubled = 2 * q
        total = lk.attention(doubled, q, q).sum()
    stream.synchronize()
    torch.testing.assert_close(total, expected, rtol=0.02, atol=0.5)


@pytest.mark.gpu
def test_on_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    hidden, head = head_inputs(2, 9, 64, 131)
    results = []
    for index in (0, 1):
        device = torch.device("cuda", index)
        narrow = Head(*(t.to(device, BF16).requires_grad_() for t in head[:4]))
        rows = torch.arange(9, device=device)
        targets = torch.zeros(2, 9, dtype=torch.int64, device=device)
        with torch.cuda.device(0), lk.use_backend("triton"):
            total, nll = lk.masked_cross_entropy(
                hidden.float().to(device), narrow, targets, rows, torch.ones(9, device=device)
            )
            total.backward()
        assert nll.device == device and torch.cuda.current_device() == 0
        results.append([nll.cpu(), narrow.weight.grad.cpu()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_grids_of_huge_tensors():
    """CUDA allows 2^31 - 1 programs in a row and 65535 in a column; x has 2^33 elements here."""
    batch, length, hidden_size = 2**10, 2**13, 2**10
    small = looped_inputs(1, 2, hidden_size, 8, 1).to(BF16, requires_grad=True)
    block = BlockWeights(*(w.detach().to("meta").requires_grad_() for w in small.blocks[0]))
    x = torch.empty(batch, length, hidden_size, device="meta", requires_grad=True)
    _, wide = head_inputs(1, 2, hidden_size, 4096)
    head = Head(*(t.to("meta", BF16).requires_grad_() for t in wide[:4]))
    rows = torch.empty(batch * length, dtype=torch.int64, device="meta")
    rng = RowRng(0, *(rows for _ in range(3)))
    with recording(H200) as launches:
        modulation = small.modulation.detach().to("meta")
        call = LoopedCall(x, [block], modulation, 1, num_heads=8, exit_threshold=0.1)
        looped_blocks.run(call)[0].sum().backward()
        loss = CrossEntropyCall(x, head, None, rows.view(batch, length), rows, rows.float())
        masked_cross_entropy.run(loss)[0].backward()
        sample_rows.run(SampleCall(x, head, None, rows, Draw(rng)))
    assert len({launch.kernel.__name__ for launch in launches}) == 16
    for launch in launches:
        assert launch.grid[0] < 2**31 and all(n < 2**16 for n in launch.grid[1:]), launch.kernel


def test_heads_that_attention_cannot_do(device):
    q = torch.zeros(1, 1, 4, 257, device=device)
    with lk.use_backend("triton"), pytest.raises(RuntimeError, match="the head size may be 256, got 257"):
        lk.attention(q, q, q)


def test_offsets_beyond_32_bits(device):
    """Rows of q more than 2^31 elements apart: only the pages that are used are ever there."""
    try:
        memory = torch.empty(2**31 + 2**30, dtype=BF16, device=device)
    except RuntimeError:
        pytest.skip("no address space for 6 GB")
    q = memory.as_strided((1, 1, 3, 16), (0, 0, 2**30 + 2**28, 1))
    q.copy_(torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)))
    k, v = (torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    k, v = k.to(device, BF16), v.to(device, BF16)
    with lk.use_backend("triton"):
        out = lk.attention(q, k, v)
    torch.testing.assert_close(out, reference.attention(q, k, v), rtol=0.02, atol=0.02)
