"""The stand-in for CUDA graphs finds what would go wrong with them."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.testing import RecordedGraphs, head_inputs, row_rng


def test_a_replay_reads_tensors_again_and_python_never():
    x, out = torch.arange(3.0), torch.zeros(3)
    factor = [2]

    def call():
        out.copy_((x + 1).view(3) * factor[0])

    replay = RecordedGraphs()(call)
    x.add_(10)
    factor[0] = 3
    replay()
    assert out.tolist() == [22, 24, 26]


def test_what_a_capture_made_is_lost():
    """A value that is kept for later, as a cache would, is not there any more."""
    kept = []
    out = torch.zeros(3)

    def call():
        if not kept:
            kept.extend((torch.ones(3) * 2, torch.arange(3), torch.ones(3) > 0))
        out.copy_(kept[0])

    graphs = RecordedGraphs()
    replay = graphs(call)
    assert kept[0].isnan().all() and not kept[2].any() and (kept[1] > 2).all()
    replay()
    assert out.tolist() == [2, 2, 2]  # made again by the graph that made it
    other = graphs(call)
    replay()
    kept[0].fill_(torch.nan)  # by a third graph, say
    other()
    assert out.isnan().all()


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.max()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "written mask": lambda x: x.__setitem__(x > 0, 1.0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_a_tensor_raises(read, inference):
    with (
        torch.inference_mode(inference),
        pytest.raises(RuntimeError, match="a stream that is captured cannot"),
    ):
        RecordedGraphs()(lambda: read(torch.ones(2)))


def test_ops_are_done_again():
    hidden, head = head_inputs(1, 5, 16, 20)
    hidden, head = hidden.float(), head._replace(**{n: getattr(head, n).float() for n in head._fields[:4]})
    rows, names = torch.tensor([0, 3]), row_rng(2)
    out = torch.zeros(2, dtype=torch.int64)

    def call():
        out.copy_(lk.sample_rows(hidden, head, rows, names).token)

    recorded = RecordedGraphs()
    replay = recorded(call)
    hidden.mul_(-1)
    rows.copy_(torch.tensor([4, 1]))
    names.step.add_(5)
    expected = lk.sample_rows(hidden, head, rows, names).token
    replay()
    assert torch.equal(out, expected) and (recorded.captures, recorded.replays) == (1, 1)
