"""LoopMDM in Hugging Face's tools. Importing it registers the model, without remote code.

After `import loopmdm.hf`, `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM` read what `save_pretrained` of
`LoopMDM` and of `LoopMDMForMaskedLM` writes; `LoopMDM.from_pretrained` reads both too.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from loopmdm.hf.config import LoopMDMPretrainedConfig
from loopmdm.hf.generation import LoopMDMGenerationOutput
from loopmdm.hf.model import LoopMDMForMaskedLM
from loopmdm.hf.trainer import WriteConfig

__all__ = ["LoopMDMForMaskedLM", "LoopMDMGenerationOutput", "LoopMDMPretrainedConfig", "WriteConfig"]

AutoConfig.register(LoopMDMPretrainedConfig.model_type, LoopMDMPretrainedConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForMaskedLM):
    auto.register(LoopMDMPretrainedConfig, LoopMDMForMaskedLM, exist_ok=True)
