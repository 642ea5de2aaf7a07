"""Text of others is seen as it is and obeyed by nothing: not by a terminal, not by Markdown, HTML, LaTeX or JSON."""

import ast
import html.parser
import json
import os
import termios
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook
from matplotlib.figure import Figure

from seqmodels.escape import code_block, escape, say
from seqmodels.evaluation import plots

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred", "\x9b31mred", "a\rb\x08\x7f\x00", "\u202eevil\u2066", "\udfff lone \ud800",
    "<script>alert(1)</script>", '" onload="x', "![x](http://a/b.png) [y](javascript:z)", "`code` ```", "a|b\nc|d", "&lt;",
    "# heading", "- entry", "1. entry", "_it_ *bold* ~~s~~ $x$", "<!-- x", "\\end{document}%", "x\u2028y",
]  # fmt: skip
HARMLESS = ["plain words, 1.5 (of 3)", "gated_deltanet", "日本語 café", "👨‍👩‍👧 🏴", "fla-gla", "-0.5", "נייר עמדה"]


@pytest.mark.parametrize("medium", ["terminal", "line", "markdown", "html", "latex", "csv", "figure"])
def test_nothing_that_a_terminal_obeys_is_left(medium):
    for text in HOSTILE:
        shown = escape(text, medium)
        left = {character for character in shown if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")}
        assert left <= (set("\n\t") if medium == "terminal" else set()), (text, shown)
        assert not set(shown) & set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
        shown.encode()  # no lone surrogate


def test_a_line_is_broken_between_words_and_a_command_is_left_whole():
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    sentence, command = "the machine was busy with other work " * 4, "python train.py " + "--config.train.steps=2000 " * 4
    with open(theirs, "w") as stream, open(ours, "rb", buffering=0) as shown:
        say(sentence.strip(), stream)
        say(command.strip(), stream, whole=True)
        text = b""
        while text.count(b"\n") < 4:
            text += shown.read(1000)
    *lines, last, rest = text.decode().split("\r\n")
    assert len(lines) == 3 and all(len(line) <= 60 for line in lines) and " ".join(lines) == sentence.strip()
    assert (last, rest) == (command.strip(), "")


def test_every_code_point_can_be_printed():
    everything = "".join(map(chr, range(0x110000)))
    for medium in ("terminal", "line", "markdown", "html", "latex", "csv", "figure"):
        assert all(character.isascii() is False or character.isprintable() or character in "\n\t"
                   for character in escape(everything, medium))  # fmt: skip
    assert "\x1b" not in escape("\x1b[2J", "terminal") and "␛[2J" == escape("\x1b[2J", "terminal")


def test_what_is_harmless_stays_as_it_is():
    for text in HARMLESS:
        assert {escape(text, medium) for medium in ("terminal", "line", "markdown", "html")} == {text}
    assert escape("two\nlines\tand a tab\r\n", "terminal") == "two\nlines\tand a tab\n"


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_html_is_text_in_elements_and_attributes():
    for text in [*HOSTILE, *HARMLESS]:
        shown = escape(text, "html")
        reader = Reader()
        reader.feed(f'<p title="{shown}">{shown}</p>')
        assert reader.tags == [("p", {"title": escape(text, "line")})] and reader.text == escape(text, "line")


def test_markdown_is_text():
    """By the rules of CommonMark: a mark behind a backslash, and a character reference, are text."""
    shown = escape("<b> &lt; ![a](b) [a]: b `c` a|b *d* _e_ f_g", "markdown")
    assert shown == r"&lt;b> &amp;lt; ![a\](b) [a\]: b \`c\` a\|b \*d\* \_e\_ f_g"
    assert [escape(text, "markdown") for text in ("- a", "12. a", "# a", "> a")] == [r"\- a", r"12\. a", r"\# a", r"\> a"]
    plain = ["-5", "1.5", "3.2 [3.1, 3.3]", "p < 0.001", "a & b", "gla#2", "--max_tokens=5"]
    assert [escape(text, "markdown") for text in plain] == plain


def test_code_stays_in_its_block():
    for hostile in ("a ``` b", "````", "x\n```\n<script>"):
        block = code_block(["python train.py", hostile])
        assert len(block) == 4 and block[0] == block[-1]
        assert block[0] not in block[2] and "\n" not in block[2]


def test_latex_is_text():
    assert escape(r"a_b & 5% {x} \cmd ^~ $#", "latex") == (
        r"a\_b \& 5\% \{x\} \textbackslash{}cmd \textasciicircum{}\textasciitilde{} \$\#"
    )


def test_a_cell_is_no_formula():
    assert [escape(text, "csv") for text in ("=1+1", "-2", "@sum", "+x", "a=b", "")] == [
        "'=1+1",
        "'-2",
        "'@sum",
        "'+x",
        "a=b",
        "",
    ]


def test_labels_of_figures_are_text(tmp_path):
    """What matplotlib would compute, or leave out, is drawn as it is."""
    names = [*HOSTILE, *HARMLESS, "_hidden", r"$\frac$", r"a\$b$", "$$", "nul\0"]
    row = {"step": 1, "split": "validation", "loss": 1.0, "tokens": 1, "seconds": 1.0}
    plots.learning_curves({name: [row] for name in names}, tmp_path / "curves.png")
    plots.attention_weights(np.ones((1, 1, 4, 4)), tmp_path / "attention.png", ["$\\x$", "\0", "_", "\ud83d"])
    figure = Figure()
    for name in names:
        figure.subplots().plot([1, 2], label=escape(name, "figure"))
    drawn = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert [len(labels) for labels in drawn] == [1] * len(names)
    assert not any(cbook.is_math_text(label) for [label] in drawn)


def test_json_stays_the_same_value():
    for text in [*HOSTILE, *HARMLESS]:
        line = escape(json.dumps({"text": text}, ensure_ascii=False), "json")
        assert json.loads(line) == {"text": text}
        assert not [character for character in line if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")]


def test_a_line_is_one_line(capsys):
    say("name\nerror: done\x1b[1A")
    assert capsys.readouterr().err == "name␊error: done␛[1A\n"


ROOT = Path(__file__).parent.parent


def is_escaped(node: ast.expr) -> bool:
    """Whether an argument of `print` can hold nobody's text: `escape` or `json.dumps` made it, or only numbers are in it."""
    if isinstance(node, ast.JoinedStr):
        return all(map(is_escaped, node.values))
    if isinstance(node, ast.FormattedValue):
        form = "" if node.format_spec is None else ast.unparse(node.format_spec)
        return is_escaped(node.value) or form.rstrip("'\"")[-1:] in tuple("dfg%")
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("escape", "escape.escape", "json.dumps")
    return isinstance(node, ast.Constant) or ast.unparse(node) == "__doc__"


def test_commands_print_nothing_that_is_not_escaped():
    paths = [ROOT / "train.py", ROOT / "eval.py", *(ROOT / "scripts").rglob("*.py"), *(ROOT / "seqmodels").rglob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "print":
                assert all(map(is_escaped, node.args)), f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
