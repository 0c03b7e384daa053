"""Modules that are hooked are called as the reference model calls them, and what hooks return counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as nn_module

from loopmdm import sample
from loopmdm.quality.causal import CausalConfig, CausalLM
from tests.mdlm.reference_dit import randomise
from tests.tools.watched import (
    IDS,
    LOOPS,
    MARKS,
    ORDER,
    SIGMA,
    TOKENS,
    assert_alike,
    new_model,
    of_ours,
    of_patched,
)

pytestmark = MARKS

# Every module that the reference calls inside a looped block and the head.
INSIDE = ["norm1", "attn_qkv", "attn_out", "norm2", "mlp", "mlp.0", "mlp.1", "mlp.2", "adaLN_modulation"]
PATHS = [
    "vocab_embed",
    "sigma_map.mlp.0",
    "blocks.1",
    *(f"blocks.1.{name}" for name in INSIDE),
    "output_layer",
    *(f"output_layer.{name}" for name in ("norm_final", "linear", "adaLN_modulation")),
]


@pytest.mark.parametrize("path", PATHS)
def test_forward_hooks(path: str) -> None:
    model, oracle = of_ours()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, net in enumerate((model, oracle)):
        module = net.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, n=number: seen[n].append(args[0].double()))
        module.register_forward_hook(lambda _, args, out: 1.5 * out)
    plain = of_ours()[1](IDS, SIGMA)
    changed = assert_alike(model, oracle)
    assert (changed - plain).abs().max() > 1e-5
    if path.startswith("sigma_map"):
        seen[0] = seen[0][1:]  # blocks and head ask for the condition, each
    assert len(seen[0]) == len(seen[1]) == (LOOPS if path.startswith("blocks") else 1)
    for ours, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", [f"blocks.1.{name}" for name in INSIDE])
def test_forward_hooks_of_a_patched_module(path: str) -> None:
    model, oracle = of_patched()
    fired: list[Any] = []
    for net in (model, oracle):
        net.get_submodule(path).register_forward_hook(lambda *a, net=net: fired.append(net) or 1.5 * a[2])
    assert_alike(model, oracle)
    assert fired.count(model) == fired.count(oracle) == LOOPS


def test_hooks_on_blocks_of_a_patched_module() -> None:
    model, oracle = of_patched()
    for net in (model, oracle):
        for index in (0, 3, 4):
            net.blocks[index].register_forward_hook(lambda *a: 1.5 * a[2])
    assert_alike(model, oracle)
    handle = model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.2 has forward hooks.*once for all its loops"):
        model(IDS, SIGMA)
    model.num_loops, oracle.order = 1, [0, 1, 2, 3, 4]
    assert_alike(model, oracle)
    handle.remove()
    model.num_loops, oracle.order = LOOPS, ORDER
    assert_alike(model, oracle)


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn_qkv", "blocks.1.norm1", "output_layer.linear"])
def test_backward_hooks(path: str) -> None:
    model, oracle = of_ours()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, net in enumerate((model, oracle)):
        module = net.get_submodule(path)
        module.register_full_backward_pre_hook(lambda _, grads, n=number: seen[n].append(grads[0]))
        module.register_full_backward_hook(
            lambda _, into, out: tuple(g if g is None else 2 * g for g in into)
        )
    assert_alike(model, oracle)
    assert len(seen[0]) == len(seen[1]) == (LOOPS if path.startswith("blocks") else 1)
    for ours, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_global_hooks() -> None:
    model, oracle = of_ours()
    names: list[str] = []
    hook = nn_module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        model(IDS, SIGMA)
        ours = sorted(names)
        names.clear()
        oracle(IDS, SIGMA)
    finally:
        hook.remove()
    for asked_twice in ("SigmaEmbedding", "Sequential", "Linear", "SiLU", "Linear"):
        ours.remove(asked_twice)  # as above
    renamed = {
        "DIT": "ReferenceDIT",
        "TokenEmbedding": "EmbeddingLayer",
        "SigmaEmbedding": "TimestepEmbedder",
        "RotaryEmbedding": "Rotary",
        "ScaleNorm": "LayerNorm",
        "OutputLayer": "FinalLayer",
    }
    assert sorted(renamed.get(name, name) for name in ours) == sorted(names)


def test_a_causal_model() -> None:
    model = CausalLM(CausalConfig(vocab_size=29, mask_token_id=28, hidden_size=32, num_heads=2, num_layers=2))
    randomise(model)
    plain = model.token_nll(TOKENS)
    model.linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.token_nll(TOKENS), plain, rtol=2e-5, atol=2e-5)
    model.norm_final.register_forward_hook(lambda *args: 2 * args[2])
    expected = torch.log_softmax(
        F.linear(
            2 * model.norm_final.forward(model.hidden(TOKENS)), model.linear.weight, model.linear.bias
        ).index_fill(-1, torch.tensor([28]), -torch.inf),
        -1,
    )
    expected = -expected.gather(-1, TOKENS[..., None])[..., 0]
    torch.testing.assert_close(model.token_nll(TOKENS), expected, rtol=2e-5, atol=2e-5)


def test_a_called_head_computes_masked_rows_only() -> None:
    model = new_model()
    rows: list[int] = []
    model.output_layer.linear.register_forward_hook(lambda *args: rows.append(args[1][0][..., 0].numel()))
    t = torch.full((4,), 0.3)
    model.loss(TOKENS, seed=1, t=t)
    assert len(rows) == 1 and 0 < rows[0] < TOKENS.numel() / 2


def test_hooks_that_come_during_a_run() -> None:
    """As from the start, as far as they are there."""
    fired: list[int] = []

    def on_step(_: Any) -> None:
        if not fired:
            model.output_layer.linear.register_forward_hook(lambda *_: fired.append(1))

    model = new_model(time_conditioning=True)
    sample(model, num_samples=2, length=8, steps=8, seed=1, progress=False, on_step=on_step)
    assert len(fired) > 1
