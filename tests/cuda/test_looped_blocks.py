"""The host side of the kernels as far as it needs no GPU: packing, folding, buffers, parameters, launch."""

import ctypes
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loopmdm_kernels as lk
from bench.hopper_model import CountedNodes, nodes_of_a_call
from loopmdm_kernels import backends
from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.cuda import driver, launch, looped_rows, prepare, tensor_maps, weights
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda.parameters import MAP, fields
from loopmdm_kernels.cuda.targets import SM80, SM90, target_of
from loopmdm_kernels.schedule import BlockShape, Device, Tiles, build, choose, device_of
from loopmdm_kernels.schedule.plan import plan_with as plan_of
from loopmdm_kernels.testing import looped_inputs
from loopmdm_kernels.types import Rotary
from tests.cuda.emulated import on_cuda
from tests.cuda.fake_driver import hopper, real


@pytest.fixture
def inputs():
    weights.clear()
    yield looped_inputs(3, 20, 128, num_heads=2, key_mask=True, per_sequence_modulation=True).to(
        torch.bfloat16
    )
    weights.clear()


def prepared(inputs, loops, *, adaptive=False):
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    plan = choose(shape)
    table = build(shape, plan.tiles, adaptive=adaptive)
    words = table.encode()
    packed = weights.packed(inputs.blocks)
    buffers = op.Buffers.allocate(
        table, inputs.x, packed, inputs.modulation, loops, inputs.rotary, inputs.key_mask
    )
    return plan, table, words, packed, buffers


def test_weights_lie_in_one_buffer(inputs):
    packed = weights.packed(inputs.blocks)
    assert packed.buffer.numel() == sum(getattr(packed, name).numel() for name in weights.MATRICES)
    for layer, block in enumerate(inputs.blocks):
        for name in weights.MATRICES:
            view = getattr(packed, name)
            assert torch.equal(view[layer], getattr(block, name))
            assert view.untyped_storage().data_ptr() == packed.buffer.untyped_storage().data_ptr()
        assert torch.equal(packed.norms[layer], torch.stack((block.norm1, block.norm2)).float())
        assert torch.equal(packed.mlp_in_bias[layer], block.mlp_in_bias.float())
        assert torch.equal(packed.mlp_out_bias[layer], block.mlp_out_bias.float())


def test_weights_are_packed_again_when_they_change(inputs):
    first = weights.packed(inputs.blocks)
    assert weights.packed(inputs.blocks) is first
    with torch.no_grad():
        inputs.blocks[1].mlp_in.mul_(2)
    second = weights.packed(inputs.blocks)
    assert second is not first and torch.equal(second.mlp_in[1], inputs.blocks[1].mlp_in)
    other = [block._replace(qkv=block.qkv.clone()) for block in inputs.blocks]
    assert weights.packed(other) is not second
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()
    assert weights.packed(inputs.blocks) is not second
    for _ in range(20):
        weights.packed([block._replace(qkv=block.qkv.clone()) for block in inputs.blocks])
    assert len(weights._known) <= 8


def test_parameters(inputs):
    _, table, words, packed, buffers = prepared(inputs, 2, adaptive=True)
    parameters = op.pack_parameters(SM90, table, buffers, packed, words, 0.25)
    for name in fields(SM90.parameters, ctypes.c_void_p):
        if name not in ("table", "max_loops", "partial_values", "rows_values"):
            assert getattr(parameters, name) == getattr(buffers, name).data_ptr(), name
    assert parameters.partial_values is parameters.rows_values is None
    assert table.tiles.mlp_out_parts == 1 and table.tiles.part == 0
    assert parameters.table == words.data_ptr()
    assert parameters.max_loops == buffers.stop.data_ptr() + 4 * 3
    sizes = (parameters.size.enter, parameters.size.loop, parameters.size.leave)
    assert sizes == (len(table.enter), len(table.loop), len(table.leave))
    assert (parameters.batch, parameters.length, parameters.row_tiles) == (3, 20, 1)
    assert parameters.modulated_sequences == 3 and parameters.adaptive == 1
    assert parameters.exit_threshold == 0.25
    plain = inputs._replace(rotary=None, key_mask=None, modulation=inputs.modulation[:, :1])
    _, table, words, packed, buffers = prepared(plain, 2)
    parameters = op.pack_parameters(SM80, table, buffers, packed, words, None)
    for name in weights.MATRICES:
        assert getattr(parameters, f"{name}_weight") == getattr(packed, name).data_ptr()
    assert parameters.cosines is None and parameters.sines is None and parameters.key_mask is None
    assert parameters.modulated_sequences == 1 and parameters.adaptive == 0


