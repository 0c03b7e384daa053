"""PyTorch's parallel wrappers around a model: what they need of it, and what they cannot do with it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

# The wrapper that averages the gradients of a model.
_averages: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]] = (
    weakref.WeakKeyDictionary()
)


def _remember(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and child is not None:
        for module in child.modules():
            # A graph that reads this dictionary cannot have the compiled module that it is of among the keys.
            if type(module).__name__ != "OptimizedModule":
                _averages[module] = weakref.ref(parent)


register_module_module_registration_hook(_remember)


def check_averaged(model: nn.Module) -> None:
    """Raise RuntimeError where gradients would silently not be averaged over the ranks.

    DistributedDataParallel averages what its own forward computed; a method of the module inside is none.
    """
    averages = _averages.get(model)
    wrapper = None if averages is None else averages()
    if (
        wrapper is not None
        and torch.is_grad_enabled()
        and wrapper.require_backward_grad_sync
        and DistributedDataParallel._active_ddp_module is not wrapper
    ):
        raise RuntimeError(
            "loss: called on the model inside a DistributedDataParallel, so gradients would not be"
            " averaged; call the wrapper, ddp(input_ids, labels=input_ids), or this inside ddp.no_sync()"
        )


def with_whole_weights(blocks: Sequence[nn.Module], x: Tensor, run: Callable[[Tensor], Any]) -> Any:
    """run(x), which reads the weights of `blocks`; those that `fully_shard` split are gathered around it.

    In the backward pass too, by the hooks that FSDP2 sets around a block's own forward.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.compiler.is_compiling():
        return run(x)

    def checked(x: Tensor) -> Any:
        for block in blocks:
            for weight in block.parameters():
                refuse_split(weight)
        return run(x)

    gathered = checked
    for block in reversed(blocks):
        if isinstance(block, torch.distributed.fsdp.FSDPModule):
            gathered = partial(_gathered, block, gathered)
    return gathered(x)


def _gathered(block: Any, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    if "around" not in vars(block):
        torch.distributed.fsdp.register_fsdp_forward_method(block, "around")
    # A deque: FSDP2 finds the tensor in it, to know when the gradients of the block are whole, and does not
    # round it to the parameters' dtype, which the residual stream is not in.
    return block.around(run, deque([x]))


def refuse_split(weight: Tensor) -> None:
    """Raise ValueError for a weight of which this process holds a part only."""
    if type(weight).__name__ == "DTensor":  # its class is imported where there is one
        raise ValueError(
            "weights: split over the ranks (DTensor) where the model reads them. Under fully_shard call"
            " model(input_ids, labels=input_ids), or use register_fsdp_forward_method(model, 'loss');"
            " tensor parallelism is not supported"
        )
