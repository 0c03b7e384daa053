"""The same work for an hour: the memory of the process stays, and so does every bit of the results."""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch

from loopmdm import LoopMDM
from tests.fuzz import threads
from tests.fuzz.worker import say

MOST_SLOPE = 1.0  # MiB a minute
_WARM_UP = 2  # minutes


def resident() -> float:
    """MiB of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def round_of_work(folder: Path) -> str:
    """One of everything: ops, losses with gradients, samples, a checkpoint written and read; its digest."""
    digest = hashlib.blake2b(digest_size=16)
    for seed in range(4):
        for work in threads.works(seed):
            for name, value in sorted(work().items()):
                digest.update(
                    name.encode() + value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                )
    model = threads.model()
    model.save_pretrained(folder)
    for value in LoopMDM.from_pretrained(folder).state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def slope(minutes: list[float], sizes: list[float]) -> float:
    """Least squares, MiB a minute."""
    middle, mean = sum(minutes) / len(minutes), sum(sizes) / len(sizes)
    spread = sum((m - middle) ** 2 for m in minutes)
    return (
        sum((m - middle) * (s - mean) for m, s in zip(minutes, sizes, strict=True)) / spread
        if spread
        else 0.0
    )


def main(minutes: float) -> None:
    torch.set_num_threads(1)
    start, rounds, at, sizes = time.monotonic(), 0, [], []
    with tempfile.TemporaryDirectory(prefix="fuzz-soak-") as folder:
        first = round_of_work(Path(folder))
        while (passed := (time.monotonic() - start) / 60) < minutes:
            got = round_of_work(Path(folder))
            rounds += 1
            if got != first:
                say(failed=f"minute {passed:.1f}: results are {got}, at first they were {first}")
                return
            if len(at) < int(passed * 4):  # four times a minute
                gc.collect()
                at.append(passed)
                sizes.append(resident())
                say(counts={"soak rounds": rounds}, note=f"soak: {sizes[-1]:.0f} MiB")
                rounds = 0
    say(counts={"soak rounds": rounds})
    kept = [(m, s) for m, s in zip(at, sizes, strict=True) if m >= min(_WARM_UP, minutes / 4)]
    if len(kept) < 2:
        say(summary="soak: too short to tell a slope")
        return
    found = slope([m for m, _ in kept], [s for _, s in kept])
    text = (
        f"soak: {kept[0][1]:.1f} MiB at minute {kept[0][0]:.0f}, {kept[-1][1]:.1f} at {kept[-1][0]:.0f},"
        f" slope {found:+.3f} MiB a minute; the last results equal the first (digest {first})"
    )
    say(summary=text, **({"failed": text} if found >= MOST_SLOPE and minutes > 5 else {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    main(parser.parse_args().minutes)