def test_sums_of_parts_have_a_place(inputs):
    table = build(
        BlockShape(3, 20, 128, 2, 512, 2), Tiles(64, 128, 64, 128, 64, 2, mlp_out_parts=4, sum_rows=2)
    )
    packed = weights.packed(inputs.blocks)
    buffers = op.Buffers.allocate(table, inputs.x, packed, inputs.modulation, 2, None, None)
    assert buffers.partial_values.shape == (4, 3, 20, 128), "of each row of a sequence, and none beyond"
    assert buffers.rows_values.shape == (3, 20, 128) and buffers.change.shape == (3, 1, 32, 2)
    parameters = op.pack_parameters(SM90, table, buffers, packed, table.encode(), None)
    assert parameters.partial_values == buffers.partial_values.data_ptr()
    assert parameters.rows_values == buffers.rows_values.data_ptr()


def test_maps_cover_what_the_loader_loads(inputs):
    plan, table, _, packed, buffers = prepared(inputs, 2)
    layouts = op.map_layouts(table.shape, plan, buffers, packed)
    maps = fields(SM90.parameters, MAP)
    assert list(layouts) == [name for name in maps if name != "rows"], "no norms of their own"
    assert layouts["stream"].sizes == (128, 20, 6) and layouts["stream"].box == (32, plan.tiles.rows)
    assert layouts["qkv"].sizes == (384, 20, 6) and layouts["qkv"].box == (64, plan.tiles.rows)
    assert layouts["mlp_out_weight"].sizes == (512, 128, 2)
    assert layouts["mlp_out_weight"].box == (64, plan.tiles.mlp_out)


def test_blocks_of_a_pair_load_half_of_what_is_for_both(inputs):
    shape = op.shape_of(inputs.x, inputs.blocks, 2)
    plan = plan_of(shape, Device(), Tiles(256, 128, 64, 256, 128, part=32, blocks=2))
    table = build(shape, plan.tiles)
    packed = weights.packed(inputs.blocks)
    buffers = op.Buffers.allocate(table, inputs.x, packed, inputs.modulation, 2, None, None)
    layouts = op.map_layouts(shape, plan, buffers, packed)
    assert set(layouts) == set(fields(SM90.parameters, MAP))
    rows = {name: layouts[name].box[1] for name in layouts}
    assert rows == {
        "stream": 128, "mixed": 128, "gelu": 128, "rows": 128, "qkv": 64,
        "qkv_weight": 64, "attn_out_weight": 32, "mlp_in_weight": 128, "mlp_out_weight": 64,
    }  # fmt: skip


