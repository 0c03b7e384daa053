"""Packed weights: where each value lies, and that no change of a weight is missed."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.cpu import packing
from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.types import BlockWeights

LANES = {"generic": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "amx_bf16": 16}
PANEL = {"generic": 8, "avx2": 16, "avx512": 64, "avx512_bf16": 64, "amx_bf16": 64}


@pytest.fixture(autouse=True)
def _empty_cache():
    packing.clear()
    yield
    packing.clear()


def unpacked(packed, isa, columns, depth, *, bf16, heads=0, parts=1):
    """[columns, depth] float32 from the layout described in linear.h; the padding must be zero."""
    part_columns = columns // parts
    unit = part_columns // heads if heads else part_columns
    padding = LANES[isa] if heads else 2 * LANES[isa]
    unit_width = -(-unit // padding) * padding
    words = -(-depth // 2) if bf16 else depth
    units_per_group = max(1, PANEL[isa] // unit_width)
    rest = packed
    units = []
    for _ in range(parts):
        left = part_columns // unit
        while left:
            group_width = min(left, units_per_group) * unit_width
            panels = []
            while group_width:
                width = min(group_width, PANEL[isa])
                panels.append(rest[: words * width].view(words, width))
                rest = rest[words * width :]
                group_width -= width
            group = torch.cat(panels, dim=1).contiguous()
            if bf16:
                values = group.view(torch.bfloat16).view(words, -1, 2).transpose(1, 2)
                values = values.reshape(2 * words, -1).float()
            else:
                values = group.view(torch.float32)
            units += values.split(unit_width, dim=1)
            left -= min(left, units_per_group)
    assert rest.numel() == 0
    for values in units:
        assert not values[depth:].any() and not values[:, unit:].any()
    return torch.cat([values[:depth, :unit] for values in units], dim=1).T


def expected(weight, bf16):
    return weight.detach().to(torch.bfloat16 if bf16 else weight.dtype).float()


SIZES = [(1, 1), (2, 3), (7, 5), (16, 16), (33, 31), (64, 64), (65, 127), (130, 96), (200, 70)]


@pytest.mark.parametrize("bf16", [False, True], ids=["wide", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestLayout:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_matrix(self, isa, dtype, bf16, transposed):
        for rows, width in SIZES:
            weight = torch.randn(rows, width).to(dtype)
            packed = packed_linear(weight, bf16=bf16, transposed=transposed)
            source = weight.T if transposed else weight
            values = unpacked(packed, isa, *source.shape, bf16=bf16)
            assert torch.equal(values, expected(source, bf16)), (rows, width)

    def test_heads(self, isa, dtype, bf16):
        shapes = [(1, 2, 6), (3, 4, 12), (5, 12, 60), (2, 40, 80), (3, 64, 192), (2, 66, 7)]
        for heads, head_dim, depth in shapes:
            for parts in (1, 3):
                weight = torch.randn(parts * heads * head_dim, depth).to(dtype)
                packed = packed_linear(weight, bf16=bf16, heads=heads, parts=parts)
                values = unpacked(packed, isa, *weight.shape, bf16=bf16, heads=heads, parts=parts)
                assert torch.equal(values, expected(weight, bf16)), (heads, head_dim, depth, parts)

    def test_not_contiguous(self, isa, dtype, bf16):
        whole = torch.randn(40, 50).to(dtype)
        for weight in (whole.T, whole[:, 3:20], whole[::2]):
            values = unpacked(packed_linear(weight, bf16=bf16), isa, *weight.shape, bf16=bf16)
            assert torch.equal(values, expected(weight, bf16))
        assert not packing._known

    def test_any_number_of_threads(self, isa, dtype, bf16, monkeypatch):
        weight = torch.randn(700, 301).to(dtype)
        alone = packed_linear(weight, bf16=bf16)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        packing.clear()
        assert torch.equal(packed_linear(weight, bf16=bf16), alone)


def wide_values(weight):
    return unpacked(packed_linear(weight, bf16=False), _C.cpu_isa(), *weight.shape, bf16=False)


def assert_current(weight):
    assert torch.equal(wide_values(weight), weight.detach().float())


def test_packed_once():
    weight = nn.Parameter(torch.randn(96, 80))
    packs = {
        (bf16, heads, transposed): packed_linear(weight, bf16=bf16, heads=heads, transposed=transposed)
        for bf16, heads, transposed in [
            (False, 0, False), (True, 0, False), (False, 4, False), (False, 0, True), (True, 0, True),
        ]
    }  # fmt: skip
    assert len({pack.data_ptr() for pack in packs.values()}) == len(packs)
    for (bf16, heads, transposed), pack in packs.items():
        assert packed_linear(weight, bf16=bf16, heads=heads, transposed=transposed) is pack
    assert not any(pack.requires_grad for pack in packs.values())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, fused=True)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def plain_adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


@pytest.mark.parametrize("optimizer", [sgd, adam, plain_adam])
def test_optimizer_steps(optimizer):
    weight = nn.Parameter(torch.randn(130, 100))
    steps = optimizer([weight])
    for _ in range(3):
        assert_current(weight)
        weight.grad = torch.randn_like(weight)
        steps.step()
    assert_current(weight)


def test_fused_step_of_one_value():
    """No sampled line changes, nor the version counter: the optimizer itself tells."""
    weight = nn.Parameter(torch.randn(513, 512))  # beyond what is compared whole
    optimizer = sgd([weight])
    for value in range(60):
        assert_current(weight)
        before = (_C.fingerprint(weight), weight._version)
        weight.grad = torch.zeros_like(weight)
        weight.grad.view(-1)[value] = 1.0
        optimizer.step()
        if (_C.fingerprint(weight), weight._version) == before:
            break
    else:
        pytest.fail("every value was sampled: this tests nothing")
    assert_current(weight)


def test_memory_of_an_earlier_state_is_used_again():
    """Unless somebody computes with what is in it."""
    weight = nn.Parameter(torch.randn(600, 256))
    optimizer = sgd([weight])
    weight.grad = torch.randn_like(weight)
    held = packed_linear(weight, bf16=False)
    before = held.clone()
    optimizer.step()
    address = packed_linear(weight, bf16=False).data_ptr()
    assert address != held.data_ptr()
    assert_current(weight)
    assert torch.equal(held, before)
    for change in (optimizer.step, lambda: weight.data.neg_()):
        change()
        assert packed_linear(weight, bf16=False).data_ptr() == address
        assert_current(weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.copy_(torch.randn_like(w)),
        lambda w: w.data.mul_(1.001),
        lambda w: w.data.neg_(),
        lambda w: w.data[:, 77].zero_(),
        lambda w: w.data[8:10].zero_(),
        lambda w: w.data[3:, 5:9].add_(1),
        lambda w: w.data.view(-1)[-1:].add_(1),
        lambda w: setattr(w, "data", torch.randn_like(w)),
        lambda w: setattr(w, "data", w.data.reshape(256, 600)),
        lambda w: setattr(w, "data", w.data.to(torch.bfloat16)),
        lambda w: setattr(w, "data", w.data.T),
    ],
    ids=["copy", "scale", "negate", "column", "rows", "columns", "last", "swap", "shape", "dtype", "strides"],
)
def test_writes_through_data(write):
    weight = nn.Parameter(torch.randn(600, 256))
    assert_current(weight)
    write(weight)
    assert_current(weight)


def test_small_write_through_data_after_the_documented_cure():
    weight = nn.Parameter(torch.randn(600, 256))
    for cure in (lambda: torch.autograd.graph.increment_version(weight), packing.clear):
        assert_current(weight)
        weight.data[300, 100] += 1
        cure()
        assert_current(weight)


def test_ordinary_writes():
    module = nn.Linear(256, 300, bias=False)
    other = nn.Linear(256, 300, bias=False)
    for change in (
        lambda: module.load_state_dict(other.state_dict()),
        lambda: module.weight.copy_(torch.randn(300, 256)),
        lambda: module.weight[7, 3].add_(1),
        lambda: nn.init.normal_(module.weight),
        lambda: torch._foreach_lerp_([module.weight], [other.weight], 0.5),
    ):
        assert_current(module.weight)
        with torch.no_grad():
            change()
        assert_current(module.weight)


def test_average_swapped_in_and_out():
    weight = nn.Parameter(torch.randn(100, 90))
    trained, average = weight.data, torch.randn(100, 90)
    for _ in range(3):
        for values in (average, trained):
            weight.data = values
            assert_current(weight)
            average.mul_(0.9)


def test_memory_changed_under_the_tensor():
    """A view of numpy's memory, which has no counter at all."""
    memory = torch.randn(90, 70).numpy()
    weight = torch.from_numpy(memory)
    assert_current(weight)
    memory *= 2
    assert_current(weight)


