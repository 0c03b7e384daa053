"""What follows from the figures of the Hopper kernels, and how tools are called."""

import ctypes
import subprocess

import pytest
import torch

from bench import gpu_hopper, gpu_small, gpu_times
from bench.phases import LeftOut
from bench.probes import hopper_facts
from loopmdm_kernels.cuda import looped_rows
from loopmdm_kernels.schedule import Device, choose, measured
from loopmdm_kernels.schedule.forward import Forward

TIMES = {32: (4.0, 2.0), 128: (4.0, 2.1), 512: (4.0, 2.0), 1024: (4.0, 2.0)}  # torch.compile, cuda


def test_a_call_that_fails_says_why(monkeypatch):
    def broken():
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(gpu_times, "measured", lambda calls: {name: {"ms": 2.0} for name in calls})
    run = hopper_facts.Run(dry=False)
    assert run.seconds({"works": lambda: None, "broken": broken}) == {
        "broken": "no kernel image",
        "works": 0.002,
    }


def times(**milliseconds):
    return {name: {"ms": value} for name, value in milliseconds.items()}


def test_verdicts():
    figures = {}
    for tokens, (peer, ours) in TIMES.items():
        figures[f"T{tokens}"] = {"torch.compile": {"ms": peer}, **times(cuda=ours, triton=2.05)}
    device = Device(
        product_flops=100e6, attention_flops=50e6, l2_bytes=1e6, sm_bytes=1e4, multicast_cost=1.25,
        wait_seconds=0.9e-6, load_seconds=0.6e-6, head_alone=1.5, cluster_wait_seconds=0.7e-6,
        shared_read_bytes=3e4, meet_seconds=0.1e-6,
        node_seconds=1.2e-6,
    )  # fmt: skip
    keys = 2 * 88 * 128  # bytes that a block gets, beside what it waits for
    for tokens, share in ((128, 0.61), (1024, 0.69)):
        limit = 12e3 * choose(gpu_hopper.SMALL._replace(length=tokens), device).limit_seconds
        figures[f"T{tokens}"] = {
            **{name: {"ms": value["ms"] * limit} for name, value in figures[f"T{tokens}"].items()},
            "cuda": {"ms": limit / share},
        }
    figures |= {
        "products": {
            "qkv": 2 * 1024 * 768 * 2304 / 100e6, "mlp_in": "out of memory", "now": {"MHz": 1980.0}
        },
        "attention_peers": {"flash": 4 * 8 * 12 * 1024 * 1024 * 64 / 50e6, "FA3": "not installed"},
        "l2_reads": {"plain": 0.5e6, "kept": 1e6, "one SM": 1e4},
        "barriers": {"row counters": 0.1, "cluster of 16": "no room"},
        "loads": {"load": 0.6},
        "heads": {"one head": 0.9, "two heads": 1.2},
        "gaps": {"in order": 1.2, "launched early": 0.9},
        "narrow_blocks": {
            "bytes of products": 3e4, "step": 0.1, "hand-over": 0.8 + 1e6 * keys / 1e4, "box": 0.8
        },
        "multicast": {"alone": 1e6, "pairs": 1.6e6, "fours": "no room"},
        "sudoku": times(cuda=0.149, **{"reference, eager": 5.0}),
        "dram_bytes": {"S1": 100.0, "S24": 109.0},
    }  # fmt: skip
    found = gpu_hopper.ceilings(figures)
    assert set(found) == set(measured.CEILINGS)
    assert Device()._replace(**found)._asdict() == pytest.approx(device._asdict())
    del figures["narrow_blocks"]["step"]  # of which another ceiling is a part
    assert set(measured.CEILINGS) - set(gpu_hopper.ceilings(figures)) == {
        "cluster_wait_seconds",
        "meet_seconds",
    }
    found = gpu_hopper.verdicts(figures)
    assert found["T32: 2.0 times torch.compile"] is True
    assert found["T512: no slower than Triton"] is True and found["T4096: no slower than Triton"] is None
    assert found["T128: 0.6 of the limit"] is True and found["T1024: 0.7 of the limit"] is False
    assert found["T1024, Triton: 1.2 times the best peer"] is True
    assert found["T16384, Triton: 1.05 times the best peer"] is None
    assert found["DRAM bytes do not grow with S"] is True
    assert found["sample_rows_R64: fastest"] is None
    figures["sample_rows_R64"] = {**times(cuda=2.0, triton=2.1, compiled=3.0), "FlashInfer": "no kernel"}
    figures["masked_cross_entropy"] = times(cuda=2.0, triton=1.9)
    found = gpu_hopper.verdicts(figures)
    assert found["sample_rows_R64: fastest"] is True and found["masked_cross_entropy: fastest"] is False
    assert found["sample_rows_R64, Triton: 5.0 times the best peer"] is False
    assert found["masked_cross_entropy, Triton: 2.5 times the best peer"] is None
    assert found["Sudoku: 150 us"] is True
    figures["T32"]["cuda"], figures["sudoku"] = {"ms": 2.1}, times(cuda=0.151)
    figures["dram_bytes"] = {"S1": 100.0, "S24": 111.0}
    found = gpu_hopper.verdicts(figures)
    assert found["T32: 2.0 times torch.compile"] is False and found["T32: no slower than Triton"] is False
    assert found["Sudoku: 150 us"] is False
    assert found["DRAM bytes do not grow with S"] is False
    figures["dram_bytes"] = {"S1": "no permission", "S24": "no permission"}
    assert gpu_hopper.verdicts(figures)["DRAM bytes do not grow with S"] is None


