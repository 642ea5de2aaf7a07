"""What a terminal can show, and any other stream: a line that is written again, what is being done, a table in so many columns."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from seqmodels.escape import escape, is_mute, say

if TYPE_CHECKING:
    from rich.live import Live

PATIENCE = 1.5  # seconds that something may take before it is said
BAR = "━─"  # of what is done, and of what is left
ASCII_BAR = "#-"
LEAST_COLUMNS = 50  # that a table is fitted to; a narrower terminal breaks its lines
GAP = 2  # columns between two cells


def is_rewritable(stream: TextIO) -> bool:
    """Whether a line can be written again in place: it is a terminal, and no dumb one (TERM, TTY_COMPATIBLE)."""
    if not stream.isatty():
        return False
    from rich.console import Console

    return Console(file=stream).is_interactive


def can_show(text: str, stream: TextIO) -> bool:
    """Whether the stream's encoding has all characters of a text."""
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def phase(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Says what is being done, if it takes long: on a terminal with the seconds so far, until it is over; elsewhere in one line."""
    if is_mute():
        yield
        return
    stream = sys.stderr if stream is None else stream
    begun = time.perf_counter()
    if is_rewritable(stream):
        live = live_line(
            stream, lambda width, bar: f"{escape(what, 'line')}, {time.perf_counter() - begun:.0f} s"[:width], transient=True
        )
        try:
            yield
        finally:
            live.stop()
        return
    timer = threading.Timer(PATIENCE, say, (f"{what} ...", stream))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def live_line(stream: TextIO, line: Callable[[int, str], str], transient: bool = False) -> "Live":
    """A line that is written again several times a second, by a thread; ``line`` makes it for a number of columns and a bar."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    class Line:
        def __rich_console__(self, console, options):
            yield Text(line(options.max_width, ASCII_BAR if options.ascii_only else BAR), no_wrap=True, overflow="crop")

    live = Live(Line(), console=Console(file=stream), transient=transient, refresh_per_second=4, redirect_stdout=False)
    live.start(refresh=True)
    return live


def width(text: str) -> int:
    """The columns that a line takes: two of each wide character, such as a Chinese one."""
    from rich.cells import cell_len

    return cell_len(text)


def placed(text: str, room: int, *, left: bool) -> str:
    """A cell with blanks up to so many columns, at its right or its left."""
    blanks = " " * (room - width(text))
    return text + blanks if left else blanks + text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str], room: int | None = None) -> str:
    """An aligned table of plain text.

    Args:
        heads: of the columns.
        rows: their cells, escaped.
        left: the heads of the columns that are set to the left; the others hold numbers.
        room: columns of the terminal. Where they are too few, heads are broken at blanks and underscores and the middle of a text
            of more than half of them is left out; what then has no room stands in a second table below, and a third, each with the
            first cells. None, or fewer than `LEAST_COLUMNS`: each row is one line.
    """
    parts = [_Column([head], list(cells), head in left) for head, *cells in zip(heads, *rows, strict=True)]
    if room is None or room < LEAST_COLUMNS or _width(parts) <= room:
        return _text(parts)
    first, *others = [part.narrowed(room // 2 - GAP) for part in parts]
    found = [[first]]
    for part in others:
        if _width([*found[-1], part]) > room:
            found.append([first])
        found[-1].append(part)
    return "\n\n".join(map(_text, found))


@dataclasses.dataclass(frozen=True)
class _Column:
    head: list[str]  # its lines
    cells: list[str]
    is_left: bool

    @property
    def width(self) -> int:
        return max(map(width, (*self.head, *self.cells)))

    def narrowed(self, most: int) -> "_Column":
        """With the head in several lines, no wider than the widest cell or word, and texts of at most so many columns."""
        cells = [_shortened(cell, most) for cell in self.cells] if self.is_left else self.cells
        words = re.findall(r"[^ _]*[ _]|[^ _]+$", self.head[0])
        room, head = max(map(width, (*words, *cells))), [""]
        for word in words:
            if width(head[-1] + word) > room:
                head.append("")
            head[-1] += word
        return _Column([line.rstrip() for line in head], cells, self.is_left)


def _width(parts: Sequence[_Column]) -> int:
    return sum(part.width for part in parts) + GAP * (len(parts) - 1)


def _shortened(text: str, most: int) -> str:
    """A text of at most so many columns, of which the middle is left out."""
    if width(text) <= most:
        return text
    begin, end = "", ""
    for character in text:
        if width(begin + character) > (most - 3) // 2:
            break
        begin += character
    for character in reversed(text):
        if width(begin + character + end) > most - 3:
            break
        end = character + end
    return f"{begin}...{end}"


def _text(parts: Sequence[_Column]) -> str:
    height = max(len(part.head) for part in parts)
    columns_of_cells = [[""] * (height - len(part.head)) + part.head + part.cells for part in parts]
    return "\n".join(
        (" " * GAP).join(placed(cell, part.width, left=part.is_left) for cell, part in zip(row, parts)).rstrip()
        for row in zip(*columns_of_cells)
    )
