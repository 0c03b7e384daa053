"""Train and eval mode: switched for a while, every module's own mode put back; said where it surprises."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopmdm_kernels.tracing import constant_when_compiled, transformed

_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Modules that are in eval mode for a while: by how many blocks at once, and the mode they had before.
_switched: dict[nn.Module, tuple[int, bool]] = {}
_lock = threading.Lock()


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; the mode that each submodule had is put back, also after an error.

    Blocks may overlap, in one thread or in several: the last one out puts the modes back.
    """
    modules = _all_modules(models)
    try:
        with _lock:
            for module in modules:
                count, training = _switched.get(module, (0, module.training))
                _switched[module] = count + 1, training
                _switch(module, False)
        yield
    finally:
        with _lock:
            for module in modules:
                count, training = _switched.pop(module)
                if count > 1:
                    _switched[module] = count - 1, training
                else:
                    _switch(module, training)


def _all_modules(models: Iterable[nn.Module]) -> dict[nn.Module, None]:
    """Each module once; `nn.Module.modules` takes as long as a step of a small model."""
    found: dict[nn.Module, None] = {}
    left = list(models)
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left += [part for part in module._modules.values() if part is not None]
    return found


def _switch(module: nn.Module, training: bool) -> None:
    if module.training != training:  # to set an attribute of a module is slow
        module.training = training


def say_if_trained(model: nn.Module, out: Tensor, max_loops: int) -> None:
    """Warn, once of each model, when gradients flow through what it computed in eval mode with its default S.

    In a compiled graph, which has no room for such a hook, where a loss is traced with gradients.
    """
    message = (
        f"{type(model).__name__}: gradients in eval mode, where S is max_loops = {max_loops} and not drawn,"
        " and dropout is off. To train call model.train(): from_pretrained and from_mdlm return a model in"
        " eval mode, and Lightning's fit leaves it there. To take gradients so, give num_loops"
    )
    if not (torch.is_grad_enabled() and out.requires_grad):
        return
    if torch.compiler.is_compiling():
        _say_of_graph(message)
        return
    if model in _said or transformed():
        return

    def say(_: Tensor) -> None:
        if model not in _said:
            _said.add(model)
            warnings.warn(message, stacklevel=2)

    out.register_hook(say)  # type: ignore[no-untyped-call]


@constant_when_compiled
def _say_of_graph(message: str) -> int:
    """Runs while a graph is traced, and leaves nothing in it."""
    warnings.warn(message, stacklevel=2)
    return 0
