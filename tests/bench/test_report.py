"""The result file and the table of targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.targets import BF16_TARGETS, FP32_TARGETS, Target, targets_of

ROOT = Path(report.__file__).resolve().parents[1]


def figures(speedup=2.5, share=0.95, **more):
    return {
        "milliseconds": {"ours": 1.0, "eager fp32": 3.0, "compiled bf16": speedup},
        "best_peer": "compiled bf16",
        "speedup": speedup,
        "dtype": "bf16",
        "gflops": 1000 * share,
        "share_of_peak": share,
        **more,
    }


AS_AVX2 = {"LOOPMDM_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}


def raw(limiting=AS_AVX2, peak_bf16=1e12, **benchmarks):
    limits = {**dict.fromkeys(report.LIMIT_UNITS, 5e11), "peak_bf16": peak_bf16}
    isas = {"isa": "avx2", "processor_isa": "avx512_bf16", "limiting_variables": limiting}
    return {
        "machine_info": {
            "cpu": {"brand_raw": "A processor"},
            "limits": {**isas, "threads": 2, **limits},
            "cores": 2,
            "gpu": None,
            "backends": {"cpu": "avx2"},
            "versions": {"torch": "2.0"},
        },
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "abc"},
        "benchmarks": [{"name": name, "extra_info": info} for name, info in benchmarks.items()],
    }


@pytest.mark.parametrize(
    ("result", "target", "expected"),
    [
        (figures(), None, ""),
        (figures(), Target(2.0), "met"),
        (figures(2.0, 0.8), Target(2.0, 0.8, reach=2.3, reach_share=0.9), "met"),
        (figures(2.3, 0.9), Target(2.0, 0.8, reach=2.3, reach_share=0.9), "reached"),
        (figures(2.4, 0.85), Target(2.0, 0.8, reach=2.3, reach_share=0.9), "met"),
        (figures(1.5, 0.9), Target(2.0, 0.8), "missed: speed-up by 25 %"),
        (figures(1.5, 0.4), Target(2.0, 0.8), "missed: speed-up by 25 %, share by 50 %"),
        (figures(2.4, 0.7), Target(2.0, 0.6, reach=2.3), "reached"),
        (figures(memory=1.2), Target(2.0, memory=1.3), "met"),
        (figures(memory=1.56), Target(2.0, memory=1.3), "missed: memory by 20 %"),
        (figures(), Target(2.0, memory=1.3), "missed: memory not measured"),
        (figures(speedup_with_bf16_parameters=2.0), Target(2.0), "met"),
        (figures(speedup_with_bf16_parameters=1.5), Target(2.0), "missed: with bf16 parameters by 25 %"),
    ],
)
def test_verdict(result, target, expected):
    assert report.verdict(result, target) == expected


def test_table_has_the_cases_that_ran_with_and_without_a_target():
    result = report.reduce(raw(test_one=figures(1.5, 0.4), test_two=figures(memory=1.1)), "make bench")
    lines = report.table(result, {"test_one": Target(2.0, 0.8), "test_absent": Target(9.0)}).splitlines()
    assert lines[0] == (
        "A processor, 2 threads, avx2 on a processor with avx512_bf16 "
        "(LOOPMDM_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2); torch 2.0; 2026-01-02"
    )
    assert "bf16 1000, fp32 500" in lines[1]
    (one,) = [line for line in lines if line.startswith("one ")]
    assert one.endswith("1.50  2.0      400   40 % 80 %  missed: speed-up by 25 %, share by 50 %")
    (two,) = [line for line in lines if line.startswith("two ")]
    assert "met" not in two and two.endswith("(memory 1.10)")
    assert not any("absent" in line for line in lines)


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 0.45), ("fp32", 0.9)])
def test_the_share_is_of_the_peak_of_the_dtype(dtype, share):
    limits = {"peak_bf16": 1e12, "peak_fp32": 5e11}
    assert report.with_share({"dtype": dtype, "gflops": 450.0}, limits)["share_of_peak"] == share


def test_a_case_that_computes_nothing_has_no_share():
    idle = {"milliseconds": {"ours": 1.0, "other": 2.0}, "best_peer": "other", "speedup": 2.0}
    (line,) = report.table(report.reduce(raw(test_idle=idle), "make bench")).splitlines()[4:]
    assert line.split() == ["idle", "1.00", "other", "2.00", "2.00"]


def test_a_processor_as_it_is():
    assert report.table(report.reduce(raw(limiting={}), "")).startswith("A processor, 2 threads, avx2; torch")


def test_targets_are_those_of_the_instruction_set():
    case = "test_looped_blocks[D768-T1024-fp32]"
    result = report.reduce(raw(**{case: figures(1.4, 0.9)}), "")
    assert report.table(result).splitlines()[-1].endswith("1.40 1.35      900   90 % 85 %  met")
    result["machine"]["cpu_isa"] = "avx512_bf16"
    assert report.table(result).splitlines()[-1].endswith("missed: speed-up by 36 %")
    assert targets_of("amx_bf16") is BF16_TARGETS and targets_of("avx512") is FP32_TARGETS


def test_runs_of_one_machine_are_merged():
    runs = [raw(peak_bf16=1e12, test_one=figures()), raw(peak_bf16=2e12, test_two=figures())]
    for order in (runs, runs[::-1]):
        result = report.reduce(report.merged(order), "")
        assert result["machine"]["giga_per_second"]["peak_bf16"] == 2000
        assert [figures["share_of_peak"] for figures in result["figures"].values()] == [0.475, 0.475]
        assert set(result["figures"]) == {"test_one", "test_two"}


def test_main_writes_the_file_whole(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "raw.json", tmp_path / "result.json"
    source.write_text(json.dumps(raw(test_one=figures())))
    target.write_text("old")
    renamed = []
    replace = os.replace

    def spy(old, new):
        renamed.append((old, new))
        assert target.read_text() == "old"
        assert json.loads(Path(old).read_text())["figures"]
        return replace(old, new)

    monkeypatch.setattr(os, "replace", spy)
    report.main(str(source), str(target), "make bench ARGS='-k one'")
    assert [new for _, new in renamed] == [target] and renamed[0][0] != target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.json", "result.json"]
    result = json.loads(target.read_text())
    assert result["command"] == "make bench ARGS='-k one'"
    assert result["date"] == "2026-01-02"
    assert result["machine"]["giga_per_second"]["peak_bf16"] == 1000.0
    assert result["versions"] == {"torch": "2.0"}
    assert "one " in capsys.readouterr().out


def test_every_target_names_a_benchmark():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {*BF16_TARGETS, *FP32_TARGETS} <= {line.partition("::")[2] for line in listing.splitlines()}
