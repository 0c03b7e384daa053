"""Seeds for independent streams of random numbers."""

from __future__ import annotations

import hashlib
import struct


def derive_seed(*words: int) -> int:
    """A 63-bit seed that depends on every one of `words`, each in 0..2^64 - 1."""
    digest = hashlib.blake2b(struct.pack(f"<{len(words)}Q", *words), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
