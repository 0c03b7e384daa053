"""`loopmdm watch`: what a run leaves while it goes on, on a terminal and as a page."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loopmdm.cli import main
from loopmdm.runs.watching import WatchedRun
from loopmdm.train import read_metrics
from loopmdm.train.loggers import texts
from loopmdm.train.metrics import Follower
from loopmdm_kernels.locks import LOCK_FILE

from .conftest import Call


@pytest.fixture
def run(text_run: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(text_run, tmp_path / "run"))


def test_a_log_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Follower(path)
    assert not log.read() and log.records == []
    with path.open("ab", buffering=0) as file:
        file.write(b'{"step": 1}\n{"step"')
        assert log.read() and log.records == [{"step": 1}]
        assert not log.read()
        file.write(b": 2}\n\0\0\xff\n[1]\n{}\n" + json.dumps({"step": 3}).encode() + b"\n{")
        assert log.read() and [record["step"] for record in log.records] == [1, 2, 3]
        assert log.damaged == 3
    path.write_text('{"step": 7}\n{"step": 8}\n' + " " * 200 + "\n")  # longer, and the same file
    assert log.read() and [record["step"] for record in log.records] == [7, 8] and log.damaged == 1
    new = tmp_path / "new"  # as a resumed run writes it, without what came after its checkpoint
    new.write_text('{"step": 1}\n{"step": 2}\n')
    new.replace(path)
    assert log.read() and log.records == [{"step": 1}, {"step": 2}] and log.damaged == 0
    path.write_text('{"step": 5')  # anew, and its first line is still being written
    assert not log.read() and not log.read() and log.records == []
    path.write_text('{"step": 5}\n')
    assert log.read() and log.records == [{"step": 5}]


def test_a_run_as_it_stands(call: Call, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    done = call("watch", run, "--html", page)
    assert done.status == 0, done.err
    first, *lines = done.out.splitlines()
    assert "step 4 of 4" in first and first.endswith("  done")
    rows = {line[:28].rstrip(): line[28:].split() for line in lines if line[:28].strip()}
    losses = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    for name, key in (("loss", "loss"), ("learning rate", "lr"), ("gradient norm", "grad_norm")):
        assert [float(word) for word in rows[name][:2]] == pytest.approx(
            [losses[0][key], losses[-1][key]], rel=1e-4
        )
        assert len(rows[name][2]) == 4
    evaluation = read_metrics(run / "metrics.jsonl")[-1]["evaluation"]
    for one in evaluation["held_out"]:
        assert float(rows[f"held-out NLL, S {one['num_loops']}"][1]) == pytest.approx(one["nll"], rel=1e-4)
    at = lines.index("samples at step 4")
    assert [line[:5] for line in lines[at + 1 :]] == ["S 1  ", "S 1  ", "S 2  ", "S 2  "]
    document = call("watch", run, "--json").json
    assert (document["step"], document["steps"], document["finished"]) == (4, 4, True)
    assert document["curves"]["loss"] == [[r["step"], r["loss"]] for r in losses]
    assert document["samples"] == evaluation["samples"] and document["samples_at"] == 4
    text = page.read_text(encoding="utf-8")
    assert "http-equiv" not in text and "<script" not in text and text.count("<svg") == 4
    for drawing in text.split("<figure>")[1:]:
        ElementTree.fromstring(drawing.partition("</figure>")[0])
    assert call("watch", run, "--html", page).status == 0  # over its own
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    refused = call("watch", run, "--html", mine)
    assert refused.status == 2 and "a file that this option did not write" in refused.err
    nothing = call("watch", tmp_path)
    assert nothing.status == 1 and "holds no run: there is no train_config.json" in nothing.err
    nowhere = call("watch", tmp_path / "NOTHERE")
    assert (nowhere.status, nowhere.err) == (
        1,
        f"loopmdm watch: error: there is no folder {tmp_path / 'NOTHERE'}\n",
    )


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_time_that_is_none(call: Call, tmp_path: Path, seconds: str) -> None:
    done = call("watch", tmp_path, f"--every={seconds}")
    assert done.status == 2 and "argument --every: got " in done.err and seconds in done.err


def test_an_answer_is_apart_from_its_prompt(run: Path) -> None:
    """In a run on pairs; a text goes on where its prompt ends."""
    sample = {"num_loops": 1, "seed": 0, "prompt": "2 + 2?", "text": "4"}
    record = {"step": 4, "evaluation": {"samples": [sample, sample | {"prompt": ""}]}}
    log, described = run / "metrics.jsonl", run / "run.json"
    log.write_text(log.read_text() + json.dumps(record) + "\n")
    watched = WatchedRun(run)
    assert watched.read() and watched.lines(40, 50)[-2:] == ["S 1  2 + 2?4", "S 1  4"]
    described.write_text(json.dumps(json.loads(described.read_text()) | {"pairs": ["prompt", "response"]}))
    watched = WatchedRun(run)
    assert watched.read() and watched.lines(40, 50)[-2:] == ["S 1  2 + 2? → 4", "S 1  4"]
    assert "<pre>2 + 2? → 4</pre>" in watched.page(None)
    assert [text for _, text in texts(record)] == ["2 + 2?4", "4"]
    assert [text for _, text in texts(record, pairs=True)] == ["2 + 2?\n4", "4"]


def test_a_page_is_written_while_the_run_goes_on(run: Path, tmp_path: Path) -> None:
    """Through a damaged line, a resumption and new records; it ends with the run."""
    config = run / "train_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps": 6}))
    log, page = run / "metrics.jsonl", tmp_path / "run.html"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:2]) + whole[2][:9])
    (run / LOCK_FILE).touch()
    status: list[int] = []
    words = ["watch", str(run), "--html", str(page), "--every", "0.02"]
    thread = threading.Thread(target=lambda: status.append(main(words)))
    thread.start()

    def waits_for(text: str) -> None:
        while not page.exists() or text not in page.read_text(encoding="utf-8"):
            assert thread.is_alive()

    waits_for("step 2 of 6")
    assert '<meta http-equiv="refresh"' in page.read_text(encoding="utf-8")
    resumed = tmp_path / "resumed"
    last = json.loads(next(line for line in reversed(whole) if '"loss"' in line))
    resumed.write_text("".join(whole) + json.dumps(last | {"step": 5}) + "\n")
    resumed.replace(log)
    waits_for("step 5 of 6")
    with log.open("a") as file:
        file.write("damaged\n" + json.dumps(last | {"step": 6}) + "\n")
    waits_for("1 damaged line left out")
    (run / LOCK_FILE).unlink()
    thread.join()
    assert status == [0]
    text = page.read_text(encoding="utf-8")
    assert "step 6 of 6" in text and "  done" in text and "http-equiv" not in text


def test_samples_do_not_act_on_a_page_or_a_terminal(run: Path) -> None:
    log = run / "metrics.jsonl"
    sample = {"num_loops": 1, "seed": 0, "prompt": "", "text": "<script>\x1b[2J\nx"}
    solved = {"num_loops": 2, "order": "left_to_right", "prompt": "1.", "text": "12", "solved": True}
    record = {"step": 4, "evaluation": {"samples": [sample, solved]}}
    log.write_text(log.read_text() + json.dumps(record) + "\n")
    watched = WatchedRun(run)
    assert watched.read()
    page = watched.page(None)
    assert "<script" not in page and "&lt;script&gt;\\x1b[2J\nx" in page and "1. → 12" in page
    lines = watched.lines(40, 50, plain=True)
    assert lines[-2:] == ["S 1  <script>\\x1b[2J↵x", "S 2  1. → 12"]
    assert all(len(line) <= 40 for line in lines) and len(watched.lines(40, 3)) == 3


def test_records_of_others_and_damaged_ones(call: Call, run: Path, tmp_path: Path) -> None:
    """Valid JSON that is no record is left out; an evaluation of one's own and an older run are shown."""
    log = run / "metrics.jsonl"
    whole = log.read_text()
    last = json.loads(next(line for line in whole.splitlines() if '"loss"' in line))
    damaged: list[dict[str, object]] = [
        {"step": True},
        {"step": 4, "loss": 1.0},
        last | {"step": 0},
        last | {"tokens_per_second": None},
        last | {"grad_norm": float("nan")},
    ]
    strange = [None, 5, {"held_out": 5, "solved": 0.5, "samples": [3]}, {"held_out": [{"nll": None}]}]
    others: list[dict[str, object]] = [{"step": 4, "evaluation": one} for one in strange]
    before = call("watch", run, "--json").json
    log.write_text(whole + "".join(json.dumps(one) + "\n" for one in damaged + others))
    assert call("watch", run, "--json").json == before | {"damaged_lines": len(damaged)}
    done = call("watch", run, "--html", tmp_path / "run.html")
    assert done.status == 0 and "5 damaged lines left out" in " ".join(done.out.split())

    kept = [json.loads(line) for line in whole.splitlines()]
    later = ("peak_memory", "tokens_per_second")  # figures that older runs do not have
    log.write_text("".join(json.dumps({k: r[k] for k in r if k not in later}) + "\n" for r in kept))
    first = call("watch", run).out.splitlines()[0]
    assert "step 4 of 4" in first and "memory" not in first and "tokens/s" not in first

    (run / "train_config.json").write_text("{}")
    refused = call("watch", run)
    assert refused.status == 1 and "train_config.json: steps: got None, expected an integer" in refused.err


def test_characters_of_two_cells_stay_within_the_panel(run: Path) -> None:
    sample = {"num_loops": 1, "seed": 0, "prompt": "", "text": "循环" * 40}
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "evaluation": {"samples": [sample]}}) + "\n")
    watched = WatchedRun(run)
    watched.read()
    assert watched.lines(40, 50)[-1] == "S 1  " + "循环" * 8 + "循"
