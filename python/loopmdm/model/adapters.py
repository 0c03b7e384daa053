"""LoRA adapters of peft as weights: W + scaling B A, which an op reads as any weight.

Gradients pass through the sum, so that adapters train through the op. What is more than that sum has to be
called: dropout on the adapter's input, DoRA and other variants, biases, quantized layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loopmdm_kernels.tracing import without_autocast

_LORA = "peft.tuners.lora.layer"


def is_lora(linear: Any) -> bool:
    """Whether a linear layer is a plain one with LoRA adapters of peft, of which the sum is all there is."""
    kind = type(linear)
    if kind.__module__ != _LORA or kind.__name__ != "Linear" or "forward" in linear.__dict__:
        return False
    base = linear.base_layer
    active = [name for name in linear.active_adapters if name in linear.lora_A]
    return type(base) is nn.Linear and (
        linear.disable_adapters
        or linear.merged
        or not any(
            name in linear.lora_variant
            or linear.lora_bias[name]
            or type(linear.lora_A[name]) is not nn.Linear
            or (linear.training and getattr(linear.lora_dropout[name], "p", 0.0) > 0)
            for name in active
        )
    )


def base_of(linear: Any) -> Any:
    """The layer that holds weight and bias."""
    return linear.base_layer if is_lora(linear) else linear


def weight_of(linear: Any) -> Tensor:
    """The weight of a linear layer, with its active adapters added."""
    weight: Tensor = base_of(linear).weight
    if not is_lora(linear) or linear.disable_adapters or linear.merged:
        return weight
    for name in linear.active_adapters:
        if name in linear.lora_A:
            weight = _with_delta(weight, linear, name)
    return weight


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model, with LoRA adapters merged into the weights that they stand on."""
    tensors: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if not is_lora(module):
            continue
        merged = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
        with torch.no_grad():
            merged[f"{name}.weight"] = weight_of(module).detach()
        if base_of(module).bias is not None:
            merged[f"{name}.bias"] = base_of(module).bias.detach()
        tensors = merged
    return tensors


def _with_delta(weight: Tensor, linear: Any, name: str) -> Tensor:
    """W + scaling B A, in one pass over W where the dtypes are one; autocast would round it."""
    a: Tensor = linear.lora_A[name].weight
    b: Tensor = linear.lora_B[name].weight
    with without_autocast(weight.device):
        if linear.fan_in_fan_out or not a.dtype == b.dtype == weight.dtype:
            delta: Tensor = linear.get_delta_weight(name)
            return weight + delta.to(weight.dtype)
        return torch.addmm(weight, b, a, alpha=linear.scaling[name])
