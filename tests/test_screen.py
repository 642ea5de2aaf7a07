"""What a terminal shows of what is done, and a table in its columns; and what any other stream does."""

import io
import os
import termios
import time

import pytest

from seqmodels import screen
from seqmodels.data import progress
from seqmodels.data.text.readers import Piece
from seqmodels.escape import columns
from seqmodels.screen import is_rewritable, phase, table
from tests.streams import ATerminal


@pytest.fixture(autouse=True)
def an_able_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("TERM", "xterm", True), ("NO_COLOR", "1", True), ("TERM", "dumb", False), ("TTY_COMPATIBLE", "0", False)],
)
def test_a_dumb_terminal_gets_lines(name, value, expected, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(screen, "PATIENCE", 0.0)
    stream = ATerminal()
    assert is_rewritable(stream) == expected and not is_rewritable(io.StringIO())
    with phase("tracing", stream):
        time.sleep(0.05)
    assert ("tracing ...\n" in stream.getvalue()) == (not expected) and ("\x1b" in stream.getvalue()) == expected
    monkeypatch.setattr("sys.stderr", ATerminal())
    assert len(list(progress.over([Piece("text", ends=True)] * 3, "tokenising it", 12))) == 3


def test_the_columns_of_a_stream():
    ours, theirs = os.openpty()
    with open(ours, "w") as stream, open(theirs) as _:
        assert columns(stream) is None, "it does not say"
        termios.tcsetwinsize(ours, (24, 61))
        assert columns(stream) == 61
    assert columns(io.StringIO()) is None


def test_what_takes_long_is_said(monkeypatch):
    monkeypatch.setattr(screen, "PATIENCE", 0.02)
    stream = io.StringIO()
    with phase("tra\x1bcing", stream):
        time.sleep(0.2)
    assert stream.getvalue() == "tra␛cing ...\n"
    with pytest.raises(KeyError), phase("broken", stream):
        raise KeyError
    time.sleep(0.1)
    assert stream.getvalue() == "tra␛cing ...\n"
    shown = ATerminal()
    with phase("compiling", shown):
        pass
    assert "compiling, 0 s" in shown.getvalue()


ROWS = [
    ["日本語/seed0", "4 x gla mlp attention mlp", "1,234,567 / 2,000,000", "2.1234", "1,048,624"],
    ["/".join(["a_long_folder"] * 9), "4 x gla mlp", "", "", ""],
]
HEADS = ["run", "model", "step", "loss", "bytes of_state"]


@pytest.mark.parametrize("room", [50, 60, 80, 120])
def test_a_table_fits_its_terminal_and_loses_no_number(room):
    text = table(HEADS, ROWS, left=["run", "model"], room=room)
    assert max(map(screen.width, text.splitlines())) <= room
    assert text.count("日本語/seed0") == len(text.split("\n\n")) > 1, "each part names the rows"
    assert all(text.count(cell) == 1 for cell in ROWS[0][2:]) and ROWS[1][0] not in text


@pytest.mark.parametrize("room", [None, 20, 300])
def test_a_row_is_one_line_where_there_is_room_or_no_terminal(room):
    head, *rows = table(HEADS, ROWS, left=["run", "model"], room=room).splitlines()
    assert len(rows) == 2 and head.split() == ["run", "model", "step", "loss", "bytes", "of_state"]
    assert rows[0].endswith("2.1234       1,048,624") and ROWS[1][0] in rows[1]
    columns_before = {screen.width(line.partition("4 x gla")[0]) for line in rows}
    assert len(columns_before) == 1, "wide characters count twice"


@pytest.mark.parametrize("text", ["日本語" * 20, "a" * 99, "a日" * 30])
def test_the_middle_of_a_long_cell_is_left_out(text):
    for most in range(8, 40):
        short = screen._shortened(text, most)
        assert screen.width(short) in (most, most - 1, most - 2) and "..." in short
        begin, end = short.split("...")
        assert text.startswith(begin) and text.endswith(end)
