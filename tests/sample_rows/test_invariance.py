"""A row's result is its own: the same bits in any batch, on any number of threads, in any process."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from loopmdm_kernels.cpu.sample_rows import sample_rows
from loopmdm_kernels.testing import head_inputs
from loopmdm_kernels.types import Head, RowRng

NUM_ROWS = 300  # more than two batches of 128


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(weight_dtype=torch.float32, vocab_size=6300):
    hidden, head = head_inputs(
        batch=4, length=100, hidden=40, vocab_size=vocab_size, per_sequence_modulation=True
    )
    head = Head(
        head.norm.float(), head.weight.to(weight_dtype), head.bias.float(), head.modulation.float(), 7
    )
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:NUM_ROWS]
    return hidden.float(), head, rows, RowRng(3, rows, rows + 1, rows + 2)


def assert_equal(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), name


def some(rng, index):
    return RowRng(rng.seed, rng.sequence[index], rng.step[index], rng.position[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch(isa, dtype):
    hidden, head, rows, rng = case(dtype)
    whole = sample_rows(hidden, head, rows, rng)
    for index in (
        torch.tensor([0]),
        torch.tensor([299]),
        torch.tensor([130, 7, 7, 250, 1]),
        torch.arange(NUM_ROWS).flip(0),
    ):
        part = sample_rows(hidden, head, rows[index], some(rng, index))
        assert_equal(part, type(whole)(*(t[index] for t in whole)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_threads(isa, dtype, threads):
    hidden, head, rows, rng = case(dtype)
    threads(1)
    one = sample_rows(hidden, head, rows, rng)
    for number in (2, 3, 8):
        threads(number)
        assert_equal(one, sample_rows(hidden, head, rows, rng))


def test_more_rows_than_one_group(threads):
    """Rows beyond the 4096 that are held at one time."""
    threads(2)
    hidden, head, rows, _ = case(vocab_size=20)
    rows = rows.repeat(30)
    name = torch.arange(len(rows))
    rng = RowRng(3, name, name, name)
    whole = sample_rows(hidden, head, rows, rng)
    last = sample_rows(hidden, head, rows[4090:4100], some(rng, slice(4090, 4100)))
    assert_equal(last, type(whole)(*(t[4090:4100] for t in whole)))


def test_two_python_threads_at_once(threads):
    threads(2)
    hidden, head, rows, rng = case()
    expected = sample_rows(hidden, head, rows, rng)
    results = []

    def work():
        results.extend(sample_rows(hidden, head, rows, rng) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 10
    for result in results:
        assert_equal(result, expected)


def test_other_python_threads_run_meanwhile(threads):
    """The GIL is released: another thread counts on during a call."""
    threads(1)
    hidden, head, _, _ = case(vocab_size=20_000)
    rows = torch.arange(400)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    sample_rows(hidden, head, rows, RowRng(0, rows, rows, rows))
    end = time.monotonic()
    done.set()
    ticker.join()
    # Nothing ticks between the first and the last moment of a call that keeps the GIL.
    length = end - start
    assert any(start + 0.1 * length < moment < end - 0.1 * length for moment in ticks)


FORK = """
import os, torch
from loopmdm_kernels.cpu.sample_rows import sample_rows
from loopmdm_kernels.types import Head, RowRng
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
weight = torch.randn(7000, 64, generator=generator)
head = Head(torch.ones(64), weight, torch.zeros(7000), torch.zeros(1, 2, 64))
hidden, rows = torch.randn(1, 200, 64, generator=generator), torch.arange(200)
run = lambda: torch.stack([t.double() for t in sample_rows(hidden, head, rows, RowRng(0, rows, rows, rows))])
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert torch.equal(run(), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=300)
