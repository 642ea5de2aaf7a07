"""What a run shows: one line that fits its terminal, plain lines elsewhere."""

import io

import pytest

from seqmodels.training.terminal import Terminal, progress_line
from tests.streams import ATerminal

ROW = {"split": "train", "loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.1, "tokens_per_second": 1234.5}


@pytest.mark.parametrize("stream", [io.StringIO(), ATerminal()])
def test_plain_lines_where_none_can_be_rewritten(stream, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = Terminal(0, 3, stream)
    with shown.doing("compiling", "about 3 s", "it is kept"), shown.doing("evaluating"):
        pass
    for step in (1, 2, 3):
        shown.progress(step)
        shown.row({"step": step, **ROW})
    shown.row({"step": 3, **ROW, "split": "validation"})
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling: about 3 s, it is kept"
    assert lines[1].startswith("step 1/3: loss 2.0000  perplexity 7.40") and "1,234 tokens/s" in lines[1]
    assert lines[-2].startswith("step 3/3:") and lines[-2].endswith("0:00:00 left")
    assert lines[-1].startswith("step 3: validation loss 2.0000") and "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "━─"), ("ascii", "#-")])
def test_one_line_on_a_terminal(encoding, bar, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = ATerminal(encoding)
    shown = Terminal(0, 3, stream)
    with shown.doing("compiling", "about 3 s", "it is kept"):
        assert shown._bar_line(60) == "─" * 17 + " 0/3  compiling, 0 s  about 3 s  it is kept"
        assert shown._bar_line(25) == "0/3  compiling, 0 s"
    assert "0/3  the first step, 0 s" in shown._bar_line(60)
    shown.progress(1)
    shown.row({"step": 1, **ROW})
    shown.progress(2)
    shown.line("[hello] :smile:")
    shown.close()
    text = stream.getvalue()
    assert "the first step, 0 s" in text and "2/3  loss 2.0000" in text and "1,234 tokens/s" in text and "[hello] :smile:" in text
    assert all(mark in text for mark in bar) and "\\u" not in text


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (60, "1234567/2000000  loss 2.1234  123:45:56 left"),
        (80, "1234567/2000000  loss 2.1234  123:45:56 left  123,456 tokens/s"),
        (120, "1234567/2000000  loss 2.1234  123:45:56 left  123,456 tokens/s  perplexity 123.45"),
        (20, "1234567/2000000"),
        (7, "1234567"),
    ],
)
def test_the_line_fits_its_terminal(width, line):
    parts = ["loss 2.1234", "123:45:56 left", "123,456 tokens/s", "perplexity 123.45"]
    shown = progress_line(width, 1_234_567, 2_000_000, parts)
    assert shown.endswith(line) and len(shown) <= width
    bar = shown.removesuffix(line).strip()
    assert set(bar) <= set("━─") and bool(bar) == (width in (60, 80, 120))
    assert not bar or bar.count("━") == len(bar) * 1_234_567 // 2_000_000
    assert progress_line(width, 0, 2_000_000, []).endswith("      0/2000000"[:width])
