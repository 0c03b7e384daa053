"""What the harness hands to a model besides its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch

from loopmdm.printable import printable
from loopmdm.terminal import note
from loopmdm_kernels.values import meant


def device_of(asked: str | None) -> torch.device:
    """The device asked for; the processor where there is no GPU.

    lm_eval asks for cuda:0 where nobody has said anything, whatever the machine has.
    """
    if torch.cuda.is_available():
        return torch.device(asked or "cuda")
    if asked is not None and torch.device(asked).type == "cuda":
        note(f"device {asked}: PyTorch finds no GPU here; on the CPU instead")
        asked = None
    return torch.device(asked or "cpu")


def refuse_unknown(unknown: Mapping[str, Any], init: Callable[..., Any]) -> None:
    """Complain about names in --model_args that the model does not take.

    Raises:
        ValueError: there is one.
    """
    known = [name for name, one in signature(init).parameters.items() if one.kind is not one.VAR_KEYWORD]
    known.remove("self")
    for name in unknown:
        raise ValueError(
            f"--model_args: {printable(name)} is not known{meant(name, known)}; accepted: {', '.join(known)}"
        )
