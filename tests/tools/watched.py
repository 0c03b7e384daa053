"""Models beside the reference changed alike, and hooks that change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loopmdm import LoopMDM, LoopMDMConfig, patch
from loopmdm.mdlm import DIT
from tests.mdlm.reference_dit import ReferenceDIT, randomise, reference_config

VOCAB, LOOPS = 13, 3
ORDER = [0, 1, 2, 1, 2, 1, 2, 3, 4]
SAID = "called one by one"
# pytest's marks of every file that uses this one: what is expected to be said.
MARKS = [
    pytest.mark.filterwarnings(f"ignore:.*{SAID}:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]
IDS = torch.randint(VOCAB - 1, (3, 11), generator=torch.Generator().manual_seed(5))
SIGMA = torch.tensor([0.02, 0.7, 4.0], dtype=torch.float64)


def of_ours() -> tuple[Any, Any]:
    """A model in float64, and the reference with its weights."""
    oracle = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(oracle)
    oracle.order = ORDER
    model = DIT(reference_config(num_loops=LOOPS), VOCAB).double().eval()
    model.load_state_dict(oracle.state_dict())
    return model, oracle


def of_patched() -> tuple[Any, Any]:
    module = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(module)
    oracle = copy.deepcopy(module)
    oracle.order = ORDER
    return patch(module, LOOPS), oracle


def assert_alike(model: nn.Module, oracle: nn.Module) -> Tensor:
    """Logits and the gradients of what both train."""
    out, expected = model(IDS, SIGMA), oracle(IDS, SIGMA)
    torch.testing.assert_close(out, expected)
    pairs = dict(model.named_parameters())
    assert list(pairs) == [name for name, _ in oracle.named_parameters()]
    trained = [name for name, parameter in pairs.items() if parameter.requires_grad]
    wanted = dict(oracle.named_parameters())
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((out * weights).sum(), [pairs[n] for n in trained], allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), [wanted[n] for n in trained], allow_unused=True)
    for name, got, right in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, name=name: f"{name}: {text}")
    return expected.detach()


def relu(net: Any) -> None:
    net.blocks[1].mlp[1] = nn.ReLU()


def new_model(**changes: Any) -> LoopMDM:
    values = dict(vocab_size=29, mask_token_id=28, hidden_size=32, num_heads=2, num_layers=5, cond_dim=8)
    values |= dict(max_length=16, max_loops=4, dropout=0.0, gate_init=1.0)
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(**{**values, **changes})).eval()
    randomise(model)
    return model


TOKENS = torch.randint(28, (4, 16), generator=torch.Generator().manual_seed(2))
NOISE = torch.rand(4, generator=torch.Generator().manual_seed(3))


def watch(module: nn.Module) -> list[Any]:
    return [part.register_forward_hook(lambda *_: None) for part in module.modules()]


def both(model: LoopMDM, call: Callable[[], Any], where: Callable[[LoopMDM], nn.Module]) -> tuple[Any, Any]:
    """call() by the ops, then with hooks that change nothing."""
    plain = call()
    handles = watch(where(model))
    with_hooks = call()
    for handle in handles:
        handle.remove()
    return plain, with_hooks


WHERE = {
    "all": lambda model: model,
    "one block": lambda model: model.blocks[1],
    "head": lambda m: m.output_layer,
}


def lora(model: nn.Module, **options: Any) -> Any:
    targets = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "output_layer.linear"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))
