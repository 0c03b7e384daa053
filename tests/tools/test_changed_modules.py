"""Modules that are wrapped or replaced are honoured: against the reference model changed alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from loopmdm import ComputePlan, patch
from loopmdm.mdlm import DIT
from loopmdm.sampling.graphs import check_graphs
from tests.mdlm.reference_dit import HubBackbone, ReferenceDIT, randomise, reference_config
from tests.tools.watched import (
    IDS,
    LOOPS,
    MARKS,
    ORDER,
    SIGMA,
    TOKENS,
    VOCAB,
    assert_alike,
    lora,
    new_model,
    of_ours,
    of_patched,
    relu,
)

pytestmark = MARKS


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(net: Any) -> None:
    old = net.blocks[1].attn_qkv
    new = Doubled(old.in_features, old.out_features, bias=False).double()
    new.load_state_dict(old.state_dict())
    net.blocks[1].attn_qkv = new


def with_bias(net: Any) -> None:
    torch.manual_seed(2)
    for name in ("attn_qkv", "attn_out"):
        linear = getattr(net.blocks[2], name)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64))


def without_bias(net: Any) -> None:
    net.blocks[1].mlp[0].bias = None


def exact_gelu(net: Any) -> None:
    net.blocks[1].mlp[1].approximate = "none"


def longer_mlp(net: Any) -> None:
    net.blocks[2].mlp.append(nn.Tanh())


def rms_norm(net: Any) -> None:
    net.blocks[1].norm2 = nn.RMSNorm(16, eps=1e-5).double()


def own_forward(net: Any) -> None:
    linear = net.blocks[1].mlp[2]
    linear.forward = lambda x: 0.5 * F.linear(x, linear.weight, linear.bias)


def pruned(net: Any) -> None:
    torch.manual_seed(3)
    for linear in (net.blocks[1].attn_qkv, net.blocks[2].mlp[2], net.output_layer.linear):
        prune.random_unstructured(linear, "weight", amount=0.5)


def weight_normed(net: Any) -> None:
    torch.nn.utils.weight_norm(net.blocks[1].attn_out)
    torch.nn.utils.weight_norm(net.output_layer.linear)
    with torch.no_grad():
        net.blocks[1].attn_out.weight_g.mul_(1.5)
        net.output_layer.linear.weight_g.mul_(1.5)


def spectrally_normed(net: Any) -> None:
    torch.manual_seed(4)
    spectral_norm(net.blocks[1].mlp[0])


def parametrized(net: Any) -> None:
    class Squared(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.square()

    parametrize.register_parametrization(net.blocks[1].attn_qkv, "weight", Squared())
    parametrizations.weight_norm(net.blocks[1].mlp[0])


def adapted(net: Any, **options: Any) -> None:
    torch.manual_seed(6)
    targets = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "adaLN_modulation", "output_layer.linear"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, net)
    net.double()


CHANGES = [
    replaced,
    with_bias,
    without_bias,
    relu,
    exact_gelu,
    longer_mlp,
    rms_norm,
    own_forward,
    pruned,
    weight_normed,
    spectrally_normed,
    parametrized,
    adapted,
]


@pytest.mark.parametrize("make", [of_ours, of_patched])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_counts(make: Callable[[], tuple[Any, Any]], change: Callable[[Any], None]) -> None:
    model, oracle = make()
    plain = oracle(IDS, SIGMA)
    change(model), change(oracle)
    changed = assert_alike(model, oracle)
    assert (changed - plain).abs().max() > 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changed_before_patch_counts(change: Callable[[Any], None]) -> None:
    if change is rms_norm:
        pytest.skip("another norm is another model, not a changed one")
    module = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(module)
    oracle = copy.deepcopy(module)
    oracle.order = ORDER
    change(module), change(oracle)
    assert_alike(patch(module, LOOPS), oracle)


def test_states_after_each_block() -> None:
    oracle = HubBackbone(reference_config(), VOCAB).double().eval()
    randomise(oracle)
    model = DIT(reference_config(num_loops=1), VOCAB).double().eval()
    model.load_state_dict(oracle.state_dict())
    relu(model), relu(oracle)
    expected, states = oracle(IDS, SIGMA, output_hidden_states=True)
    logits, ours = model.forward_with_states(IDS, SIGMA)
    torch.testing.assert_close((logits, ours), (expected, states))


def test_what_reads_weights_alone_stays_with_the_ops() -> None:
    """Parametrized weights, merged adapters, hooks of PyTorch's own counters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = new_model()
        parametrizations.weight_norm(model.blocks[1].attn_qkv)
        lora(model).merge_and_unload()
        assert model.cuts() == []
        with FlopCounterMode(display=False):
            assert model.cuts() == []
        assert torch.isfinite(model(TOKENS)).all()
        prune.l1_unstructured(model.blocks[0].attn_out, "weight", amount=0.5)
        assert model.cuts() == ["blocks.0.attn_out has forward hooks"]
        prune.remove(model.blocks[0].attn_out, "weight")
        assert model.cuts() == []


def test_it_is_said_once() -> None:
    model = new_model()
    model.blocks[1].attn_qkv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"LoopMDM: .*blocks\.1\.attn_qkv has forward hooks$"):
        model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS)
        model.blocks[2].mlp[1] = nn.ReLU()
        with pytest.warns(UserWarning, match=r"blocks\.2\.mlp\.1 is a torch\..*ReLU"):
            model(TOKENS)
        model(TOKENS)


def test_what_needs_the_weights_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    relu(model)
    with pytest.raises(ValueError, match=r"block\.mlp\.1 is a .*ReLU.*call the block"):
        model.blocks[1].weights()
    model.use_fp8_weights(head=False)
    with torch.no_grad(), pytest.raises(ValueError, match=r"use_fp8_weights: .*blocks\.1\.mlp\.1"):
        model(TOKENS)
    model = new_model()
    model.output_layer.linear.register_forward_hook(lambda *_: None)
    model.use_fp8_weights(blocks=False)
    with torch.no_grad(), pytest.raises(ValueError, match=r"use_fp8_weights: .*output_layer\.linear"):
        model(TOKENS)
    monkeypatch.setattr("loopmdm_kernels.graphs.why_not", lambda device: None)
    with pytest.raises(ValueError, match=r"cuda_graphs: .*output_layer\.linear has forward hooks"):
        check_graphs([model], ComputePlan.constant(2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    model = new_model().train()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, num_loops=2), model(TOKENS, num_loops=2))
    fired: list[int] = []
    model.blocks[1].attn_qkv.register_forward_hook(lambda *args: fired.append(1) or 2 * args[2])
    model.output_layer.linear.register_forward_hook(lambda *args: 2 * args[2])
    torch.testing.assert_close(compiled(TOKENS, num_loops=3), model(TOKENS, num_loops=3))
    assert len(fired) == 6
    torch.manual_seed(1)
    loss = compiled(TOKENS, labels=TOKENS).loss
    torch.manual_seed(1)
    torch.testing.assert_close(loss, model(TOKENS, labels=TOKENS).loss)
    torch._dynamo.reset()
