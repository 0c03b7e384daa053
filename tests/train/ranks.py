"""Two processes of one run, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_ranks(*command: str | Path, **variables: str) -> list[str]:
    """What each of two ranks of `python command` prints; both must end well."""
    port = free_port()
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            **variables,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    printed = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            printed.append(output)
    finally:  # a rank that waits for one that failed would wait long
        for process in processes:
            if process.returncode is None:
                process.kill()
                process.communicate()
    return printed
