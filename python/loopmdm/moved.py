"""Modules under the names they had before they moved into rooms: they are what stands there now."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "formats": "hub pickle_machine pickles safetensors_files shards torch_files",
    "mdlm": "likeness likeness_static patching trial",
    "model": "checkpoint config cut diffusion draws flops loop_law masks modes modules parallel stages"
    " vocabulary",
    "quality": "causal",
}
MOVED = {f"loopmdm.{name}": f"loopmdm.{room}.{name}" for room in _ROOMS for name in _ROOMS[room].split()}
MOVED["loopmdm.mdlm_stated"] = "loopmdm.mdlm.stated"
MOVED["loopmdm.mdlm_weights"] = "loopmdm.mdlm.weights"
MOVED["loopmdm.quality.transformers_scorer"] = "loopmdm.quality.scorer"
MOVED["loopmdm.train.recipes"] = "loopmdm.runs.recipes"
MOVED["loopmdm.train.seeds"] = "loopmdm.model.seeds"


class _Finder:
    """Asked for modules that no other finder knows."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


def answer() -> None:
    """Let imports find modules under their old names."""
    sys.meta_path.append(_Finder())
