"""Eight threads at once, and ops that use eight, against one: the same bits."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from loopmdm import sample
from tests.fuzz import ops
from tests.fuzz.harness import Wrong, main
from tests.fuzz.op_inputs import OPS, Draw, Problem
from tests.fuzz.sampler import model_of

THREADS = 8
Work = Callable[[], dict[str, Tensor]]


def _problems(seed: int) -> list[Problem]:
    problems = []
    for name in OPS:
        draw = Draw(seed)
        problem = OPS[name].make(draw)
        while not ops.on_kernels(problem):
            problem = OPS[name].make(draw)
        problems.append(problem)
    return problems


@cache
def model() -> torch.nn.Module:
    made: torch.nn.Module = model_of("conditioned")
    return made.eval()


def works(seed: int) -> list[Work]:
    """Calls of every op with and without gradients, a training loss, and sampling."""

    def op(problem: Problem, wanted: tuple[str, ...]) -> Work:
        return lambda: ops.results(problem, wanted)

    found: list[Work] = []
    for problem in _problems(seed):
        wanted = () if problem.op == "sample_rows" else tuple(problem.leaves)
        found += [op(problem, ()), op(problem, wanted)]
    network = model()
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))

    def loss() -> dict[str, Tensor]:
        out = network.loss(tokens, num_loops=2, seed=seed % 2**62)
        grads = torch.autograd.grad(out.loss, [p for p in network.parameters() if p.requires_grad])
        return {"loss": out.loss.detach(), **{str(i): grad for i, grad in enumerate(grads)}}

    def samples() -> dict[str, Tensor]:
        out = sample(network, 2, length=6, steps=3, plan=2, seed=seed % 2**62, progress=False)
        return {"tokens": out.tokens}

    return [*found, loss, samples]


def case(seed: int) -> Counter[str]:
    todo = works(seed)
    want = [work() for work in todo]
    errors: list[str] = []
    begin = threading.Barrier(THREADS)

    def run(shift: int) -> None:
        begin.wait()
        for at in range(len(todo)):
            index = (at + shift) % len(todo)
            try:
                _same(want[index], todo[index](), f"work {index} in thread {shift}")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(shift,)) for shift in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for index, work in enumerate(todo[: 2 * len(OPS)]):
            got = work()
            if index % 2 == 0:  # forward: the kernels promise their bits for any number of threads
                _same(want[index], got, f"work {index} with {THREADS} threads")
    finally:
        torch.set_num_threads(before)
    if errors:
        raise Wrong("; ".join(errors[:3]))
    return Counter({f"calls in {THREADS} threads": THREADS * len(todo)})


def _same(want: dict[str, Tensor], got: dict[str, Tensor], what: str) -> None:
    for name, value in want.items():
        if not torch.equal(got[name], value):
            raise Wrong(f"{what}: {name} differs")


if __name__ == "__main__":
    raise SystemExit(main("threads", case, __doc__))
