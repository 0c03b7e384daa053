"""Device memory that outlives a call: other streams wait for it, graphs keep it, and L2 goes back."""

import ctypes
import gc
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from loopmdm_kernels import graphs
from loopmdm_kernels.cuda import driver, launch, prepare, weights
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda import looped_blocks_backward as backward
from loopmdm_kernels.schedule import BlockShape, build, choose, choose_backward
from loopmdm_kernels.testing import looped_inputs
from tests.cuda.fake_driver import SUCCESS, FakeDriver


class Stream:
    """What has been done on it, and what of others is known to have been done before."""

    cuda_stream = 7

    def __init__(self):
        self.known, self.waits = {self: 0}, 0

    def do(self):
        self.known[self] += 1
        return self, self.known[self]

    def sees(self, work):
        stream, number = work
        return self.known.get(stream, 0) >= number

    def wait_event(self, event):
        self.waits += 1
        for stream, number in event.known.items():
            self.known[stream] = max(self.known.get(stream, 0), number)

    def record_event(self, event=None):
        event = event or SimpleNamespace()
        event.known = dict(self.known)
        return event


@pytest.fixture
def gpu(monkeypatch):
    """Tensors of the CPU in the place of a GPU's; `current` is the stream, `uses` who was told of which."""
    weights.clear()

    class Gpu:
        current, capturing, uses, released = Stream(), False, set(), []

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: Gpu.uses.add((self.data_ptr(), stream))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Gpu.current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(driver, "release_l2", lambda device: Gpu.released.append(device))
    monkeypatch.setattr(weights, "_owners", {})
    yield Gpu
    weights._known.clear()


def blocks():
    return looped_inputs(1, 4, 128, 2).to(torch.bfloat16).blocks


def test_weights_packed_on_one_stream_are_waited_for_on_others(gpu, monkeypatch):
    written = [gpu.current.do()]
    inputs = looped_inputs(1, 4, 128, 2).to(torch.bfloat16)
    given, first = inputs.blocks, gpu.current
    packed = weights.packed(given)
    shape = op.shape_of(inputs.x, given, 2)
    table = build(shape, choose(shape).tiles)
    call = SimpleNamespace(x=inputs.x, modulation=inputs.modulation, num_loops=2)
    buffers = op.Buffers.allocate(table, inputs.x, packed, inputs.modulation, 2, None, None)

    class Kernel:
        def launch_in_order(self, *arguments, early):
            assert all(gpu.current.sees(work) for work in written), "two streams write at the same time"
            written.append(gpu.current.do())

    monkeypatch.setattr(prepare, "kernel_on", lambda target, device: Kernel())

    def write(packed):
        op._prepare(call, None, op.counters_of(table), buffers, packed, 0)

    for _ in range(2):
        write(packed)
        assert weights.packed(given) is packed and first.waits == 0 and not gpu.uses, (
            "one stream needs nothing"
        )
    kept = {t.data_ptr() for t in (packed.buffer, packed.norms, packed[6], packed[7], *packed.refresh)}
    second, third = Stream(), Stream()
    for gpu.current in (second, third, second, first):
        assert weights.packed(given) is packed
        write(packed)
    assert (first.waits, second.waits, third.waits) == (1, 2, 1)
    for stream in (second, third):
        assert {memory for memory, user in gpu.uses if user is stream} == kept
    gpu.capturing, gpu.current = True, Stream()
    monkeypatch.setattr(weights, "keep_for_graphs", lambda entry: None)
    with weights.packed(given).writing():
        assert gpu.current.waits == 0, "a capture cannot wait"


