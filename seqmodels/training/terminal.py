"""What a run shows while it goes: on a terminal one line that is rewritten, anywhere else plain lines."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

from seqmodels.escape import escape
from seqmodels.screen import BAR, is_rewritable, live_line

# What is shown of a row of metrics.jsonl, and how.
SHOWN = {"loss": ".4f", "perplexity": ".2f", "accuracy": ".4f", "bits_per_byte": ".4f"}
BAR_WIDTHS = 6, 24  # least and most; a narrower terminal has none


class Terminal:
    """Progress on stderr: a line with a bar on a terminal that can rewrite one, plain lines (at most one a second) anywhere else."""

    def __init__(self, step: int, total_steps: int, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._first_step = self._step = step
        self._total_steps = total_steps
        self._started = None  # when the first step was done: it is no measure of the time left
        self._doing = (time.perf_counter(), "the first step") if step < total_steps else None  # since when, what, more of it
        self._next_line = 0.0
        self._numbers, self._speed = [], ""
        self._live = None
        if is_rewritable(self._stream):
            self._live = live_line(self._stream, self._bar_line)

    def progress(self, step: int) -> None:
        """Steps done so far."""
        if self._started is None:
            self._started, self._first_step = time.perf_counter(), step
            self._doing = None
        self._step = step

    @contextlib.contextmanager
    def doing(self, what: str, *more: str) -> Iterator[None]:
        """Inside, a terminal says what is done, with the seconds so far; elsewhere that is a line if there is `more` to say of it."""
        before, self._doing = self._doing, (time.perf_counter(), what, *more)
        if more and self._live is None:
            self.line(f"{what}: {', '.join(more)}")
        try:
            yield
        finally:
            self._doing = before and (time.perf_counter(), *before[1:])

    def row(self, row: Mapping) -> None:
        """Show a row of metrics.jsonl."""
        shown = [f"{name.replace('_', ' ')} {row[name]:{form}}" for name, form in SHOWN.items() if name in row]
        numbers = shown[:2]  # a line of training has the loss and one score
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        if row["split"] == "validation":
            self.line(f"step {row['step']}: validation {'  '.join(shown)}")
        elif self._live is not None:
            self._numbers, self._speed = numbers, speed
        elif time.perf_counter() >= self._next_line or row["step"] == self._total_steps:
            self._next_line = time.perf_counter() + 1.0
            self.line(f"step {row['step']}/{self._total_steps}: {'  '.join(numbers)}  {speed}  {self._left()}")

    def line(self, text: str) -> None:
        """One line (or several) of its own."""
        if self._live is not None:
            self._live.console.print(escape(text, "terminal"), markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(escape(text, "terminal"), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._live is not None:
            self._live.stop()

    def _bar_line(self, width: int, bar: str = BAR) -> str:
        doing = self._doing  # once: another thread changes it
        if doing is None:
            parts = [*self._numbers[:1], self._left(), self._speed, *self._numbers[1:]]
        else:
            since, what, *more = doing
            parts = [f"{what}, {time.perf_counter() - since:.0f} s", *more]
        return progress_line(width, self._step, self._total_steps, parts, bar)

    def _left(self) -> str:
        done = self._step - self._first_step
        if not done:
            return ""
        seconds = round((time.perf_counter() - self._started) / done * (self._total_steps - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


def progress_line(width: int, step: int, total_steps: int, parts: list[str], bar: str = BAR) -> str:
    """One line of at most so many columns: the steps, as many of the parts as there is room for, a bar in what is left.

    Args:
        parts: the most important first.
        bar: its two characters, of what is done and of what is left.
    """
    line = f"{step:>{len(str(total_steps))}}/{total_steps}"
    for part in filter(None, parts):
        if len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    room = min(width - len(line) - 1, BAR_WIDTHS[1])
    if room < BAR_WIDTHS[0]:
        return line[:width]
    filled = room * step // total_steps
    return f"{bar[0] * filled}{bar[1] * (room - filled)} {line}"
