"""A backward pass in eval mode, where S is not drawn, is said once; nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.mdlm import DIT

SIZES: dict[str, Any] = dict(hidden_size=32, num_heads=2, num_layers=3, cond_dim=8, max_length=16)
IDS = torch.randint(39, (2, 8), generator=torch.Generator().manual_seed(1))
SAID = r"LoopMDM: gradients in eval mode, where S is max_loops = 4 and not drawn"
CALLS: dict[str, Callable[..., Tensor]] = {
    "labels": lambda model, **options: model(IDS, labels=IDS, **options).loss,
    "loss": lambda model, **options: model.loss(IDS, **options).loss,
    "logits": lambda model, **options: model(IDS, **options).square().mean(),
}


def new_model(kind: type[LoopMDM] = LoopMDM, max_loops: int = 4) -> LoopMDM:
    torch.manual_seed(0)
    return kind(LoopMDMConfig(vocab_size=40, mask_token_id=39, max_loops=max_loops, **SIZES)).eval()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_backward_pass_in_eval_mode_is_said_once(call: Callable[..., Tensor]) -> None:
    model = new_model()
    first, second = call(model), call(model)  # an evaluation with gradients on
    with pytest.warns(UserWarning, match=SAID):
        first.backward()
    second.backward()
    call(model).backward()
    with pytest.warns(UserWarning, match=SAID):
        call(new_model()).backward()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_not_said(call: Callable[..., Tensor]) -> None:
    model = new_model()
    call(model.train()).backward()
    call(model.eval(), num_loops=2).backward()
    call(new_model(max_loops=1)).backward()
    with torch.no_grad():
        call(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not call(model).requires_grad
    DIT(model.config).eval()(IDS, torch.zeros(2)).sum().backward()


def test_compiled_logits_are_taken_for_an_evaluation() -> None:
    torch._dynamo.reset()
    torch.compile(new_model(), backend="eager")(IDS)
    torch.export.export(new_model(), (IDS,))
    torch._dynamo.reset()


@pytest.mark.parametrize("call", [CALLS["labels"], CALLS["loss"]], ids=["labels", "loss"])
def test_a_compiled_loss_says_it_where_it_is_traced(call: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    model = new_model()
    compiled = torch.compile(lambda: call(model), backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=SAID):
        compiled().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled().backward()
        model.train()
        compiled().backward()
    torch._dynamo.reset()
