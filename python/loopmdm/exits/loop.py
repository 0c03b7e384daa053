"""The loop with an exit rule: inside the op where its threshold is the rule, else one loop at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopmdm.exits.judges import Judge
from loopmdm.model.stages import Stages


def loop_to_threshold(
    stages: Stages,
    num_loops: int | Tensor,
    threshold: float,
    min_loops: int = 1,
    max_loops: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ExitRule.run` of a rule that is a threshold of the op; max_loops is as in `Stages.loop`."""
    hidden, free = stages.before(), min_loops - 1
    if free:
        hidden = stages.loop(hidden, free, total=num_loops)
    most = None if max_loops is None else max_loops - free
    hidden, used = stages.loop(
        hidden, num_loops - free, exit_threshold=threshold, max_loops=most, done=free, total=num_loops
    )
    return stages.after(hidden), used + free


def loop_by_loop(
    stages: Stages,
    num_loops: int | Tensor,
    min_loops: int,
    lookback: int,
    judge_of: Callable[[Stages, Tensor], Judge],
) -> tuple[Tensor, Tensor]:
    """`ExitRule.run` of any other rule: `judge_of` is its `judge`, which looks so many loops back."""
    loop = max(0, min_loops - lookback)
    hidden = stages.before()
    if loop:
        hidden = stages.loop(hidden, loop, total=num_loops)
    batch = hidden.shape[0]
    active = torch.arange(batch, device=hidden.device)
    most = num_loops if isinstance(num_loops, Tensor) else torch.full_like(active, num_loops)
    used = most.clone()
    out = torch.empty_like(hidden)
    judge = judge_of(stages, hidden)

    def leave(gone: Tensor, state: Tensor) -> Tensor:
        """Write the state of those who go; returns who stays, and forgets the others."""
        nonlocal active, stages
        out[active[gone]] = state[gone]
        used[active[gone]] = loop
        going = ~gone
        active, stages = active[going], stages.subset(going)
        judge.keep(going)
        return going

    everyone = stages
    while active.numel():
        new = stages.loop(hidden, done=loop, total=most[active])
        loop += 1
        over = most[active] == loop
        if bool(over.any()):  # no need to judge them
            state = new
            if judge.tails is not None:
                state = torch.empty_like(new)
                state[over] = stages.subset(over).after(new[over])
            going = leave(over, state)
            hidden, new = hidden[going], new[going]
        if not active.numel():
            break
        stop = judge(stages, hidden, new, loop)
        if loop >= min_loops and bool(stop.any()):
            new = new[leave(stop, new if judge.tails is None else judge.tails)]
        hidden = new
    return (everyone.after(out) if judge.tails is None else out), used
