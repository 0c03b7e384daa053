"""Philox4x32-10 of csrc/common, against published answers and the reference."""

import pytest
import torch

from loopmdm_kernels import _C
from loopmdm_kernels.philox import philox4x32

# Known answers of philox4x32-10 published with Random123: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert _C.philox(key[0] | key[1] << 32, *counter) == expected


def test_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (200, 4), generator=generator)
    for seed in (0, 1, 0x0123456789ABCDEF):
        expected = torch.stack(philox4x32(seed, *counters.unbind(1)), dim=1).tolist()
        assert [list(_C.philox(seed, *counter)) for counter in counters.tolist()] == expected