def test_inference_tensors():
    with torch.inference_mode():
        weight = torch.randn(64, 70)
        assert packed_linear(weight, bf16=False) is packed_linear(weight, bf16=False)
        for _ in range(3):
            weight.mul_(1.5)
            assert_current(weight)


def test_entries_die_with_their_weights():
    weights = [nn.Parameter(torch.randn(20, 30)) for _ in range(10)]
    for weight in weights:
        packed_linear(weight, bf16=True)
        packed_linear(weight, bf16=False)
    assert len(packing._known) == 10
    del weights[3:], weight
    gc.collect()
    assert len(packing._known) == 3
    weights.append(weights)  # a cycle
    del weights
    gc.collect()
    assert not packing._known


def test_reused_ids():
    seen = set()
    for i in range(300):
        weight = torch.full((8, 8), float(i))
        assert_current(weight)
        seen.add(id(weight))
        del weight
    assert len(seen) < 300, "no id came back: this tests nothing"
    assert not packing._known


def test_clear_and_pack_again():
    weight = torch.randn(20, 30)
    first = packed_linear(weight, bf16=False)
    packing.clear()
    second = packed_linear(weight, bf16=False)
    assert first is not second and torch.equal(first, second)
    del weight
    assert not packing._known


def test_instruction_set_switch(monkeypatch):
    weight = torch.randn(70, 50)
    for _ in range(2):
        for isa in _C.usable_cpu_isas().split(", "):
            monkeypatch.setenv("LOOPMDM_CPU_ISA", isa)
            for bf16 in (False, True):
                values = unpacked(packed_linear(weight, bf16=bf16), isa, 70, 50, bf16=bf16)
                assert torch.equal(values, expected(weight, bf16))


