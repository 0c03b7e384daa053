"""A process that runs cases of one fuzzer until its time is up, and tells of them in lines of JSON."""

from __future__ import annotations

import faulthandler
import importlib
import json
import mmap
import os
import resource
import struct
import sys
import time
from collections import Counter

# The seed at work, and when it began: by time.monotonic, and by the processor time of the process. Both are 0
# until the first case has ended, which loads what cases need.
STATUS = struct.Struct("<qdd")


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def limit_memory(more: int) -> None:
    """Beyond what is mapped now, so many bytes: a file that asks for more gets a MemoryError."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))


def main(name: str, first: int, end: float, status_file: str, memory: int) -> None:
    faulthandler.enable()
    module = importlib.import_module(f"tests.fuzz.{name}")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with open(status_file, "r+b") as file:
        status = mmap.mmap(file.fileno(), STATUS.size)
    seed, said = first, time.monotonic()
    counts: Counter[str] = Counter()
    status[:] = STATUS.pack(seed, 0.0, 0.0)
    module.case(seed)
    if memory:
        limit_memory(memory)
    while time.time() < end:
        seed += 1
        status[:] = STATUS.pack(seed, time.monotonic(), time.process_time())
        try:
            counts += module.case(seed)
        except Exception as error:
            say(seed=seed, failed=f"{type(error).__name__}: {error}")
        if time.monotonic() - said > 1:
            say(seed=seed, counts=counts)
            counts, said = Counter(), time.monotonic()
    say(seed=seed, counts=counts)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
