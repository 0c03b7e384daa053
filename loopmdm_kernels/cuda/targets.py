"""Which kernel a GPU runs, and what launching it takes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.schedule import Device

OLDEST = (8, 0)


class Target(NamedTuple):
    """A kernel and the architecture it is compiled for."""

    entry: str  # also the name of its source
    architecture: str
    threads: int
    head_dims: tuple[int, ...]

    @property
    def source(self) -> str:
        return f"looped_blocks/{self.entry}.cu"

    @property
    def parameters(self) -> type[ctypes.Structure]:
        return structure(self.source, "KernelParameters")

    def used_of(self, device: Device) -> Device:
        """What is known of a GPU, less what the kernel makes no use of."""
        return device if self.entry == SM90.entry else device.without_hopper()


SM90 = Target("looped_blocks_sm90", "sm_90a", 384, (16, 32, 64, 128))
SM80 = Target("looped_blocks_sm80", "sm_80", 256, (32, 64, 128))


def target_of(capability: tuple[int, int]) -> Target:
    """Hopper has a kernel of its own; all others from compute capability 8.0 on run the one for Ampere."""
    if capability == (9, 0):
        return SM90
    return SM80._replace(architecture=f"sm_{capability[0]}{capability[1]}")


def why_none(capability: tuple[int, int]) -> str | None:
    """Why no kernel runs on a GPU of this compute capability, or None."""
    if capability >= OLDEST:
        return None
    got = ".".join(map(str, capability))
    return f"the kernels need a GPU of compute capability 8.0 or later (A100, RTX 30, L4, H100), got {got}"
