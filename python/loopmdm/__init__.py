"""Looped masked diffusion language models: model, training, sampling."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopmdm.config import LoopMDMConfig
    from loopmdm.mdlm import patch
    from loopmdm.model import LoopMDM
    from loopmdm.plan import ComputePlan
    from loopmdm.sampling import sample
    from loopmdm_kernels.version import __version__

__all__ = ["ComputePlan", "LoopMDM", "LoopMDMConfig", "__version__", "patch", "sample"]

# Imported when first used, so that the command line answers --help without torch.
_MODULES = {
    "ComputePlan": "loopmdm.plan",
    "LoopMDM": "loopmdm.model",
    "LoopMDMConfig": "loopmdm.config",
    "__version__": "loopmdm_kernels.version",
    "patch": "loopmdm.mdlm",
    "sample": "loopmdm.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
