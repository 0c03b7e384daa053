"""The script that measures the Hopper kernels, as far as it goes without a GPU."""

import ctypes
from importlib.util import find_spec

import pytest

from bench import gpu_hopper

TIMES = {32: (4.0, 2.0), 128: (4.0, 2.1), 512: (4.0, 2.0), 1024: (4.0, 2.0)}  # torch.compile, cuda


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
def test_dry_run_prepares_every_measurement():
    result = gpu_hopper.measure(dry=True)
    assert set(result["figures"]) == set(gpu_hopper.MEASUREMENTS)
    for name, figures in result["figures"].items():
        assert figures, name
        assert all(value is None or key.endswith("limit") for key, value in figures.items())
    assert result["targets"] and set(result["targets"].values()) == {None}


def test_verdicts():
    times = {}
    for tokens, (peer, ours) in TIMES.items():
        times |= {f"T{tokens} torch.compile": peer, f"T{tokens} cuda": ours, f"T{tokens} triton": 2.05}
        times |= {f"T{tokens} limit": 1.3}
    found = gpu_hopper.verdicts({"looped_blocks": times, "dram_bytes": {"S1": 100.0, "S24": 109.0}})
    assert found["T32: 2.0 times torch.compile"] is True
    assert found["T128: 2.0 times torch.compile"] is False
    assert found["T128: no slower than Triton"] is False and found["T512: no slower than Triton"] is True
    assert found["T128: 0.6 of the limit"] is True and found["T1024: 0.7 of the limit"] is False
    assert found["DRAM bytes do not grow with S"] is True
    found = gpu_hopper.verdicts({"looped_blocks": times, "dram_bytes": {"S1": 100.0, "S24": 111.0}})
    assert found["DRAM bytes do not grow with S"] is False


def test_the_probes_read_their_arguments_where_they_are_written():
    offsets = [getattr(gpu_hopper.Arguments, name).offset for name, _ in gpu_hopper.Arguments._fields_]
    assert offsets == [0, 8, 16, 24, 32] and ctypes.sizeof(gpu_hopper.Arguments) == 40
