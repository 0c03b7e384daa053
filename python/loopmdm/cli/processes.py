"""The processes of a run that `torchrun` started: joined, and ended together, with one error."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from loopmdm import terminal
from loopmdm.cli.heartbeat import Heartbeat
from loopmdm.cli.parser import FAILED
from loopmdm.printable import printable_lines
from loopmdm.train.state import CheckpointError

TIMEOUT_MINUTES = 5.0  # that a process waits for another one in a step
_PREPARED = "loopmdm/prepared-{}"
_preparations = itertools.count()  # each has a key of its own
# In the errors of the backends when a process at the other end is gone; gloo names a line of its source.
_GONE = re.compile(
    r"\[\S*\bgloo/\S+\.(cc|h):\d+\] |NCCL (error in|communicator was aborted)"
    r"|Connection (closed|reset) by peer|Broken pipe"
)
_SILENT = re.compile(r"[Tt]imed ?out|[Tt]imeout")
# What gloo says around an error: the line of its source, advice.
_NOISE = re.compile(r"^\[\S*\] |\. This is typically .*")


class LostProcessError(RuntimeError):
    """Another process of the run has ended in the middle of it, or does not answer."""


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, torch.device]]:
    """Joins the processes `torchrun` started; yields the rank and the device of this one.

    Of errors inside the first one is raised; processes that fail after it, as a rule because of it, end
    without a word. Inside, a process that is gone ends all others, whatever they do (`Heartbeat`).

    Raises:
        LostProcessError: another process was killed, say.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # gloo too: checkpoints are agreed on and gathered by it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    heartbeat = Heartbeat(_end)
    try:
        with heartbeat:
            yield dist.get_rank(), device
    except Exception as error:
        end_unhurried()
        if not heartbeat.is_first_failure():
            raise SystemExit(FAILED) from error
        if _is_of_a_lost_process(error):
            what = _NOISE.sub("", str(error).strip().splitlines()[0])
            raise _lost("does not answer" if _SILENT.search(what) else "has ended", what) from error
        raise
    dist.destroy_process_group()


def end_unhurried() -> None:
    """From an error on until it is said: torchrun ends the others when one is lost, and has to wait."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _lost(became: str, what: str) -> LostProcessError:
    return LostProcessError(
        f"another process of this run {became} (rank {dist.get_rank()} sees: {what}); checkpoints are intact,"
        " and --resume continues from the last one"
    )


def _end(missing: str | None) -> NoReturn:
    """End this process from another thread than the one that waits for what will not come."""
    if missing is not None:
        terminal.say(f"loopmdm train: error: {printable_lines(str(_lost('does not answer', missing)))}")
    os._exit(FAILED)


def wait_for_rank_zero(rank: int) -> None:
    """Until rank 0 comes here too, which may have hours of work of its own before."""
    if not dist.is_initialized():
        return
    store, key = dist.distributed_c10d._get_default_store(), _PREPARED.format(next(_preparations))
    if rank == 0:
        store.set(key, "yes")
    else:
        store.wait([key], timedelta(days=7))


def _is_of_a_lost_process(error: Exception) -> bool:
    if not isinstance(error, (RuntimeError, CheckpointError)):
        return False
    return isinstance(error, dist.DistError) or _GONE.search(str(error)) is not None
