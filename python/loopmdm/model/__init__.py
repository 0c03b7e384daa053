"""The denoiser: a network with a loop, its configuration, loss and FLOPs, and its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopmdm.lazy import lazily

if TYPE_CHECKING:
    from loopmdm.model.denoiser import LoopMDM, LossOutput

__all__ = ["LoopMDM", "LossOutput"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "loopmdm.model.denoiser"))
