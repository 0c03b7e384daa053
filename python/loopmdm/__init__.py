"""Looped masked diffusion language models: model, training, sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopmdm import moved
from loopmdm.lazy import lazily
from loopmdm.model.readers import READERS

if TYPE_CHECKING:
    from loopmdm.mdlm import patch
    from loopmdm.model import LoopMDM
    from loopmdm.model.config import LoopMDMConfig
    from loopmdm.plan import ComputePlan
    from loopmdm.quality.estimator import likelihood
    from loopmdm.sampling import sample
    from loopmdm_kernels.version import __version__

__all__ = ["ComputePlan", "LoopMDM", "LoopMDMConfig", "__version__", "likelihood", "patch", "sample"]

# Imported when first used, so that the command line answers --help without torch.
__getattr__ = lazily(
    __name__,
    {
        "ComputePlan": "loopmdm.plan",
        "LoopMDM": "loopmdm.model",
        "LoopMDMConfig": "loopmdm.model.config",
        "__version__": "loopmdm_kernels.version",
        "likelihood": "loopmdm.quality.estimator",
        "patch": "loopmdm.mdlm",
        "sample": "loopmdm.sampling",
    },
)


def _from_mdlm(*args: Any, **options: Any) -> Any:
    from loopmdm.mdlm import from_mdlm

    return from_mdlm(*args, **options)


READERS["mdlm"] = _from_mdlm
moved.answer()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
