"""A progress bar with an estimate of the time left, on stderr."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Final

from seqmodels.data.text.readers import Piece
from seqmodels.escape import escape
from seqmodels.screen import is_rewritable, phase

_PIECES_PER_UPDATE: Final = 256


def over(pieces: Iterable[Piece], label: str, text_bytes: int) -> Iterator[Piece]:
    """The pieces of documents, with a bar that advances as they are taken.

    ``text_bytes`` is about their size. On a stream where no line can be written again there is one that it has begun, and one at
    the end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    begun = contextlib.nullcontext() if is_rewritable(sys.stderr) else phase(label)
    with begun, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(escape(label, "line"), total=text_bytes)
        done = 0
        for number, piece in enumerate(pieces, start=1):
            yield piece
            done += len(piece.text)
            if number % _PIECES_PER_UPDATE == 0:
                progress.update(bar, completed=done)
        progress.update(bar, completed=done, total=done)  # the total was an estimate
