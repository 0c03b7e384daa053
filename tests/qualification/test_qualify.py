"""`qualify` with the reference and the CPU kernels in the place of kernels for GPUs: what it finds, and how
it lives through crashes, hangs, and others who are at it."""

import contextlib
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import qualification, verdicts
from loopmdm_kernels.cpu import attention, sample_rows
from loopmdm_kernels.graphs import captured_by
from loopmdm_kernels.locks import Lock
from loopmdm_kernels.qualification import processes, races
from loopmdm_kernels.qualification.checks import SAME_CALLS, check
from loopmdm_kernels.testing import RecordedGraphs
from tests.qualification import planted

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL = {"ops": ["attention"], "dtypes": ["float32"], "compiled": False, "time_limit": 3600}
QUESTIONS = {("attention", direction, "float32") for direction in ("forward", "gradients")}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LOOPMDM_QUALIFY", raising=False)
    monkeypatch.delenv("LOOPMDM_BACKEND", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "python"), str(ROOT)]))
    monkeypatch.setattr(processes, "STARTING_SECONDS", 3600)
    verdicts.forget()
    yield tmp_path / "cache"
    verdicts.forget()


@pytest.fixture
def plant(monkeypatch):
    def planted(faults):
        monkeypatch.setenv("PLANTED", json.dumps(faults))
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-m", "tests.qualification.planted"))

    return planted


def by_question(verdict):
    return {tuple(e[name] for name in ("op", "direction", "dtype", "backend")): e for e in verdict["entries"]}


def test_what_is_found_is_kept_and_used(folder, monkeypatch):
    said = []
    verdict = lk.qualify("cpu", backends=["reference", "cpu"], on_progress=said.append, **SMALL)
    assert Path(verdict["path"]).parent == folder
    assert [path.name for path in folder.iterdir()] == [Path(verdict["path"]).name]  # no lock is left
    assert json.loads(Path(verdict["path"]).read_text()) == {k: v for k, v in verdict.items() if k != "path"}
    found = by_question(verdict)
    assert set(found) == {(*question, name) for question in QUESTIONS for name in ("reference", "cpu")}
    for entry in found.values():
        assert entry["right"] is True and entry["why"] is None and entry["speedup"] > 0
        assert {"50 times the same bits", "a fresh thread", "masked keys"} <= set(entry["checked"])
        assert all(times.keys() == {"ours", "eager"} for times in entry["seconds"].values())
        assert len(entry["seconds"]) == 2
    assert "cpu: attention, gradients, float32: right?" in said
    assert "reference, cpu: attention, forward, float32: how fast?" in said
    standing = verdicts.standing(CPU)
    assert standing.orders is not None and set(standing.orders) == QUESTIONS
    for question, names in standing.orders.items():
        assert names == (("cpu",) if found[(*question, "cpu")]["speedup"] > 1 else ())
    said.clear()
    again = lk.qualify("cpu", backends=["cpu"], anew=False, on_progress=said.append, **SMALL)
    assert again == verdict and said == []
    # Of others; these stay.
    other = found["attention", "forward", "float32", "cpu"] | {"op": "head_logits"}
    monkeypatch.setattr(qualification, "_entries", lambda *_: [other])
    more = lk.qualify("cpu", backends=["cpu"], anew=False, **{**SMALL, "ops": ["head_logits"]})
    assert more["entries"] == [*verdict["entries"], other]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("wrong", "37 tokens, angles: out: error "),
        ("unwritten", "NaN at other places than in the oracle"),
        ("once", "37 tokens, angles: the same call again: out has other bits"),
        ("in threads", "37 tokens, angles: a fresh thread: out has other bits"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "gradients"])
def test_what_is_wrong_is_found(monkeypatch, direction, fault, why):
    monkeypatch.setattr(attention, "run", planted.planted(attention.run, fault))
    finding = check("cpu", "attention", direction, torch.float32, CPU)
    assert finding["right"] is False and why in finding["why"]


@pytest.mark.parametrize("op", ["attention", "looped_blocks", "sample_rows"])
def test_a_captured_call_is_replayed(op):
    recorded = RecordedGraphs()
    with captured_by(recorded):
        finding = check("cpu", op, "forward", torch.float32, CPU)
    assert finding["right"] is True and "a CUDA graph" in finding["checked"], finding["why"]
    assert recorded.captures == 1 and recorded.replays == 3


