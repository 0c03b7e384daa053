"""What a watched run draws and prints, and when."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from loopmdm import LoopMDM, sample
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.sampling import StepEvent
from loopmdm.view import IdSymbols, TextSymbols, Watch
from loopmdm.view.painters import TextPainter

from .conftest import event


def watch(*, terminal: bool, length: int = 6, **options: Any) -> tuple[Watch, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, height=12, color_system=None)
    painter = TextPainter(TextSymbols(ByteTokenizer()), ["one"])
    return Watch(torch.full((1, length), 257), 257, painter, console=console, **options), stream


def without_time(line: str) -> str:
    head, _, text = line.partition(" s  ")
    return f"{head.rpartition('  ')[0]}  {text}"


def test_one_line_a_step_where_there_is_no_terminal() -> None:
    shown, stream = watch(terminal=False, num_steps=3)
    with shown:
        shown(event(0, (0, 0, 65, 0.5, 2), (0, 4, 66, 0.5, 2)))
        shown(event(1, (0, 4, 257, 0.0, 2)))
        shown(event(2, (0, 1, 10, 0.5, 4)))
    assert [without_time(line) for line in stream.getvalue().splitlines()] == [
        "step 1/3  loops 2  masked 4 of 6  network calls 1  A···B·",
        "step 2/3  loops 2  masked 5 of 6  network calls 2  A·····",
        "step 3/3  loops 4  masked 4 of 6  network calls 3  A↵····",
    ]
    assert "\x1b" not in stream.getvalue() and shown.frames == 0


def test_long_runs_print_fifty_lines_and_the_last() -> None:
    shown, stream = watch(terminal=False, length=120, num_steps=120)
    with shown:
        for step in range(119):
            shown(event(step, (0, step, 65, 0.5, 1)))
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [*range(3, 118, 3), 119]


def test_a_run_without_steps_prints_nothing() -> None:
    shown, stream = watch(terminal=False)
    with shown:
        pass
    assert stream.getvalue() == ""


def test_frames_are_limited_and_the_last_state_is_drawn() -> None:
    shown, stream = watch(terminal=True, length=1000, num_steps=1000)
    start = time.perf_counter()
    with shown:
        for step in range(1000):
            shown(event(step, (0, step, 65, 0.5, 1)))
            if step == 10:
                assert shown.frames <= 2
    seconds = time.perf_counter() - start
    assert 2 <= shown.frames <= 3 + 20 * seconds
    assert "step 1000/1000  loops 1  masked 0 of 1000  network calls 1000" in stream.getvalue()
    last = stream.getvalue().rpartition("step 1000/1000")[2]
    assert last.count("A" * 100) >= 8  # as many lines as have room
    assert "\x1b[?25h" in last  # the cursor is shown again


def test_the_last_state_is_drawn_after_an_error() -> None:
    shown, stream = watch(terminal=True)
    with pytest.raises(KeyboardInterrupt), shown:
        shown(event(0, (0, 0, 65, 0.5, 1)))
        shown(event(1, (0, 1, 66, 0.5, 1)))
        raise KeyboardInterrupt
    assert "AB····" in stream.getvalue() and stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_delay_holds_every_step() -> None:
    shown, stream = watch(terminal=True, delay=0.05)
    start = time.perf_counter()
    with shown:
        for step in range(4):
            shown(event(step, (0, step, 65 + step, 0.5, 1)))
    assert time.perf_counter() - start >= 0.2
    assert all(text in stream.getvalue() for text in ("A·····", "AB····", "ABC···", "ABCD··"))


def test_watching_changes_nothing(model: LoopMDM) -> None:
    options: dict[str, Any] = {"num_samples": 2, "length": 12, "seed": 5, "progress": False}
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=24)
    painter = TextPainter(TextSymbols(ByteTokenizer()), ["one", "two"])
    with Watch(torch.full((2, 12), 257), 257, painter, console=console) as shown:
        result = sample(model, **options, on_step=shown)
        shown.finish(result)
    assert torch.equal(result.tokens, sample(model, **options).tokens)
    assert torch.equal(shown.replay.tokens, result.tokens)
    header = f"step {shown.replay.step + 1}/{result.num_steps}  loops 3  masked 0 of 24"
    assert f"{header}  network calls {result.total_network_calls}" in stream.getvalue()


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (100, r"step 4/30  loops 3  masked 20 of 24  network calls 4  [\d.]+ s"),
        (40, r"4/30  S 3  20 masked  4 calls  [\d.]+ s"),
        (30, r"4/30  S 3  20 masked  4 calls"),
        (12, r"4/30  S 3"),
        (3, r"4/3"),
    ],
)
def test_the_status_line_has_the_words_there_is_room_for(width: int, expected: str) -> None:
    canvas = torch.full((1, 24), 9)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=12, color_system=None)
    painter = TextPainter(IdSymbols(), ["one"])
    with Watch(canvas, 9, painter, num_steps=30, console=console) as watch:
        for step in range(4):
            one = torch.tensor([step])
            watch(StepEvent(step, torch.tensor([0]), one, one, torch.tensor([0.5]), torch.tensor([3])))
        header, legend, *_ = watch.picture()
    assert re.fullmatch(expected, header.plain)
    assert legend.cell_len <= width