def test_modules_stay_clean():
    module = nn.Linear(48, 64, bias=False)

    def serialized():
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return file.getvalue(), pickle.dumps(module), sorted(vars(module.weight))

    before = serialized()
    assert_current(module.weight)
    assert serialized() == before
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.weight[0, 0] += 1
        assert_current(twin.weight)
        assert_current(module.weight)


def test_python_threads():
    """Each thread trains weights of its own and reads shared ones."""
    shared = [nn.Parameter(torch.randn(70, 64)) for _ in range(4)]
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for step in range(60):
                own = torch.randn(30, 40, generator=generator)
                for weight in (own, own.mul_(2), shared[step % 4]):
                    assert_current(weight)
                if step % 20 == seed:
                    packing.clear()
        except BaseException as error:  # reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(packing._known) <= len(shared)


def test_training_steps_of_the_op(isa):
    """After fused steps the op gives the bits that fresh copies of the weights give."""
    hidden = 32

    def parameter(*shape):
        return nn.Parameter(torch.randn(*shape) * 0.2)

    block = BlockWeights(
        norm1=parameter(hidden),
        qkv=parameter(3 * hidden, hidden),
        attn_out=parameter(hidden, hidden),
        norm2=parameter(hidden),
        mlp_in=parameter(4 * hidden, hidden),
        mlp_in_bias=parameter(4 * hidden),
        mlp_out=parameter(hidden, 4 * hidden),
        mlp_out_bias=parameter(hidden),
    )
    x, modulation = torch.randn(2, 9, hidden), torch.randn(1, 1, 6, hidden)
    optimizer = adam(block)

    def run(weights):
        with torch.no_grad():
            return lk.looped_blocks(x, [weights], modulation, 2, num_heads=4, compute_dtype=torch.bfloat16)

    outputs = []
    for _ in range(4):
        outputs.append(run(block))
        assert torch.equal(outputs[-1], run(BlockWeights(*(w.detach().clone() for w in block))))
        for weight in block:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1])


def test_compiled_optimizer_step():
    weight = nn.Parameter(torch.randn(20, 30))
    optimizer = plain_adam([weight])
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        assert_current(weight)
        weight.grad = torch.randn_like(weight)
        step()
    assert_current(weight)
