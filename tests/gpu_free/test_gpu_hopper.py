"""The script that measures the Hopper kernels, as far as it goes without a GPU."""

import ctypes
import json
import subprocess
from importlib.util import find_spec

import pytest
import torch

from bench import gpu_hopper
from bench.probes import hopper_facts
from loopmdm_kernels.schedule import Device, choose, measured

needs_nvrtc = pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed")
TIMES = {32: (4.0, 2.0), 128: (4.0, 2.1), 512: (4.0, 2.0), 1024: (4.0, 2.0)}  # torch.compile, cuda


@needs_nvrtc
def test_dry_run_takes_every_path(tmp_path, capsys):
    target = tmp_path / "result.json"
    result = gpu_hopper.measure(hopper_facts.Run(dry=True), 5.0, target)
    assert list(result["figures"]) == list(gpu_hopper.PHASES) and not result["skipped"]
    for name, figures in result["figures"].items():
        assert figures and set(figures.values()) == {None}, (name, figures)
    assert result["targets"] and set(result["targets"].values()) == {None}
    assert result["ceilings"] == {}
    assert json.loads(target.read_text()) == json.loads(json.dumps(result))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{len(gpu_hopper.PHASES)} phases, estimated at")
    assert [line.split()[-1] for line in lines[1:]] == list(gpu_hopper.PHASES)


def test_what_there_is_no_time_for_is_skipped(tmp_path, monkeypatch, capsys):
    target = tmp_path / "result.json"
    written = []

    def slow(run):
        written.append(target.exists())
        clock[0] += 100
        return {"figure": 1.0}

    def broken(run):
        raise RuntimeError("CUDA error: no more\nand a long story")

    clock = [0.0]
    monkeypatch.setattr(gpu_hopper.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu_hopper, "PHASES", {"a": slow, "b": broken, "long": slow, "c": slow, "d": slow})
    monkeypatch.setattr(gpu_hopper, "EXPECTED", {"long": 90.0})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    result = gpu_hopper.measure(hopper_facts.Run(dry=False), 3.0, target)
    assert result["figures"] == {
        "a": {"figure": 1.0}, "b": {"failed": "CUDA error: no more"}, "c": {"figure": 1.0}
    }  # fmt: skip
    assert result["skipped"] == ["long", "d"]
    said = capsys.readouterr().err
    assert "100.0 s  long: skipped, 90 s would be too long" in said and "200.0 s  d: skipped" in said
    assert written == [False, True], "a result file is there after the first phase"
    assert gpu_hopper.measure(hopper_facts.Run(dry=False), 0.0, None)["targets"]


def test_a_call_that_fails_says_why():
    def broken():
        raise RuntimeError("no kernel image\nmore")

    figures = hopper_facts.Run(dry=False).seconds({"works": lambda: None, "broken": broken})
    assert figures["broken"] == "no kernel image" and isinstance(figures["works"], float)


def test_verdicts():
    figures = {}
    for tokens, (peer, ours) in TIMES.items():
        figures[f"T{tokens}"] = {"torch.compile": peer, "cuda": ours, "triton": 2.05}
    device = Device(product_flops=100e6, attention_flops=50e6, l2_bytes=1e6, sm_bytes=1e4, wait_seconds=1e-7)
    device = device._replace(cluster_wait_seconds=2e-8)
    for tokens, share in ((128, 0.61), (1024, 0.69)):
        limit = 12 * choose(gpu_hopper.SMALL._replace(length=tokens), device).limit_seconds
        figures[f"T{tokens}"] = {name: value * limit for name, value in figures[f"T{tokens}"].items()}
        figures[f"T{tokens}"]["cuda"] = limit / share
    figures |= {
        "products": {"qkv": 2 * 1024 * 768 * 2304 / 100e6, "mlp_in": "out of memory"},
        "attention_peers": {"flash": 4 * 8 * 12 * 1024 * 1024 * 64 / 50e6, "FA3": "not installed"},
        "l2_reads": {"plain": 0.5e6, "kept": 1e6, "one SM": 1e4},
        "barriers": {"row counters": 0.1, "cluster of 16": 0.02},
        "sudoku": {"cuda": 149e-6, "reference, eager": 5e-3},
        "dram_bytes": {"S1": 100.0, "S24": 109.0},
    }
    found = gpu_hopper.ceilings(figures)
    assert set(found) == set(measured.CEILINGS)
    assert Device()._replace(**found)._asdict() == pytest.approx(device._asdict())
    found = gpu_hopper.verdicts(figures)
    assert found["T32: 2.0 times torch.compile"] is True
    assert found["T512: no slower than Triton"] is True and found["T4096: no slower than Triton"] is None
    assert found["T128: 0.6 of the limit"] is True and found["T1024: 0.7 of the limit"] is False
    assert found["DRAM bytes do not grow with S"] is True
    assert found["sample_rows_R64: fastest"] is None
    figures["sample_rows_R64"] = {"cuda": 2.0, "triton": 2.1, "compiled": 3.0, "Liger": "not installed"}
    figures["masked_cross_entropy"] = {"cuda": 2.0, "triton": 1.9}
    found = gpu_hopper.verdicts(figures)
    assert found["sample_rows_R64: fastest"] is True and found["masked_cross_entropy: fastest"] is False
    assert found["Sudoku: 150 us"] is True
    figures["T32"]["cuda"], figures["sudoku"]["cuda"] = 2.1, 151e-6
    figures["dram_bytes"] = {"S1": 100.0, "S24": 111.0}
    found = gpu_hopper.verdicts(figures)
    assert found["T32: 2.0 times torch.compile"] is False and found["T32: no slower than Triton"] is False
    assert found["Sudoku: 150 us"] is False
    assert found["DRAM bytes do not grow with S"] is False
    figures["dram_bytes"] = {"S1": "no permission", "S24": "no permission"}
    assert gpu_hopper.verdicts(figures)["DRAM bytes do not grow with S"] is None


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


def test_tools_are_called_and_heard(monkeypatch, capsys):
    commands = []

    def done(command, **options):
        commands.append(command)
        if "synccheck" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        said = '"0","dram__bytes_read.sum","byte","1,024"\n' if "--csv" in command else "a race"
        return subprocess.CompletedProcess(command, int("racecheck" in command), said, "")

    run = hopper_facts.Run(dry=False)
    monkeypatch.setattr(gpu_hopper.subprocess, "run", done)
    monkeypatch.setattr(gpu_hopper.shutil, "which", lambda name, **_: f"/tools/{name}")
    assert gpu_hopper.dram_bytes(run) == {"S1": 1024.0, "S24": 1024.0}
    found = gpu_hopper.sanitizers(run)
    assert found == {"memcheck": 0.0, "racecheck": 1.0, "synccheck": "not done after 100 s"}
    assert capsys.readouterr().err == "a race\n"
    verdicts = gpu_hopper.verdicts({"sanitizers": found})
    assert [verdicts[f"{tool} is clean"] for tool in gpu_hopper.TOOLS] == [True, False, None]
    assert [command[-2:] for command in commands[:2]] == [["--once", "1"], ["--once", "24"]]
    assert all(command[-3:] == ["--once", "2", "--small"] for command in commands[2:])
    monkeypatch.setattr(gpu_hopper.shutil, "which", lambda *_, **__: None)
    assert "ncu is not installed" in gpu_hopper.dram_bytes(run)["S24"]
    assert "compute-sanitizer is not installed" in gpu_hopper.sanitizers(run)["memcheck"]