def test_phases_stand_beside_what_the_model_says_of_them():
    """By what was measured of the GPU, and where a figure is missing not at all."""
    figures = {
        "phases_128": {"QKV": 3.5, "QKV, not waiting": 1.4, "ATTENTION": "no room", "now": {"MHz": 1.0}}
    }
    (found,) = gpu_hopper.conclude({**figures, "loads": {"load": 0.5}})["beside the model"].values()
    plan = choose(gpu_hopper.SMALL._replace(length=128), Device(load_seconds=0.5e-6))
    (qkv,) = found.values()
    assert list(found) == ["QKV"] and qkv["us"] == 3.5
    seconds = plan.phases[Forward.QKV].seconds + Device().wait_seconds
    assert qkv["model us"] == pytest.approx(1e6 * seconds, abs=0.01)


def test_ceilings_are_kept_for_the_cost_model(monkeypatch):
    kept = []
    monkeypatch.setattr(gpu_hopper.measured, "record", lambda *entry: kept.append(entry))
    phases = {"environment": {"figures": {"GPU": "a GPU"}}}
    result = {"phases": phases, "file": "/out/day-gpu.json", "ceilings": {"l2_bytes": 1.0}}
    gpu_hopper.keep(result)
    gpu_hopper.keep({**result, "ceilings": {}})
    assert kept == [("a GPU", {"l2_bytes": 1.0}, "day-gpu.json")]


def test_what_the_profiler_says():
    def done(stdout, stderr="", code=0):
        return subprocess.CompletedProcess([], code, stdout, stderr)

    csv = '"ID","Metric Name","Metric Unit","Metric Value"\n"0","dram__bytes_read.sum","byte","29,360,128"\n'
    assert gpu_hopper.counted(done("==PROF== Connected\n" + csv)) == 29_360_128
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    assert gpu_hopper.counted(done(refused + "\n", code=1)) == refused
    assert gpu_hopper.counted(done("", code=9)) == "ncu ended with 9 and no figure"


def test_the_probes_read_their_arguments_where_they_are_written():
    offsets = [getattr(hopper_facts.Arguments, name).offset for name, _ in hopper_facts.Arguments._fields_]
    assert offsets == [0, 8, 16, 24, 32] and ctypes.sizeof(hopper_facts.Arguments) == 40
    fields = hopper_facts.SharedReads
    assert [fields.stages.offset, fields.rounds.offset, ctypes.sizeof(fields)] == [128, 132, 192]
    kernel = ctypes.sizeof(looped_rows.Parameters)
    assert kernel % 64 == 0 and hopper_facts.Pieces.rounds.offset == kernel
    assert ctypes.sizeof(hopper_facts.Pieces) == kernel + 64


def test_tools_are_called_and_heard(monkeypatch):
    commands, status = [], [0]

    def done(command, **options):
        commands.append(command)
        said = '"0","dram__bytes_read.sum","byte","1,024"\n' if "--csv" in command else "a race"
        return subprocess.CompletedProcess(command, status[0], said, "")

    run = hopper_facts.Run(dry=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_hopper.subprocess, "run", done)
    monkeypatch.setattr(gpu_hopper.shutil, "which", lambda name, **_: f"/tools/{name}")
    assert gpu_hopper.dram_bytes(run) == {"S1": 1024.0, "S24": 1024.0}
    assert [command[-3:] for command in commands] == [["bench.gpu_small", "once", n] for n in ("1", "24")]
    for command in commands:
        assert command[1:3] == ["--clock-control", "none"], "the clocks are not ours"
    assert gpu_small.memcheck("cuda", run) == {"memcheck": "right"}
    status[0] = 1
    assert gpu_small.memcheck("triton", run)["memcheck"].startswith("wrong: status 1")
    assert [command[-1] for command in commands[2:]] == ["cuda", "triton"]
    assert commands[2][:3] == ["/tools/compute-sanitizer", "--tool", "memcheck"]
    monkeypatch.setattr(gpu_hopper.shutil, "which", lambda *_, **__: None)
    assert "ncu is not installed" in gpu_hopper.dram_bytes(run)["S24"]
    monkeypatch.setitem(gpu_small.CALLS, "cuda", lambda run: None)
    assert "not installed" in gpu_small.memcheck("cuda", run)["memcheck"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(LeftOut, match="needs an H100"):
        gpu_hopper.dram_bytes(run)