def test_a_replay_with_other_bits_is_found(monkeypatch):
    monkeypatch.setattr(attention, "run", planted.planted(attention.run, "late", SAME_CALLS + 2))
    with captured_by(RecordedGraphs()):
        finding = check("cpu", "attention", "forward", torch.float32, CPU)
    assert finding["why"] == "37 tokens, angles: a replayed CUDA graph: out has other bits"


def test_wrong_gradients_are_found(monkeypatch):
    """Values are right: only the other direction is not to be used."""

    def doubled(call):
        out = run(call)
        if out.requires_grad:
            out.register_hook(lambda grad: 1.01 * grad)
        return out

    run = attention.run
    monkeypatch.setattr(attention, "run", doubled)
    findings = [check("cpu", "attention", way, torch.float32, CPU) for way in ("forward", "gradients")]
    assert [finding["right"] for finding in findings] == [True, False]
    assert "37 tokens, angles: q: error" in findings[1]["why"]


@pytest.mark.parametrize("op", ["head_logits", "masked_cross_entropy", "sample_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_what_is_right_is_right(name, op, dtype):
    for direction in ("forward", "gradients"):
        if (op, direction) != ("sample_rows", "gradients"):
            finding = check(name, op, direction, dtype, CPU)
            assert finding["right"] is True and finding["refused"] == [], finding["why"]


def test_a_failure_ends_only_itself(plant, monkeypatch, tmp_path):
    """A crash, an error that may leave the device unusable, a hang, a crash at the sizes that are timed."""
    faults = {
        ("forward", "float32"): ("crash", "ended by SIGSEGV"),
        ("gradients", "float32"): (
            "error",
            "RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        ("forward", "bfloat16"): ("hang", "did not end within 3600 s"),
        ("gradients", "bfloat16"): (
            "crash if large",
            "at the sizes that are timed: ended by SIGSEGV: a library says something",
        ),
    }
    plant([(" ".join(question), fault) for question, (fault, _) in faults.items()])
    mark = tmp_path / "hangs"
    monkeypatch.setenv("PLANTED_MARK", str(mark))

    class Impatient(queue.SimpleQueue):
        """Its time is up as soon as the call hangs, and not before."""

        def get(self, timeout):
            while not mark.exists():
                with contextlib.suppress(queue.Empty):
                    return super().get(timeout=0.05)
            mark.unlink()
            raise queue.Empty

    hours = itertools.count()
    monkeypatch.setattr(processes, "_clock", lambda pid: 3600.0 * next(hours))
    monkeypatch.setattr(processes.queue, "SimpleQueue", Impatient)
    dtypes = ["float32", "bfloat16"]
    verdict = lk.qualify("cpu", backends=["reference", "cpu"], **{**SMALL, "dtypes": dtypes})
    found = by_question(verdict)
    for question, (_, why) in faults.items():
        entry, other = (found[("attention", *question, name)] for name in ("cpu", "reference"))
        assert entry["right"] is False and entry["speedup"] is None
        assert entry["why"].startswith(why)
        assert other["right"] is True and other["speedup"] > 0 and other["why"] is None
        assert verdicts.standing(CPU).orders[("attention", *question)] == ()


@pytest.mark.parametrize("direction", ["forward", "gradients"])
def test_what_is_wrong_at_large_sizes_alone_is_found(monkeypatch, direction):
    given = "attention", direction, torch.float32, CPU
    assert races.race(["cpu"], *given)["wrong"] == {}
    monkeypatch.setattr(attention, "run", planted.planted(attention.run, "wrong if large"))
    assert check("cpu", *given)["right"] is True
    assert races.race(["cpu"], *given)["wrong"]["cpu"].startswith("B4 L128 D256: out: error")


def test_the_clock_stands_still_while_others_compute():
    before, clock, after = time.monotonic(), processes._clock(os.getpid()), time.monotonic()
    waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    assert clock <= after and (waited == 0 or clock < after)
    nobody = 2**30
    assert before <= processes._clock(nobody)


def test_another_token_is_wrong(monkeypatch):
    def drawn(call):
        out = run(call)
        return out._replace(token=(out.token + 1) % call.vocab_size)

    run = sample_rows.run
    monkeypatch.setattr(sample_rows, "run", drawn)
    finding = check("cpu", "sample_rows", "forward", torch.float32, CPU)
    assert finding["right"] is False and "33 of 33 rows have another token" in finding["why"]


def test_a_backend_that_does_not_do_something():
    finding = check("cpu", "attention", "forward", torch.float16, CPU)
    assert finding["right"] is None and finding["why"] == "q must be float32 or bfloat16, got torch.float16"


def test_a_process_that_does_not_start(monkeypatch, folder):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", "raise SystemExit('no such thing')"))
    with pytest.raises(RuntimeError, match="does not start: ended with status 1: no such thing"):
        lk.qualify("cpu", backends=["cpu"], **SMALL)
    assert list(folder.iterdir()) == []


SCRIPT = """
import json, sys
import loopmdm_kernels as lk
if __name__ == "__main__":
    print("begins", flush=True)
    said = []
    options = {"ops": ["sample_rows"], "dtypes": ["float32"], "compiled": False, "time_limit": 3600}
    verdict = lk.qualify("cpu", backends=["cpu"], on_progress=said.append, **options)
    print(json.dumps([len(said), verdict["date"], [entry["right"] for entry in verdict["entries"]]]))
"""


def test_two_at_once_do_the_work_once():
    environment = {key: value for key, value in os.environ.items() if key != "LOOPMDM_QUALIFY"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate()[0].splitlines()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [answer[2] for answer in answers] == [[True], [True]]
    worked = sorted(answer[0] for answer in answers)
    # The second says that it waits, and takes the verdict of the first; unless it begins when that has ended.
    assert worked in ([1, 2], [2, 2])
    if worked == [1, 2]:
        assert answers[0][1] == answers[1][1]


def test_a_killed_one_takes_its_child_along(plant, tmp_path):
    plant([("forward float32", "hang")])
    script = (
        SCRIPT.replace("sample_rows", "attention")
        .replace(
            "import json, sys",
            "import json, sys\nfrom loopmdm_kernels.qualification import processes\n"
            "processes.COMMAND = (sys.executable, '-m', 'tests.qualification.planted')",
        )
        .replace("on_progress=said.append", "on_progress=lambda line: print(line, flush=True)")
    )
    environment = {key: value for key, value in os.environ.items() if key != "LOOPMDM_QUALIFY"}
    mark = {"QUALIFY_TEST": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment | mark
    )
    assert process.stdout.readline() == "begins\n"
    assert "right?" in process.stdout.readline()
    assert len(marked(tmp_path)) == 2
    process.kill()
    process.communicate()
    while marked(tmp_path):  # ends by itself, or the test hangs
        time.sleep(0.05)
    # The lock that was left is no obstacle.
    lock = verdicts.path_of(CPU).with_suffix(".lock")
    assert lock.exists()
    Lock(lock, "the verdict").release()


def marked(path):
    """Processes with this path in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"QUALIFY_TEST={path}\0".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="device: got 'tpu', expected cpu or cuda"):
        lk.qualify("tpu")
    with pytest.raises(ValueError, match="device: got 'meta', expected cpu or cuda"):
        lk.qualify("meta")
    with pytest.raises(ValueError, match=r"ops: got 'atention', expected some of .*did you mean 'attention'"):
        lk.qualify("cpu", ops=["atention"])
    with pytest.raises(ValueError, match="dtypes: got 'float64'"):
        lk.qualify("cpu", dtypes=["float64"])
    with pytest.raises(ValueError, match="backends: got 'gpu'"):
        lk.qualify("cpu", backends=["gpu"])
    for limit in (0, -1, math.nan, math.inf, 1e300, "5", None, True):
        with pytest.raises(
            ValueError, match=r"time_limit: got .*, expected a number of seconds, more than 0"
        ):
            lk.qualify("cpu", time_limit=limit)
    for option in ("ops", "dtypes", "backends"):
        for none in ([], "attention"):
            with pytest.raises(ValueError, match=f"{option}: got .*, expected a list of some of "):
                lk.qualify("cpu", **{option: none})
    with pytest.raises(ValueError, match=r"dtypes: got torch.float32, expected some of"):
        lk.qualify("cpu", dtypes=[torch.float32])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used here: "):
        lk.qualify("cpu", backends=["triton"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds no GPU here"):
            lk.qualify("cuda")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        lk.qualify("cpu", backends=["cpu"])
    monkeypatch.delenv("LOOPMDM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="there is no home folder: set LOOPMDM_CACHE_DIR to a folder"):
        lk.qualify("cpu", backends=["cpu"])
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path))
    verdicts.path_of(CPU).mkdir()
    with pytest.raises(OSError, match="it is a folder, expected a file to write"):
        lk.qualify("cpu", backends=["cpu"])
