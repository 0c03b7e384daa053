"""LoopMDM in lm-evaluation-harness (EleutherAI): importing it registers the models `loopmdm` and `dlm`."""

from loopmdm.harness.duo import DuoHarness
from loopmdm.harness.model import LoopMDMHarness

__all__ = ["DuoHarness", "LoopMDMHarness"]
