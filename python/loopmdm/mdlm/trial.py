"""A foreign module's own code, run on random weights and input without a trace in the module.

What runs is a copy: random values in place of the parameters (zeros, as at initialisation, would hide what a
part computes), in eval mode, without hooks, with nothing of the caller's surroundings (autocast, default
dtype, random state, global hooks, dispatch modes), in fp32 where the code allows it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from loopmdm.model.modules import frequencies

_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
_GLOBAL_HOOKS = tuple(
    name for name, value in vars(nn_module).items() if name.startswith("_global_") and isinstance(value, dict)
)
_PERIOD = 65_537  # values of the noise; a prime, so that no two rows of a matrix are alike


class CannotRunError(Exception):
    """The module's own code does not run here; the message says why."""


class StandIn(partial[Any]):
    """A forward that this package sets on an instance: copies do without it."""


class Mode(NamedTuple):
    """Where and in which precision a copy runs."""

    device: torch.device
    dtype: torch.dtype  # of the parameters
    autocast: torch.dtype | None = None


class Ran(NamedTuple):
    out: Any
    precision: torch.dtype  # the narrowest floating dtype that was met on the way


def modes(network: nn.Module) -> list[Mode]:
    """In which to try: first in fp32 on the CPU, then as the module is, then as on a GPU, under autocast."""
    like = next(p for p in network.parameters() if p.is_floating_point())
    own = [like.dtype] if like.dtype != torch.float32 else []
    devices = dict.fromkeys((torch.device("cpu"), torch.device("cpu") if like.is_meta else like.device))
    return [
        mode
        for device in devices
        for mode in (
            *(Mode(device, dtype) for dtype in (torch.float32, *own)),
            Mode(device, torch.float32, torch.bfloat16),
        )
    ]


@contextmanager
def apart(mode: Mode) -> Iterator[None]:
    """Inside, nothing is as the caller has set it, and nothing is left changed."""
    cuda = mode.device.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([mode.device] if cuda else []))
        torch.default_generator.manual_seed(0)
        stack.enter_context(_disable_current_modes())
        stack.enter_context(mode.device)
        stack.enter_context(_as_it_was_at_first())
        for kind in dict.fromkeys(("cpu", mode.device.type)):
            stack.enter_context(autocast(kind, mode.autocast))
        yield


def autocast(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    """To `dtype` on devices of a kind; None: off."""
    return torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def _as_it_was_at_first() -> Iterator[None]:
    """PyTorch's default dtype, and no hook on every module."""
    dtype = torch.get_default_dtype()
    hooks = {name: getattr(nn_module, name) for name in _GLOBAL_HOOKS}
    try:
        torch.set_default_dtype(torch.float32)
        for name, hook in hooks.items():
            setattr(nn_module, name, type(hook)())
        yield
    finally:
        torch.set_default_dtype(dtype)
        for name, hook in hooks.items():
            setattr(nn_module, name, hook)


def run(module: nn.Module, *args: Any, **options: Any) -> Ran:
    """Call it inside `apart`.

    Raises:
        CannotRunError: whatever the module raises.
    """
    met = _Precision()
    try:
        with met:
            out = module(*args, **options)
    except Exception as error:
        raise CannotRunError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    kept = [b.dtype for b in module.buffers() if b.is_floating_point()]
    narrowest = min((*met.dtypes, *kept, torch.float32), key=lambda dtype: -torch.finfo(dtype).eps)
    return Ran(out, narrowest)


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the floating dtypes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize > 1:
                self.dtypes.add(leaf.dtype)
        return out


def copied(module: nn.Module, mode: Mode, seed: int, replaced: Mapping[int, Any] | None = None) -> Any:
    """A copy of `module` as said above.

    Args:
        module: is not changed.
        mode: where the copy shall run.
        seed: of the random values.
        replaced: by id, what stands in the copy in place of an object of the module.

    Raises:
        CannotRunError: the module cannot be copied.
    """
    memo: dict[int, Any] = dict(replaced or {})
    inside = list(_modules(module, memo))
    for part in inside:
        for name in _HOOKS:
            memo[id(getattr(part, name))] = OrderedDict()
        memo[id(part._forward_pre_hooks)] = OrderedDict(_hooks_that_make_weights(part))
        for value in vars(part).values():
            if isinstance(value, StandIn):
                memo[id(value)] = None
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    number = seed
    for part in inside:
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            number += 1
            if id(parameter) not in memo:
                _check_plain(name, parameter)
                value = random_values(name, parameter, number).to(mode.device, mode.dtype)
                memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            _check_plain(name, buffer)
            memo[id(buffer)] = _widened(name, buffer, mode)
    try:
        twin: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:
        raise CannotRunError(f"it cannot be copied ({type(error).__name__}: {error})") from error
    for part in twin.modules():
        if vars(part).get("forward", part) is None:
            del part.forward
    return twin.eval()


def _check_plain(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise CannotRunError(f"{name} is on the meta device")
    if type(tensor) not in (Tensor, nn.Parameter) and type(tensor).__name__ != "Buffer":
        raise CannotRunError(f"{name} is a {type(tensor).__name__}")


def _hooks_that_make_weights(module: nn.Module) -> list[tuple[int, Any]]:
    """Of weight_norm, spectral_norm and pruning: without them the weight is missing."""
    hooks = module._forward_pre_hooks.items()
    return [(key, hook) for key, hook in hooks if type(hook).__module__.startswith("torch.nn.utils.")]


def _modules(module: nn.Module, without: Mapping[int, Any]) -> Iterator[nn.Module]:
    seen = {*without}
    stack = [module]
    while stack:
        part = stack.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            stack += [child for child in part._modules.values() if child is not None]


def _widened(name: str, buffer: Tensor, mode: Mode) -> Tensor:
    """A buffer as it is; frequencies that were rounded with the module as they were before."""
    if not buffer.is_floating_point():
        return buffer.detach().to(mode.device, copy=True)
    if name == "inv_freq" and torch.finfo(buffer.dtype).bits < 32:
        exact = frequencies(len(buffer), buffer.device)
        if bool(((buffer.float() / exact - 1).abs() <= torch.finfo(buffer.dtype).eps).all()):
            return exact.to(mode.device)
    wide = torch.float32 if buffer.dtype == torch.float64 else buffer.dtype
    return buffer.detach().to(mode.device, wide, copy=True)


def cpu_generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


@cache
def _noise() -> Tensor:
    return torch.randn(_PERIOD, generator=cpu_generator(), dtype=torch.float32, device="cpu")


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal values, float32, on the CPU; they repeat, so many cost no more than a copy."""
    count = math.prod(shape)
    start = 7919 * seed % _PERIOD
    values = _noise().repeat(-(-(count + start) // _PERIOD))[start : start + count]
    return values.reshape(shape)


def random_values(name: str, like: Tensor, seed: int) -> Tensor:
    """Values of a trained parameter's size: scales about 1, biases below, matrices that keep sizes."""
    if not like.is_floating_point():
        return like.detach().clone()
    values = noise(tuple(like.shape), seed)
    if like.ndim >= 2:
        return values.div_(math.sqrt(like.shape[-1]))
    return values.mul_(0.3) if "bias" in name else values.mul_(0.2).add_(1)
