"""Where figures come from: command, versions, machine, date, models."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from loopmdm.model import LoopMDM
from loopmdm_kernels.version import __version__


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Facts about this process; `command` is its command line where it is not that of `sys.argv`."""
    words = sys.argv[1:] if command is None else command
    return {
        "command": shlex.join(["loopmdm", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {
            "loopmdm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "backends": lk.available_backends(),
        },
    }


def describe_model(source: str, model: LoopMDM) -> dict[str, Any]:
    """A model by its path, its shape and a fingerprint of its weights."""
    config = model.config
    return {
        "path": source,
        "weights": weights_fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_layers,
        "looped_layers": [config.loop_start, config.loop_end],
        "max_loops": config.max_loops,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "precision": str(model.compute_dtype).removeprefix("torch."),
    }


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Changes whenever a weight does, and does not depend on where the model lies."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