def test_what_it_does_not_do(inputs, monkeypatch):
    def why_not(heads=2, x=inputs.x, **options):
        return op.why_not(LoopedCall(x, inputs.blocks, inputs.modulation, 2, heads, **options))

    monkeypatch.setattr(driver, "facts", lambda device: driver.Facts("a GPU", (9, 0), 132, 232_448, 0, 0))
    monkeypatch.setattr(op, "_why_no_kernel", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert "x must be float32" in why_not(x=inputs.x.double())
    assert "must be bfloat16, got torch.float32" in why_not(compute_dtype=torch.float32)
    assert "dropout" in why_not(dropout=0.1)
    for capability, heads, reason in (
        ((9, 0), 16, "the head size must be one of (16, 32, 64, 128), got 8"),
        ((9, 0), 8, None),
        ((8, 0), 8, "the head size must be one of (32, 64, 128), got 16"),
        ((8, 0), 4, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        with torch.no_grad():
            assert why_not(heads) == reason
    assert why_not() is None
    for leaf in (inputs.modulation, inputs.blocks[1].norm2, inputs.x):  # any of them trains
        leaf.requires_grad_()
        assert "needs compute capability 9.0" in why_not()
        leaf.requires_grad_(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    inputs.x.requires_grad_()
    assert why_not() is None and "backward pass has heads of size (64, 128), got 32" in why_not(4)


@pytest.mark.parametrize("trains", [False, True])
def test_widths_that_no_tiles_divide_are_a_reason(inputs, monkeypatch, trains):
    """The plan of a kernel is asked for before the backend is chosen, that of the backward pass too."""
    narrow = [
        b._replace(mlp_in=b.mlp_in[:160], mlp_in_bias=b.mlp_in_bias[:160], mlp_out=b.mlp_out[:, :160])
        for b in inputs.blocks
    ]
    inputs.x.requires_grad_(trains)
    with hopper(monkeypatch):
        assert op.why_not(LoopedCall(inputs.x, inputs.blocks, inputs.modulation, 2, 2)) is None
        reason = op.why_not(LoopedCall(inputs.x, narrow, inputs.modulation, 2, 2))
    assert "columns divide the widths" in reason


@pytest.mark.parametrize("trains", [False, True])
def test_dropout_is_left_to_the_next_backend(inputs, monkeypatch, trains):
    """Known before a kernel is compiled or launched."""
    monkeypatch.setattr(driver, "why_unavailable", lambda capability: None)
    monkeypatch.setitem(backends._DEVICE_OF, "cuda", "cpu")
    monkeypatch.setattr(backends, "_passed_over", set())
    case = inputs.to(torch.bfloat16, requires_grad=trains)

    def run():
        return lk.looped_blocks(
            case.x, case.blocks, case.modulation, 2, num_heads=2, dropout=0.2, dropout_seed=3
        )

    with lk.use_backend("cuda", "reference"), pytest.warns(UserWarning, match="it has no dropout"):
        out = run()
    with lk.use_backend("reference"):
        assert torch.equal(out, run()) and out.requires_grad == trains
    with lk.use_backend("cuda"), pytest.raises(RuntimeError, match="cannot do this: it has no dropout"):
        run()


def test_the_architecture_picks_the_kernel():
    assert target_of((9, 0)) is SM90
    assert target_of((8, 0)) == SM80
    assert target_of((8, 6)) == SM80._replace(architecture="sm_86")
    assert target_of((12, 0)).source == "looped_blocks/looped_blocks_sm80.cu"


@pytest.fixture
def loaded(monkeypatch):
    """What the op compiles, and what it asks of the kernels it loads, without a driver."""
    seen = []

    class Kernel:
        largest = 16  # of the clusters that there is room for

        def __init__(self, cubin, entry, shared_bytes, device):
            seen.append((entry, shared_bytes))

        def breach(self, threads):
            return None

        def allow_large_clusters(self):
            seen.append("large clusters")

        def active_clusters(self, size, threads):
            seen.append((size, threads))
            return int(size <= Kernel.largest)

    monkeypatch.setattr(op.driver, "Kernel", Kernel)
    monkeypatch.setattr(op.driver, "facts", lambda device: driver.Facts("a GPU", (9, 0), 132, 232_448, 0, 0))
    monkeypatch.setattr(launch, "compile_kernel", lambda *arguments: seen.append(arguments) or b"cubin")
    caches = op._kernel, looped_rows.kernel_on, launch.loaded
    for cached in caches:
        cached.cache_clear()
    yield seen, Kernel
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("loops", [2, torch.tensor([2, 1, 2])], ids=["one", "each"])
def test_a_call_is_two_nodes_of_a_graph(dtype, per_sequence, loops, monkeypatch):
    """Its kernel and one before it: nothing is cast, filled or copied by PyTorch."""
    made = looped_inputs(3, 20, 128, 2, per_sequence_modulation=per_sequence, key_mask=True).to(dtype)
    rotary = Rotary(*(angles.float() for angles in made.rotary))
    given = made.x, made.blocks, made.modulation, loops, 2, None, rotary, made.key_mask
    call = LoopedCall(*given, compute_dtype=torch.bfloat16)
    with hopper(monkeypatch) as fake:
        op.run(call)
        launched = fake.named("cuLaunchKernelEx")
        with CountedNodes() as counted:
            out, used = op.run(call)
        assert fake.named("cuLaunchKernelEx") - launched == 2 == 1 + nodes_of_a_call()
        assert counted.nodes == 0 and used is None and out.shape == made.x.shape
        with CountedNodes() as counted:
            _, used = op.run(replace(call, exit_threshold=0.1))
        assert counted.nodes == 1 and used.dtype == torch.int64, "loops that only the device knows"


MANY = BlockShape(1, 1024, 768, 12, 3072, 2)


def test_blocks_that_share_tiles_are_launched_as_pairs(loaded):
    seen, _ = loaded
    _, plan, _ = op._kernel(MANY, SM90, 0)
    (source, macros, architecture), (entry, shared_bytes), *calls = seen
    assert (source, architecture, entry) == (
        "looped_blocks/looped_blocks_sm90.cu",
        "sm_90a",
        "looped_blocks_sm90",
    )
    assert macros["LOOPMDM_BLOCKS"] == 2 and shared_bytes == plan.shared_bytes
    assert calls == [(2, 384)] and plan.blocks == 2


@pytest.mark.parametrize(
    ("length", "largest", "tried"),
    [(1024, 1, [2, 1]), (128, 4, [4]), (128, 2, [4, 2]), (128, 1, [4, 2, 1])],
)
def test_a_gpu_without_room_for_a_cluster_runs_smaller_ones(loaded, length, largest, tried):
    """To the same bits: MLP_OUT has the same parts."""
    seen, kernel = loaded
    kernel.largest = largest
    shape = MANY._replace(length=length)
    _, plan, _ = op._kernel(shape, SM90, 0)
    compiled = [macros["LOOPMDM_BLOCKS"] for _, macros, *_ in (each for each in seen if len(each) == 3)]
    assert compiled == tried and plan.blocks == tried[-1]
    assert plan.tiles.mlp_out_parts == choose(shape).tiles.mlp_out_parts


def test_the_kernel_for_ampere_gets_no_plan_of_hopper(loaded):
    seen, _ = loaded
    _, plan, _ = op._kernel(MANY, SM80._replace(architecture="sm_90"), 0)
    assert plan.blocks == 1 and plan.tiles.part == 0 and seen[0][2] == "sm_90" and len(seen) == 2


@pytest.mark.parametrize(
    ("capability", "sms", "shared_bytes", "architecture", "threads", "mapped", "tiles"),
    [
        ((8, 0), 108, 166_912, "sm_80", 256, 0, None),
        ((8, 6), 82, 101_376, "sm_86", 256, 0, None),
        ((9, 0), 132, 232_448, "sm_90a", 288, 5, None),
        ((9, 0), 132, 232_448, "sm_90a", 384, 9, Tiles(256, 128, 64, 256, 128, part=32, blocks=2)),
        ((12, 0), 170, 101_376, "sm_120", 256, 0, None),
    ],
)
def test_a_call_compiles_and_launches_what_its_gpu_runs(
    inputs, capability, sms, shared_bytes, architecture, threads, mapped, tiles, monkeypatch
):
    compiled, launched, encoded = [], [], []

    class Kernel:
        def __init__(self, cubin, entry, shared, device):
            self.loaded = (cubin, entry, shared)

        def breach(self, threads):
            return None

        def blocks_per_sm(self, threads):
            return 1

        def active_clusters(self, size, threads):
            return {2: 60, 3: 40}[size]

        def launch_in_order(self, blocks, threads, stream, parameters, *, early):
            launched.append((self.loaded, blocks, threads, stream, type(parameters)))

        def launch(self, blocks, threads, stream, parameters, kept, *, cluster, cooperative):
            own = self.loaded, blocks, threads, stream, type(parameters), kept
            launched.append((*own, cluster, cooperative))

    facts = driver.Facts("a GPU", capability, sms, shared_bytes, 0, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(driver, "facts", lambda device: facts)
    monkeypatch.setattr(driver, "set_aside_l2", lambda device: None)
    monkeypatch.setattr(driver, "Kernel", Kernel)
    chosen = choose if tiles is None else lambda shape, device: plan_of(shape, device, tiles)
    monkeypatch.setattr(op, "choose", chosen)
    monkeypatch.setattr(launch, "compile_kernel", lambda *given: compiled.append(given) or b"cubin")
    monkeypatch.setattr(tensor_maps, "encode", lambda described: encoded.append(described) or bytes(128))
    if tiles:
        monkeypatch.setattr(looped_rows, "plan_of", lambda *_: None)
    caches = op._kernel, looped_rows.kernel_on, launch.loaded
    for cached in caches:
        cached.cache_clear()
    run = on_cuda("looped_blocks")
    out = run(inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=inputs.num_heads)
    for cached in caches:
        cached.cache_clear()
    target = target_of(capability)
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    expected = op.kernel_of(shape, target, target.used_of(device_of(capability, sms, shared_bytes)))
    by_rows = expected.source == looped_rows.SOURCE
    assert by_rows == (capability == (9, 0) and tiles is None)
    assert compiled == [
        (expected.source, dict(expected.macros), architecture),
        (prepare.SOURCE, {}, architecture),
    ]
    loaded = (b"cubin", Path(expected.source).stem, expected.shared_bytes)
    blocks = 2 * 60 if tiles else 3 * expected.cluster if by_rows else sms  # a cluster a sequence
    parameters = looped_rows.Parameters if by_rows else target.parameters
    before, call = launched
    assert before[0] == (b"cubin", "prepare_call", prepare.SHARED_BYTES)
    assert before[2:] == (prepare.THREADS, 7, prepare.Arguments)
    assert call == (loaded, blocks, threads, 7, parameters, None, expected.cluster, not by_rows)
    assert expected.shared_bytes <= shared_bytes and len(encoded) == mapped and out.shape == inputs.x.shape


NARROW = BlockShape(1, 81, 128, 4, 512, 2)


def test_narrow_blocks_are_launched_as_a_cluster_a_sequence(loaded):
    seen, _ = loaded
    found = looped_rows.kernel_on(NARROW, SM90, 0)
    (source, macros, architecture), (entry, shared_bytes), *calls = seen
    assert (source, architecture, entry) == (looped_rows.SOURCE, "sm_90a", "looped_rows_sm90")
    assert macros["LOOPMDM_BLOCKS"] == 11 and shared_bytes == found.plan.shared_bytes
    assert calls == ["large clusters", (11, 288)] and found.clusters == 1


def test_a_gpu_without_room_for_the_cluster_works_by_tiles(loaded):
    _, kernel = loaded
    kernel.largest = 8
    assert looped_rows.kernel_on(NARROW, SM90, 0) is None


def test_a_gpu_without_clusters_of_this_size(monkeypatch):
    """The driver says so by an error."""
    refused = real.CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE, None
    with hopper(monkeypatch, cuOccupancyMaxActiveClusters=lambda *_: refused):
        assert looped_rows.kernel_on(NARROW, SM90, 0) is None


def test_which_shapes_are_narrow(loaded):
    for shape in (
        NARROW._replace(length=129),  # more keys than it meets at once
        NARROW._replace(hidden=768, heads=12, mlp=3072),  # weights that would stream by too long
        NARROW._replace(heads=1),  # heads of 128
        NARROW._replace(batch=512),
    ):
        assert looped_rows.kernel_on(shape, SM90, 0) is None
    assert looped_rows.kernel_on(NARROW, SM80._replace(architecture="sm_90"), 0) is None
