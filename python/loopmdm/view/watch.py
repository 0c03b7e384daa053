"""Shows a sampling run while it happens: a picture that is redrawn on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from loopmdm import terminal
from loopmdm.sampling import SampleResult, StepEvent
from loopmdm.view.painters import Painter, legend
from loopmdm.view.replay import Replay

FRAMES_PER_SECOND = 20.0
_MOST_OVERHEAD = 0.1  # share of the time spent on drawing
_MOST_LOG_LINES = 50


class Watch:
    """Give it to `sample` as `on_step`, inside a `with` block.

    On a terminal it draws at most 20 frames a second and spends at most a tenth of the time on them; the last
    state is always drawn. Elsewhere it prints a line for every step, or for every k-th where there are more
    than 50, and one for the last.

    Args:
        canvas: [B, L], the tokens before the first step.
        mask_token_id: the token that stands for "to be filled in".
        painter: draws the canvases.
        num_steps: steps of the run, where they are known beforehand.
        delay: seconds a step lasts at least, so that fast runs can be followed.
        console: where to draw; default standard error.
    """

    def __init__(
        self,
        canvas: Tensor,
        mask_token_id: int,
        painter: Painter,
        *,
        num_steps: int | None = None,
        delay: float = 0.0,
        console: Console | None = None,
    ) -> None:
        self.replay = Replay(canvas, mask_token_id)
        self.frames = 0
        self.seconds = 0.0  # spent here during the run: on drawing, and on waiting where there is a delay
        self._painter = painter
        self._num_steps = num_steps
        self._delay = delay
        self._console = terminal.console() if console is None else console
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._log_every = math.ceil((num_steps or 1) / _MOST_LOG_LINES)
        self._events = 0
        self._stale = True
        self._next_draw = 0.0
        self._start = self._last_step = time.perf_counter()

    def __enter__(self) -> Watch:
        self._start = self._last_step = time.perf_counter()
        if self._live is not None:
            self._live.start()
            self._draw()
        return self

    def __call__(self, event: StepEvent) -> None:
        """Show what a step changed."""
        start = time.perf_counter()
        self._show(event)
        self.seconds += time.perf_counter() - start

    def _show(self, event: StepEvent) -> None:
        self.replay.apply(event)
        self._events += 1
        self._stale = True
        if self._live is None:
            if self._events % self._log_every == 0:
                self._log()
        elif self._delay or time.perf_counter() >= self._next_draw:
            self._draw()
        if self._delay:
            time.sleep(max(0.0, self._last_step + self._delay - time.perf_counter()))
            self._last_step = time.perf_counter()

    def finish(self, result: SampleResult) -> None:
        """Take what events do not show from the result: its counts, and the ends of sequences."""
        self._num_steps = result.num_steps
        self.replay.finish(result)
        self._stale = self._stale or self._live is not None  # a line is not printed twice

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._stale and (self._live is not None or self._events):
                self._draw() if self._live is not None else self._log()
        finally:
            if self._live is not None:
                self._live.stop()

    def picture(self) -> list[Text]:
        """The lines of a frame, as many as the terminal has room for."""
        width, height = self._console.size
        header = [Text(self._header(width), style="bold"), legend(width)]
        return [*header, *self._painter.paint(self.replay, width, max(1, height - len(header) - 1))]

    def _draw(self) -> None:
        assert self._live is not None
        start = time.perf_counter()
        self._live.update(Group(*self.picture()), refresh=True)
        end = time.perf_counter()
        self._next_draw = max(start + 1 / FRAMES_PER_SECOND, end + (end - start) / _MOST_OVERHEAD)
        self._stale = False
        self.frames += 1

    def _log(self) -> None:
        line = f"{self._header()}  {self._painter.log_line(self.replay)}"
        print(line, file=self._console.file, flush=True)
        self._stale = False

    def _header(self, width: int | None = None) -> str:
        """Where the run is: in words, or in so few as `width` cells have room for."""
        replay, seconds = self.replay, f"{time.perf_counter() - self._start:.1f} s"
        total = "" if self._num_steps is None else f"/{self._num_steps}"
        step, masked = f"{replay.step + 1}{total}", int(replay.masked.sum())
        calls = int(replay.network_calls.sum())
        loops = ""
        if replay.last_loops is not None:
            fewest, most = replay.last_loops
            loops = str(most) if fewest == most else f"{fewest} to {most}"
        words = [f"step {step}", *([f"loops {loops}"] if loops else [])]
        words += [f"masked {masked} of {int((~replay.given).sum())}", f"network calls {calls}", seconds]
        line = "  ".join(words)
        if width is None or len(line) <= width:
            return line
        short = [step, *([f"S {loops}"] if loops else []), f"{masked} masked", f"{calls} calls", seconds]
        while len(short) > 1 and len("  ".join(short)) > width:
            short.pop()
        return "  ".join(short)[:width]
