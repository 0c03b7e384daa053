"""The threads of the CPU kernels: those of torch where that is possible, their own elsewhere."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from loopmdm_kernels import _C

TORCH_HAS_OPENMP = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
needs_openmp = pytest.mark.skipif(
    not (sys.platform == "linux" and TORCH_HAS_OPENMP), reason="this torch uses no OpenMP that can be shared"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(params=["", "std"], ids=["torch's threads", "own threads"])
def runtime(request, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CPU_THREADS", request.param)


def run_script(code, **environment):
    """Runs Python code in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.split()


@pytest.mark.parametrize("num_threads", range(1, 9))
def test_every_worker_sees_every_round(runtime, num_threads):
    assert _C.debug_parallel(num_threads, 200) == [200 * num_threads] * num_threads


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 7])
def test_every_task_of_every_phase_runs_once(runtime, num_threads, num_tasks):
    assert _C.debug_share(num_threads, num_tasks, 300) == [300] * num_tasks


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_exception_reaches_the_caller_while_others_wait(runtime, failing):
    with pytest.raises(RuntimeError, match=f"worker {failing} fails"):
        _C.debug_parallel(4, 100, failing)
    assert _C.debug_parallel(4, 20) == [80] * 4


def test_python_threads_at_once(runtime):
    results = []

    def work():
        results.extend(_C.debug_parallel(2, 10) for _ in range(100))

    callers = [threading.Thread(target=work) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[20, 20]] * 200


def test_forced_and_bad_choice(monkeypatch):
    monkeypatch.setenv("LOOPMDM_CPU_THREADS", "std")
    assert _C.thread_runtime() == "std::thread"
    monkeypatch.setenv("LOOPMDM_CPU_THREADS", "tbb")
    for call in (_C.thread_runtime, lambda: _C.debug_parallel(1, 1)):
        with pytest.raises(RuntimeError, match="LOOPMDM_CPU_THREADS: got 'tbb'; expected 'std'"):
            call()


@needs_openmp
def test_no_threads_beside_those_of_torch():
    """Nothing is started that torch's operation had not, and a smaller region ends none of its threads."""
    code = """
import os, torch
from loopmdm_kernels import _C
torch.set_num_threads(4)
torch.zeros(1 << 22).add_(1)
threads = set(os.listdir("/proc/self/task"))
for number in (4, 2, 3):
    assert _C.debug_parallel(number, 10) == [10 * number] * number
assert set(os.listdir("/proc/self/task")) == threads
print(_C.thread_runtime())
"""
    (name,) = run_script(code, LOOPMDM_CPU_THREADS="")
    assert "omp" in name


@needs_openmp
@pytest.mark.parametrize(
    ("limit", "most"),
    [({"OMP_THREAD_LIMIT": "2"}, 2), ({"OMP_DYNAMIC": "true"}, 8)],
    ids=["limit", "dynamic"],
)
def test_fewer_threads_than_asked_for(limit, most):
    code = """
from loopmdm_kernels import _C
seen = _C.debug_parallel(8, 50)
assert seen == [50 * len(seen)] * len(seen)
print(len(seen))
"""
    (workers,) = run_script(code, LOOPMDM_CPU_THREADS="", **limit)
    assert 1 <= int(workers) <= most


DRAW = """
import os, torch
import loopmdm_kernels as lk
from loopmdm_kernels.types import Head, RowRng
sample_rows = lk.use_backend("cpu")(lk.sample_rows)
generator = torch.Generator().manual_seed(0)
weight = torch.randn(7000, 64, generator=generator)
head = Head(torch.ones(64), weight, torch.zeros(7000), torch.zeros(1, 2, 64))
hidden, rows = torch.randn(1, 200, 64, generator=generator), torch.arange(200)

def draw():
    torch.set_num_threads(2)
    return torch.stack([t.double() for t in sample_rows(hidden, head, rows, RowRng(0, rows, rows, rows))])

def use_torch_threads():
    torch.set_num_threads(2)
    torch.zeros(1 << 22).add_(1)
"""


@needs_fork
@pytest.mark.parametrize("loaded_in_the_parent", [True, False])
def test_after_fork(loaded_in_the_parent):
    """The child has no OpenMP threads, though the runtime's records say so, and a grandchild neither."""
    code = """
use_torch_threads()
if loaded_in_the_parent:
    expected = draw()

def in_child(work):
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = work()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def check():
    from loopmdm_kernels import _C
    torch.save(draw(), path)
    return int(_C.thread_runtime() != "std::thread" or _C.debug_parallel(3, 50) != [150] * 3)

def check_with_child():
    in_child(check)
    return check()

import sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    path = folder + "/rows.pt"
    in_child(check_with_child)
    assert torch.equal(torch.load(path), draw())
from loopmdm_kernels import _C
print(_C.thread_runtime())
"""
    (name,) = run_script(
        f"loaded_in_the_parent = {loaded_in_the_parent}\n{DRAW}\n{code}", LOOPMDM_CPU_THREADS=""
    )
    if TORCH_HAS_OPENMP and sys.platform == "linux":
        assert name != "std::thread"


@needs_fork
def test_data_loader_workers():
    code = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return draw()

use_torch_threads()
expected = draw()
loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
drawn = list(loader)
assert len(drawn) == 4 and all(torch.equal(rows, expected) for rows in drawn)
assert torch.equal(draw(), expected)
"""
    run_script(DRAW + code, LOOPMDM_CPU_THREADS="")


def test_workers_take_the_denormal_mode_of_the_caller():
    """Logits below the normal range are all equal when flushed: then the first token wins, in any thread."""
    code = """
import sys, torch
from loopmdm_kernels import _C
import loopmdm_kernels as lk
from loopmdm_kernels.types import Head, RowRng
sample_rows = lk.use_backend("cpu")(lk.sample_rows)
_C.debug_parallel(2, 1)  # the threads exist before the mode changes
V, row = 200_000, torch.zeros(1, dtype=torch.int64)
tokens = torch.arange(V)
head = Head(torch.ones(32), torch.zeros(V, 32), tokens * 1e-44, torch.zeros(1, 2, 32))
for flush in (True, False):
    if not torch.set_flush_denormal(flush):
        break
    for number in (1, 2, 2, 2, 2):
        torch.set_num_threads(number)
        drawn = sample_rows(torch.ones(1, 1, 32), head, row, RowRng(0, row, row, row), temperature=0.0)
        assert drawn.token.item() == (0 if flush else V - 1), (flush, number)
"""
    run_script(code, LOOPMDM_CPU_THREADS="")
