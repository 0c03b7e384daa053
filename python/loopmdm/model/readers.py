"""Readers of other projects' checkpoints, which stand above the model; `loopmdm` enters them here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# {name: reader(class, source, **options) -> a model of that class}
READERS: dict[str, Callable[..., Any]] = {}
