"""LoopMDM in Hugging Face's Trainer."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loopmdm.model import checkpoint


class WriteConfig(TrainerCallback):
    """Writes config.json into each checkpoint of a Trainer, which keeps the weights of a model only.

    `LoopMDM.from_pretrained` then reads a checkpoint folder. After `trainer.save_model(path)`, which asks no
    callback, use `model.save_pretrained(path)`.
    """

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.is_world_process_zero:
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            checkpoint.write_config(given["model"], folder)
