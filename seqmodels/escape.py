"""Text that others wrote (a model, a checkpoint's config, a file name), made harmless for the place where it is shown."""

import html
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TextIO

Medium = Literal["terminal", "line", "json", "markdown", "html", "latex", "csv", "figure"]

_REPLACEMENT: Final = "\ufffd"
# Control characters, which a terminal obeys, and the marks that turn the direction of what follows, which hide text from a
# reader (Boucher and Anderson 2021, arXiv 2111.00169). Joiners stay: scripts and emoji need them.
_DIRECTIONS: Final = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS: Final = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # their pictures, such as U+241B for ESC
    0x7F: "\u2421",
    **dict.fromkeys([*range(0x80, 0xA0), 0x2028, 0x2029, *_DIRECTIONS, *range(0xD800, 0xE000)], _REPLACEMENT),
}
_LINES: Final = {code: shown for code, shown in _CONTROLS.items() if chr(code) not in "\t\n"}
_JSON: Final = {code: f"\\u{code:04x}" for code in _CONTROLS if code >= 0x7F}
_MARKDOWN: Final = {ord(mark): f"\\{mark}" for mark in "\\`*|~$"}
# What Markdown reads as more than itself in some places only; elsewhere it stays legible in the source. In this order.
_MARKDOWN_PLACES: Final = (
    (r"&(?=[#\w])", "&amp;"),
    (r"<(?=[A-Za-z/!?])", "&lt;"),
    (r"\](?=[(\[:])", r"\\]"),  # of a link, an image, a link's definition
    (r"(?<![^\W_])_|_(?![^\W_])", r"\\_"),  # where it is not within a name
    (r"^(\s*)([#>])", r"\1\\\2"),  # a heading, a quotation
    (r"^(\s*\d*)([-+=.)])(?=\s|$)", r"\1\\\2"),  # an entry of a list, a line below a heading
)
_FORMULA: Final = ("=", "+", "-", "@")
_LATEX: Final = {ord(mark): f"\\{mark}" for mark in "{}$&#_%"} | {
    ord("\\"): r"\textbackslash{}", ord("^"): r"\textasciicircum{}", ord("~"): r"\textasciitilde{}",
}  # fmt: skip


def escape(text: str, medium: Medium) -> str:
    """The text as it may be written to a medium: seen as it is, obeyed by nothing.

    Args:
        text: anything, lone surrogates included.
        medium: "terminal": several lines of plain text; "line": one of them (an error, a name); "json": what `json.dumps` made,
            which stays the same value; "markdown", "html" (attributes included), "latex": text of one paragraph, cell or
            heading, without markup of its own; "csv": a cell, which no table calculator takes for a formula; "figure": a
            label, of which matplotlib would read mathematics between two dollars, and leave out what begins with ``_``.
    """
    if medium == "terminal":
        return text.replace("\r\n", "\n").translate(_LINES)
    if medium == "json":
        return text.translate(_JSON)
    text = text.translate(_CONTROLS)
    if medium == "line":
        return text
    if medium == "csv":
        return f"'{text}" if text.startswith(_FORMULA) else text
    if medium == "figure":
        text = text.replace("$", r"\$")
        return f" {text}" if text.startswith("_") else text
    if medium == "html":
        return html.escape(text, quote=True)
    if medium == "latex":
        return text.translate(_LATEX)
    text = text.translate(_MARKDOWN)
    for pattern, replacement in _MARKDOWN_PLACES:
        text = re.sub(pattern, replacement, text)
    return text


def code_block(lines: Sequence[str]) -> list[str]:
    """Lines of Markdown that show the given ones as they are, between fences that none of them closes."""
    shown = [escape(line, "line") for line in lines]
    fence = "`" * max(3, 1 + max((len(run) for line in shown for run in re.findall("`+", line)), default=0))
    return [fence, *shown, fence]


_is_mute = False


def mute() -> None:
    """From now on `say` prints nothing on stderr: of a run's processes only one prints."""
    global _is_mute
    _is_mute = True


def is_mute() -> bool:
    """Whether this process prints nothing on stderr."""
    return _is_mute


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """HTML of a heading and two columns, names and values: what a notebook shows of a value. All text is escaped."""
    left = 'style="text-align:left"'
    cells = "".join(
        f"<tr><th {left}>{escape(name, 'html')}</th><td {left}>{escape(str(value), 'html')}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div><b>{escape(title, 'html')}</b><table>{cells}</table></div>"


def columns(stream: TextIO) -> int | None:
    """Of the terminal that a stream is; None where it is none, or does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def say(line: str, stream: TextIO | None = None, *, whole: bool = False) -> None:
    """Print one line, by default on stderr, whatever names are in it.

    Args:
        whole: it holds a command, which is copied as one line. Any other line is broken between words where a terminal is narrower.
    """
    if stream is None and _is_mute:
        return
    stream = sys.stderr if stream is None else stream
    room, parts = columns(stream), [line]
    if room is not None and not whole:
        parts = textwrap.wrap(escape(line, "line"), room, break_long_words=False, break_on_hyphens=False) or [line]
    for part in parts:
        print(escape(part, "line"), file=stream, flush=True)
