"""The `loopmdm` operator library: what torch.compile sees. Eager calls do not pass through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("loopmdm", "DEF")  # type: ignore[no-untyped-call]
DEVICES = ("CPU", "CUDA")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator by its schema, with one implementation for all devices and one for fake tensors."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in DEVICES:
        LIBRARY.impl(name, implementation, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"loopmdm::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(f"loopmdm::{name}", backward, setup_context=setup_context, lib=LIBRARY)