def test_tables_made_on_one_stream_are_waited_for_on_others(gpu):
    shape = BlockShape(1, 40, 128, 2, 512, 2)
    cpu = torch.device("cpu")
    makers = (
        lambda: op._shared_table(shape, choose(shape).tiles, False, cpu)[1],
        lambda: backward._shared_table(shape, choose_backward(shape).tiles, cpu)[1],
    )
    for make in makers:
        gpu.current, gpu.uses = Stream(), set()
        made = gpu.current.do()
        shared = make()
        kept = shared.read()
        assert gpu.current.waits == 0 and not gpu.uses
        gpu.current = Stream()
        assert make() is shared and all(map(torch.equal, shared.read(), kept))
        assert gpu.current.sees(made)
        assert gpu.uses == {(t.data_ptr(), gpu.current) for t in kept}
    op._shared_table.cache_clear()
    backward._shared_table.cache_clear()


def test_l2_is_given_back_with_the_last_parameter(gpu):
    first, second = blocks(), blocks()
    for given in (first, second):
        weights.packed(given)
    assert len(weights._known) == 2
    optimizer_step()
    assert not weights._known and not gpu.released, "what is packed next takes it over"
    weights.packed(first)
    kept = weakref.ref(next(iter(weights._known.values())).packed.buffer)
    del first
    gc.collect()
    assert not weights._known and kept() is None and not gpu.released
    gpu.capturing = True
    del second, given
    gc.collect()
    assert not gpu.released, "nothing of the kind while a graph is captured"
    gpu.capturing = False
    third = blocks()
    weights.packed(third)
    weights.clear()
    assert gpu.released == [0]
    del third
    gc.collect()
    assert gpu.released == [0, 0]


def optimizer_step():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()


class Graphs(FakeDriver):
    """With captures, whose graphs own what they were given."""

    def __init__(self):
        self.number, self.owned, self.graphs = 1, [], {}
        super().__init__(
            cuStreamGetCaptureInfo=lambda stream: (
                SUCCESS,
                1,
                self.number,
                f"graph {self.number}",
                [],
                [],
                0,
            ),
            cuUserObjectCreate=self.create,
            cuGraphRetainUserObject=self.retain,
        )

    def create(self, address, destroy, count, flags):
        assert count == 1 and flags == 1, "not synchronised with what ends the graph"
        return SUCCESS, (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(destroy)), address)

    def retain(self, graph, owned, count, flags):
        assert count == 1 and flags == 1, "moved"
        assert graph not in self.graphs
        self.graphs[graph] = owned
        return (SUCCESS,)

    def end(self, graph):
        """In a thread of the driver's, as CUDA does."""
        destroy, address = self.graphs.pop(graph)
        thread = threading.Thread(target=destroy, args=(address,))
        thread.start()
        thread.join()


class Thing: ...


def test_what_a_graph_reads_lives_as_long_as_the_graph(gpu, monkeypatch):
    monkeypatch.setattr(launch, "_held", {})
    fake = Graphs().install(monkeypatch)
    things = [Thing() for _ in range(4)]
    alive = [weakref.ref(thing) for thing in things]
    launch.keep_for_graphs(things[0])
    assert not launch._held, "nothing is captured"
    gpu.capturing = True
    launch.keep_for_graphs(things[1])
    launch.keep_for_graphs(things[2])
    fake.number = 2
    launch.keep_for_graphs(things[3])
    gpu.capturing = False
    del things
    launch.drop_ended_graphs()
    assert [ref() is not None for ref in alive] == [False, True, True, True]
    fake.end("graph 1")
    launch.drop_ended_graphs()
    assert [ref() is not None for ref in alive] == [False, False, False, True]
    fake.end("graph 2")
    assert alive[3]() is not None
    gpu.capturing, fake.number = True, 3
    launch.keep_for_graphs(Thing())
    assert alive[3]() is None and list(launch._held) == [3], (
        "the next capture looks for those that have ended"
    )
    weights.clear()
    fake.end("graph 3")
    weights.clear()
    assert not launch._held
    with graphs.keeping() as read:  # as CudaGraphs does: its replays hold the list
        launch.keep_for_graphs("a table")
    assert read == [("a table",)] and not launch._held
