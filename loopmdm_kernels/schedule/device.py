"""What is known of a GPU: measured where it was, else assumed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from loopmdm_kernels.schedule.measured import Table as Measured


class Device(NamedTuple):
    """What a GPU can do, per second and byte. Defaults: H200, as assumed in docs/kernels/looped_blocks.md."""

    sms: int = 132
    product_flops: float = 700e12
    attention_flops: float = 450e12
    l2_bytes: float = 5.5e12
    sm_bytes: float = 0.11e12  # one SM alone: 64 bytes a cycle
    wait_seconds: float = 1.5e-6  # from the last signal of a phase to the first data of the next
    ahead_share: float = 1.0  # of a wait, in which weights come that do not wait
    load_seconds: float = 0.675e-6  # a load of a block from L2 that its next ones wait for
    head_alone: float = 1.6  # what attention takes by one group of warps, in halves of two that take turns
    # What a byte for two blocks costs L2, in bytes: 1 if it is read once, 2 if they gain nothing.
    multicast_cost: float = 1.2
    shared_read_bytes: float = 0.2e12  # one SM's, by products of few columns; 128 a cycle at most
    meet_seconds: float = 0.12e-6  # a step of a narrow block's threads, up to where they meet
    shared_bytes: int = 232_448  # what a block may use
    has_wide_tiles: bool = (
        True  # its kernel has tiles up to 256 columns, and can normalise rows once for them
    )
    # Blocks that can reach each other's shared memory; 1: its kernels have no clusters, nor pairs.
    cluster: int = 16
    partitions: int = 8  # of the SMs, each an even number of them: a cluster is in one
    spare_stages: int = 0  # of the ring, which weights ahead of a wait leave empty
    # From what the blocks of a cluster store until all have the first of it: without polling, or its signals.
    cluster_wait_seconds: float = 1.1e-6
    node_seconds: float = 1.5e-6  # a small kernel or copy of a CUDA graph, with the way from the one before

    def clusters(self, blocks: int) -> int:
        """How many of so many blocks, 1, 2 or 4, there are at the same time."""
        if blocks <= 2:
            return max(1, self.sms // blocks)
        return max(1, self.partitions * (self.sms // self.partitions // blocks))

    def without_hopper(self) -> Device:
        """As the kernel for Ampere sees it. What its warps read of shared memory is not modelled."""
        return self._replace(has_wide_tiles=False, cluster=1, spare_stages=1, shared_read_bytes=math.inf)


# By compute capability: A100, RTX 3090, RTX 4090, H200. Peak rates times what their like reach elsewhere;
# nothing here is measured.
ASSUMED = {
    (8, 0): Device(108, 200e12, 150e12, 4.0e12, 0.09e12, shared_bytes=166_912).without_hopper(),
    (8, 6): Device(82, 50e12, 40e12, 2.0e12, 0.10e12, shared_bytes=101_376).without_hopper(),
    (8, 9): Device(128, 120e12, 90e12, 4.5e12, 0.15e12, shared_bytes=101_376).without_hopper(),
    (9, 0): Device(),
}


def nearest(capability: tuple[int, int]) -> Device:
    """Of the GPUs something is assumed of, the youngest that is not younger than this."""
    return ASSUMED[max(known for known in ASSUMED if known <= capability)]


def device_of(
    capability: tuple[int, int],
    sms: int,
    shared_bytes: int,
    *,
    name: str = "",
    measured: Measured | None = None,
) -> Device:
    """What is known of a GPU: what `measured` has under its name, and what is assumed for the rest.

    Assumed are the rates of the nearest GPU that is not younger, in proportion to the SMs.
    """
    assumed = nearest(capability)
    share = sms / assumed.sms
    known: dict[str, Any] = {
        "product_flops": assumed.product_flops * share,
        "attention_flops": assumed.attention_flops * share,
        "l2_bytes": assumed.l2_bytes * share,
        **(measured or {}).get(name, {}),
    }
    return assumed._replace(sms=sms, shared_bytes=shared_bytes, **known)
