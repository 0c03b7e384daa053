"""A row's result is its own: the same bits in any batch, on any number of threads, in any process."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.types import SampledRows
from tests.sample_rows.cases import BF16, FLOAT, case, some

MANY = {"size": (40, 6300), "num_rows": 300}  # more than two batches of 128 rows on the CPU


def assert_equal(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), name


def assert_close(a, b):
    """Of plain PyTorch, whose products have other bits for other sizes."""
    assert torch.equal(a.token, b.token) and torch.equal(a.top1_token, b.top1_token)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def rows_of(result, index):
    return SampledRows(*(value[index] for value in result))


@pytest.mark.by_backend("dtype", reference=[FLOAT], cpu=[FLOAT, BF16], triton=[FLOAT], cuda=[BF16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch(backend, dtype, temperature):
    inputs = case(backend, dtype, **(MANY if backend.name == "cpu" else {}))
    whole = lk.sample_rows(*inputs, temperature=temperature)
    assert_same = assert_close if backend.kind == "reference" else assert_equal
    number = len(inputs[2])
    few = torch.tensor([number // 2, 7, 7, number - 1, 1], device=backend.device)
    more = () if backend.emulated else (slice(number - 1, number), slice(20, 190), slice(None, None, 3))
    for index in (slice(0, 1), few, slice(3, 20), *more):
        assert_same(lk.sample_rows(*some(inputs, index), temperature=temperature), rows_of(whole, index))


@pytest.mark.backends("cpu")
def test_number_of_threads(backend, dtype, threads):
    inputs = case(backend, dtype, **MANY)
    threads(1)
    one = lk.sample_rows(*inputs)
    for number in (2, 3, 8):
        threads(number)
        assert_equal(one, lk.sample_rows(*inputs))


@pytest.mark.backends("best")
def test_more_rows_than_one_group(backend, threads):
    """Rows beyond the 4096 that are held at one time."""
    threads(2)
    inputs = case(backend, size=(40, 20), num_rows=9000)
    part = slice(4090, 4100)
    assert_equal(lk.sample_rows(*some(inputs, part)), rows_of(lk.sample_rows(*inputs), part))


@pytest.mark.backends("best")
def test_two_python_threads_at_once(backend, threads):
    threads(2)
    inputs = case(backend, **MANY)
    expected, results = lk.sample_rows(*inputs), []

    def work():
        results.extend(lk.sample_rows(*inputs) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 10
    for result in results:
        assert_equal(result, expected)


@pytest.mark.backends("best")
def test_other_python_threads_run_meanwhile(backend, threads):
    """The GIL is released: another thread counts on during a call."""
    threads(1)
    inputs = case(backend, size=(40, 20_000), num_rows=400)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    lk.sample_rows(*inputs)
    end = time.monotonic()
    done.set()
    ticker.join()
    # Nothing ticks between the first and the last moment of a call that keeps the GIL.
    length = end - start
    assert any(start + 0.1 * length < moment < end - 0.1 * length for moment in ticks)


FORK = """
import os, torch
import loopmdm_kernels as lk
from loopmdm_kernels.types import Head, RowRng
sample_rows = lk.use_backend("cpu")(lk.sample_rows)
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
