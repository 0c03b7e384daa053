"""Checkpoint files as the reference and its siblings write them, at small size."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.mdlm.reference_dit import Diffusion, randomise, reference_config

VOCAB = 13


class FakePackages:
    """Classes of libraries, installed here or not, as pickle finds them while a checkpoint is written."""

    def __init__(self) -> None:
        self.hidden: dict[str, types.ModuleType | None] = {}

    def make(self, module: str, name: str) -> Any:
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            if part not in self.hidden:
                self.hidden[part] = sys.modules.get(part)
                sys.modules[part] = types.ModuleType(part)
        if not hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, type(name, (), {"__module__": module}))
        return getattr(sys.modules[module], name)()

    def remove(self) -> None:
        for name, original in self.hidden.items():
            del sys.modules[name]
            if original is not None:
                sys.modules[name] = original


def _config_node(packages: FakePackages, value: Any) -> Any:
    """`value` in the form of a pickled OmegaConf tree."""
    metadata = packages.make("omegaconf.base", "ContainerMetadata")
    if isinstance(value, dict):
        node = packages.make("omegaconf.dictconfig", "DictConfig")
        content = {key: _config_node(packages, entry) for key, entry in value.items()}
        node.__dict__ = {"_metadata": metadata, "_parent": None, "_content": content}
    else:
        node = packages.make("omegaconf.nodes", "AnyNode")
        node.__dict__ = {"_metadata": metadata, "_parent": None, "_val": value}
    return node


def diffusion(seed: int = 0, **changes: Any) -> Diffusion:
    module = Diffusion(reference_config(**changes), VOCAB).eval()
    randomise(module, seed)
    return module


def averaged(module: Diffusion, seed: int = 9) -> list[Tensor]:
    """Averaged weights that differ from the raw ones everywhere, in the order of parameters()."""
    generator = torch.Generator().manual_seed(seed)
    return [
        p.detach() + 0.1 * torch.rand(p.shape, generator=generator) + 0.01
        for p in module.backbone.parameters()
    ]


def write_lightning(
    path: Path,
    module: Diffusion,
    shadow: list[Tensor] | None,
    stated: dict[str, Any] | None = None,
    **extra: Any,
) -> Path:
    """A file as Lightning's trainer writes it of the reference, pickled configuration and tokenizer in it."""
    packages = FakePackages()
    try:
        if stated is None:
            stated = {"model": {"length": 48, "n_heads": 2, "dropout": 0.25}, "time_conditioning": True}
        config = _config_node(packages, stated)
        tokenizer = packages.make("transformers.models.gpt2.tokenization_gpt2_fast", "GPT2TokenizerFast")
        tokenizer.__dict__ = {
            "_tokenizer": packages.make("tokenizers", "Tokenizer"),
            "model_max_length": 10**30,
        }
        optimizer = torch.optim.AdamW(module.parameters())
        checkpoint = {
            "epoch": 1,
            "global_step": 1000,
            "pytorch-lightning_version": "2.2.1",
            "state_dict": module.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val/nll'}": {"best_model_score": torch.tensor(3.0)}},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [{"base_lrs": [3e-4], "_step_count": 7}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"config": config, "tokenizer": tokenizer},
            "sampler": {"random_state": {"epoch": 0, "counter": 12}},
            **extra,
        }
        if shadow is not None:
            checkpoint["ema"] = {"decay": 0.9999, "num_updates": 1000, "shadow_params": shadow}
        torch.save(checkpoint, path)
    finally:
        packages.remove()
    return path
