"""Which errors of a run of several processes are told as those of a lost one."""

from __future__ import annotations

import errno

import pytest
import torch.distributed as dist

from loopmdm.cli.processes import _is_of_a_lost_process
from loopmdm.train import CheckpointError, NonFiniteError

PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] "
BUFFER = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{PAIR}Read error [127.0.0.1]:28568: Connection reset by peer"),
        RuntimeError(f"{PAIR}Connection closed by peer [127.0.0.1]:28568"),
        RuntimeError(f"{BUFFER}Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError("Broken pipe"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        dist.DistBackendError("any"),
        CheckpointError(f"cannot write a checkpoint in run, the previous ones are intact: {PAIR}any"),
    ],
    ids=str,
)
def test_of_a_lost_process(error: Exception) -> None:
    assert _is_of_a_lost_process(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/gloomy/NCCL.txt"),
        ValueError("/data/gloo/NCCL/run holds a run already"),
        NonFiniteError("step 3: loss nan; /data/gloo/training_state.safetensors is from before this step"),
        CheckpointError("cannot write a checkpoint in /data/gloo/NCCL: No space left on device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied in /srv/gloo/model.cc"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
    ids=str,
)
def test_of_another_kind(error: Exception) -> None:
    assert not _is_of_a_lost_process(error)
