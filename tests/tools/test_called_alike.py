"""Called module by module a model computes what the ops compute: hooks that change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm.exits import HiddenChange
from tests.tools.watched import MARKS, NOISE, TOKENS, WHERE, both, new_model

pytestmark = MARKS


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}, {"positions": "learned"}], ids=str)
@pytest.mark.parametrize("num_loops", [1, 3, torch.tensor([3, 1, 4, 2])], ids=["1", "3", "each"])
@pytest.mark.parametrize("padded", [False, True])
def test_hooks_that_change_nothing(where: Any, changes: Any, num_loops: Any, padded: bool) -> None:
    model = new_model(**changes)
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    options = {"num_loops": num_loops, "attention_mask": mask if padded else None}
    sigma = NOISE if model.config.time_conditioning else None
    plain, hooked = both(model, lambda: model(TOKENS, sigma, **options), where)
    torch.testing.assert_close(hooked, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"time_conditioning": True}], ids=str)
def test_loss_and_gradients(where: Any, recompute: bool, changes: Any) -> None:
    """The same masks of dropout too."""
    model = new_model(**changes).train()
    model.recompute = recompute

    def call() -> tuple[Tensor, ...]:
        loss = model.loss(TOKENS, seed=7, num_loops=3).loss
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    plain, hooked = both(model, call, where)
    for ours, theirs in zip(hooked, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(dtype: torch.dtype, autocast: bool) -> None:
    """As far from float64 as the ops are, within twice the error of plain PyTorch in that dtype."""
    model = new_model().to(dtype)
    exact = copy.deepcopy(model).double()(TOKENS, num_loops=3)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(TOKENS, num_loops=3)

    with lk.use_backend("reference"):
        baseline = call()
    hooked = both(model, call, WHERE["all"])[1]
    assert hooked.dtype == baseline.dtype
    error, bound = ((out.double() - exact).abs().max() for out in (hooked, baseline))
    assert error <= 2 * bound + torch.finfo(hooked.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("rule", [0.2, HiddenChange(0.2)], ids=["threshold", "rule"])
@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}], ids=str)
@torch.no_grad()
def test_exits(rule: Any, changes: Any) -> None:
    model = new_model(**changes)
    sigma = NOISE if changes else None

    def call() -> Any:
        if isinstance(rule, float):
            stages = model.stages(TOKENS, sigma)
            return stages.loop(stages.before(), 4, exit_threshold=rule)
        return model.hidden(TOKENS, sigma, num_loops=4, exit=rule)

    (plain, used), (hooked, hooked_used) = both(model, call, WHERE["all"])
    assert torch.equal(used, hooked_used)
    torch.testing.assert_close(hooked, plain, rtol=2e-5, atol=2e-5)
