"""The reference model, MDLM: its modules by its names, its checkpoints, and our kernels in its modules."""

from loopmdm.mdlm.dit import DIT, MDLM, MaskedLMOutput, convert_checkpoint, from_mdlm
from loopmdm.mdlm.patching import patch, unpatch

__all__ = ["DIT", "MDLM", "MaskedLMOutput", "convert_checkpoint", "from_mdlm", "patch", "unpatch"]
