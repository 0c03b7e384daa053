"""Looped masked diffusion language models: model, training, sampling."""

from loopmdm.config import LoopMDMConfig
from loopmdm.mdlm import patch
from loopmdm.model import LoopMDM
from loopmdm.plan import ComputePlan
from loopmdm.sampling import sample

__all__ = ["ComputePlan", "LoopMDM", "LoopMDMConfig", "patch", "sample"]
