"""The protocol of timing on a GPU, by a device that takes notes."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_times


@pytest.fixture
def device(monkeypatch):
    """Its clock goes on by what calls take; `said` has everything in order."""
    state = SimpleNamespace(now=0.0, said=[])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = state.now

        def synchronize(self):
            state.said.append("waited")

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    def flush():
        state.said.append("flushed")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: state.said.append("read") or 1980)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 431_600)
    monkeypatch.setattr(torch, "empty", lambda size, **_: SimpleNamespace(zero_=flush, size=size))
    properties = SimpleNamespace(L2_cache_size=50 << 20, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu_times.time, "perf_counter", lambda: state.now)
    monkeypatch.setattr(gpu_times.driver, "release_l2", lambda device: state.said.append("released"))
    monkeypatch.setattr(gpu_times.driver, "set_aside_l2", lambda device: state.said.append("set aside"))
    return state


def test_measured(device):
    def call(name, seconds):
        def run():
            device.said.append(name)
            device.now += seconds

        return run

    found = gpu_times.measured(
        {"cuda": call("cuda", 1e-3), "peer": call("peer", 24e-3), "slow": call("slow", 2)}
    )
    assert {name: record["calls"] for name, record in found.items()} == {"cuda": 50, "peer": 20, "slow": 1}
    for name, seconds in (("cuda", 1e-3), ("peer", 24e-3), ("slow", 2)):
        record = found[name]
        assert len(record["trials"]) == len(record["cold trials"]) == gpu_times.TRIALS
        for key in ("ms", "cold ms"):
            assert record[key] == pytest.approx(1000 * seconds)
        assert record["MHz"] == [1980.0] * 3 and record["W"] == [432] * 3
    said = device.said
    assert said[:3] == ["released", "set aside", "cuda"] and said[-1] == "released"
    # What is kept is given back between peers, and nothing is kept while L2 is to be cold.
    for number, word in enumerate(said):
        if word == "set aside":
            assert said[number - 1] == "released" and said[number + 1] == "cuda"
        if word == "flushed":
            assert said[number - 1] == "released" and said[number + 1] in found
    first_peer = said.index("peer")
    assert "released" in said[said.index("read") : first_peer] and said.count("set aside") == 3
    assert said.count("read") == 9, "beside each trial"
    assert said[said.index("read") + 1] == "waited", "while the GPU is at it"


def test_clocks_are_read_by_the_tool_where_there_is_no_package(device, monkeypatch):
    def absent():
        raise ModuleNotFoundError("pynvml")

    commands = []

    def tool(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1755, 402.31\n")

    monkeypatch.setattr(torch.cuda, "clock_rate", absent)
    monkeypatch.setattr(gpu_times.subprocess, "run", tool)
    assert gpu_times.clock_and_power() == {"MHz": 1755.0, "W": 402}
    assert commands[0][:4] == ["nvidia-smi", "-i", "GPU-1-2", "--query-gpu=clocks.sm,power.draw"]

    def no_tool(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(gpu_times.subprocess, "run", no_tool)
    assert gpu_times.clock_and_power() == {}


def test_without_the_bindings_nothing_is_kept(device, monkeypatch):
    def refuse(device):
        raise RuntimeError("cuda-bindings is not installed")

    monkeypatch.setattr(gpu_times.driver, "release_l2", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        gpu_times.driver, "why_unavailable", lambda capability: "cuda-bindings is not installed"
    )
    gpu_times.release_l2()
    monkeypatch.setattr(gpu_times.driver, "why_unavailable", lambda capability: None)
    with pytest.raises(RuntimeError):
        gpu_times.release_l2()
