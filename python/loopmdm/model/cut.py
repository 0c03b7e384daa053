"""Where the fused ops have to be cut: parts whose modules must be called, one by one.

The ops read weights; they never call the modules that hold them. So a module that somebody watches (hooks) or
replaces is called as in the reference model, together with the rest of its block or head. So is one that is
wrapped, except in LoRA adapters that only add to its weight: the ops read that sum (`model/adapters.py`).
The looks at a module here cost a call of the model a few microseconds a block.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from loopmdm.model.adapters import is_lora

# Hooks that gather weights or note which module runs: ops do without, or `parallel` calls them; and ours.
_WITHOUT_EFFECT = (
    "torch.distributed.",
    "torch.nn.parallel.",
    "torch.utils.module_tracker",
    "loopmdm.mdlm.patching",
)
_LINEAR, _GELU, _SEQUENTIAL = nn.Linear.forward, nn.GELU.forward, nn.Sequential.forward
_PARTS = ("norm1", "attn_qkv", "attn_out", "norm2", "mlp", "adaLN_modulation")
# What was said of each model: a warning once is enough.
_said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def why_watched(module: nn.Module, *, own_forward: bool = True) -> str | None:
    """What looks at the calls of this very module; None: nothing does.

    own_forward: whether `module.forward` has to be that of its class (`patch` sets another).
    """
    before, after = module._forward_pre_hooks, module._forward_hooks
    if (before or after) and (_matters(before) or _matters(after)):
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if own_forward and "forward" in module.__dict__:
        return "has a forward set on the instance"
    return None


def why_global() -> str | None:
    """Hooks on every module there is."""
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        hooks = getattr(nn_module, f"_global_{kind}_hooks")
        if hooks and _matters(hooks):
            return "every module has global hooks (torch.nn.modules.module)"
    return None


def why_linear(linear: Any, *, bias: bool) -> str | None:
    """Why a linear layer is not the product with its weight alone, or with that and its adapters'."""
    if is_lora(linear):
        inside = [part for part in linear.modules() if part is not linear]
        watched = next((why for part in inside if (why := why_watched(part)) is not None), None)
        return why_watched(linear) or watched or why_linear(linear.base_layer, bias=bias)
    if type(linear).forward is not _LINEAR:
        return _is_a(linear)
    parameters = linear._parameters  # a parametrized weight is not in here, and reading it would compute it
    if ("bias" not in parameters or parameters["bias"] is not None) is not bias:
        return "has no bias" if bias else "has a bias"
    weight = parameters.get("weight")
    if weight is not None and not _plain(weight):
        return f"has a weight of type {type(weight).__name__}"
    return why_watched(linear)


def why_norm(norm: nn.Module, forward: Callable[..., Any]) -> str | None:
    return _is_a(norm) if type(norm).forward is not forward else why_watched(norm)


def why_block(
    block: nn.Module, forward: Callable[..., Any], norm_forward: Callable[..., Any], *, own: bool = True
) -> str | None:
    """Why a block is not what its weights alone make it, naming the module inside; None: it is.

    Args:
        block: with the attributes of the reference's DDiTBlock.
        forward, norm_forward: of the class of block and of norms that the ops compute.
        own: whether `block.forward` has to be that of its class (`patch` sets another).
    """
    if type(block).forward is not forward:
        return _is_a(block)
    if (why := why_watched(block, own_forward=own)) is not None:
        return why
    for name in _PARTS:
        if (why := _why_part(name, block._modules.get(name), norm_forward)) is not None:
            return named(f".{name}", why)
    return None


def named(name: str, why: str) -> str:
    """A reason with the name of its module; one that begins with a dot is of a module inside."""
    return name + why if why.startswith(".") else f"{name} {why}"


def _why_part(name: str, module: Any, norm_forward: Callable[..., Any]) -> str | None:
    if module is None:
        return "is missing"
    if name == "mlp":
        return _why_mlp(module)
    if name.startswith("norm"):
        return why_norm(module, norm_forward)
    if name == "adaLN_modulation":  # called in any case
        return why_watched(module)
    return why_linear(module, bias=False)


def _why_mlp(mlp: Any) -> str | None:
    if type(mlp).forward is not _SEQUENTIAL:
        return _is_a(mlp)
    modules = mlp._modules
    if tuple(modules) != ("0", "1", "2"):
        return f"has {len(modules)} modules"
    act = modules["1"]
    if type(act).forward is not _GELU:
        return f".1 {_is_a(act)}"
    if act.approximate != "tanh":
        return ".1 is a GELU without approximate='tanh'"
    whys = (why_linear(modules["0"], bias=True), why_watched(act), why_linear(modules["2"], bias=True))
    for index, why in enumerate(whys):
        if why is not None:
            return f".{index} {why}"
    return why_watched(mlp)


def why_head(layer: nn.Module, forward: Callable[..., Any], norm_forward: Callable[..., Any]) -> str | None:
    """As `why_block`, of the output layer."""
    if type(layer).forward is not forward:
        return _is_a(layer)
    if (why := why_watched(layer)) is not None:
        return why
    modules: Mapping[str, Any] = layer._modules
    parts = {
        "norm_final": why_norm(modules["norm_final"], norm_forward),
        "linear": why_linear(modules["linear"], bias=True),
        "adaLN_modulation": why_watched(modules["adaLN_modulation"]),
    }
    return next((named(f".{name}", why) for name, why in parts.items() if why is not None), None)


def say(model: nn.Module, reasons: Iterable[str]) -> None:
    """Warn of reasons that were not yet said of `model`."""
    said = _said.setdefault(model, set())
    new = [reason for reason in dict.fromkeys(reasons) if reason not in said]
    if not new:
        return
    said.update(new)
    more = f"; and {len(new) - 3} more" if len(new) > 3 else ""
    warnings.warn(
        f"{type(model).__name__}: modules that are watched, wrapped or replaced are called one by one in"
        f" PyTorch, which is slower than the fused kernels: {'; '.join(new[:3])}{more}",
        stacklevel=2,
    )


def _matters(hooks: Mapping[int, Any]) -> bool:
    for hook in hooks.values():
        inner = getattr(hook, "func", hook)  # of a functools.partial
        if not str(getattr(inner, "__module__", "")).startswith(_WITHOUT_EFFECT):
            return True
    return False


def _plain(weight: Tensor) -> bool:
    kind: Any = type(weight)
    return (
        kind is nn.Parameter
        or kind is Tensor
        or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
        or kind.__name__ in ("DTensor", "FakeTensor", "FunctionalTensor")
    )


def _is_a(module: Any) -> str:
    kind = type(module)
    return f"is a {kind.__module__}.{kind.__qualname__}"
