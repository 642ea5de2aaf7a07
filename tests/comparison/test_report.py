"""The report of forty mixers: figures inside their canvas, names apart, and files for a paper."""

import copy
import csv
import io
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter

from seqmodels import mixers, references
from seqmodels.comparison import results
from seqmodels.comparison.report import content, figures, html, labels, latex, markdown

OLD_RESULTS = Path(__file__).resolve().parents[1] / "old_results"  # of November 2026, before all mixers had one start
LINKS = dict.fromkeys(mixers.names(), "../mixer.py")
COUNT = 40


@pytest.fixture(scope="module")
def found() -> dict:
    """Results of forty mixers: those of a comparison of 19, again with figures a little off and longer names."""
    read = results.read(OLD_RESULTS / "tinystories_small.json")
    rows = list(read["mixers"].items())
    for index in range(COUNT - len(rows)):
        label, row = rows[index % len(rows)]
        row, factor = copy.deepcopy(row), 1 + 0.003 * (index + 1)
        for estimate in row["quality"].values():
            if isinstance(estimate, dict):
                estimate |= {name: estimate[name] * factor for name in ("mean", "low", "high")}
        row["cost"]["train_tokens_per_second"] *= factor
        read["mixers"][f"{label}_with_option_{index}"] = row
    assert len(read["mixers"]) == COUNT
    return read


@pytest.fixture(scope="module")
def rendered(found):
    with matplotlib.rc_context(figures.STYLE):
        return {
            name: figures.render(found, panels[-1:]) for name, chart in figures.CHARTS.items() if (panels := chart.panels(found))
        }


def test_nothing_leaves_the_canvas_and_names_are_apart(found, rendered):
    named = set(figures.highlighted(found))
    assert len(named) == len(figures.COLOURS) and next(iter(found["mixers"])) in named
    assert {label for label, _ in content.ranked(found)[:5]} <= named
    assert set(rendered) == {"pareto", "curves", "by_position", "recall", "contexts", "rates"}
    for name, (figure, [panel]) in rendered.items():
        renderer, canvas = figure.canvas.get_renderer(), figure.bbox
        hidden = {
            label
            for axis in (panel.axes.xaxis, panel.axes.yaxis)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
            if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
            for label in (tick.label1, tick.label2)
        }
        texts = [each for each in figure.findobj(Text) if each.get_visible() and each.get_text() and each not in hidden]
        assert len(texts) > len(panel.names)
        for text in texts:
            box = text.get_window_extent(renderer)
            assert canvas.x0 - 0.5 <= box.x0 and box.x1 <= canvas.x1 + 0.5, (name, text)
            assert canvas.y0 - 0.5 <= box.y0 and box.y1 <= canvas.y1 + 0.5, (name, text)
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in panel.names}
        assert named <= set(boxes) and len(boxes) == len(panel.names), name
        for one, first in boxes.items():
            for other, second in boxes.items():
                assert one == other or labels.overlap(first, second) == 0, (name, one, other)
        axes = panel.axes.get_window_extent(renderer).padded(1)
        for label, x, y in panel.values:
            assert axes.contains(*panel.axes.transData.transform((x, y))), (name, label)


def test_a_long_name_takes_several_lines_and_leaves_room_for_the_axes(found):
    long = "gated_deltanet(num_heads=1,key_expansion=0.75,value_expansion=1.5) mlp"
    lines = labels.in_lines(long).split("\n")
    assert "".join(lines) == long and 3 <= len(lines) <= 4 and max(map(len, lines)) <= labels.LINE + 1  # and a space
    assert labels.in_lines("gated_deltanet") == "gated_deltanet"
    best = content.ranked(found)[0][0]
    renamed = found | {"mixers": {long if label == best else label: row for label, row in found["mixers"].items()}}
    with matplotlib.rc_context(figures.STYLE):
        figure, [panel] = figures.render(renamed, figures.CHARTS["curves"].panels(renamed)[-1:])
    assert panel.axes.get_window_extent().width > 0.4 * figure.bbox.width


def test_what_the_pointer_finds_lies_where_it_is_drawn(rendered):
    for figure, [panel] in rendered.values():
        points = list(panel.points())
        assert {point.label for point in points} <= {label for label, *_ in panel.values} and len(points) == len(panel.values)
        for point, (label, x, y) in zip(points, panel.values):
            assert point.label == label and 0 < point.x < 72 * figures.WIDTH and 0 < point.y < 72 * figures.HEIGHT
            in_pixels = panel.axes.transData.transform((x, y)) * 72 / figure.dpi
            assert np.allclose(in_pixels, (point.x, 72 * figures.HEIGHT - point.y))


def test_the_page_of_a_figure(found):
    """Its SVG is well-formed, its names are those of no other panel, its colours the page's; the points are JSON that ends nothing."""
    panels = figures.CHARTS["recall"].panels(found)
    with matplotlib.rc_context(figures.STYLE):
        image = figures.panel_image(found, panels[0])
    hostile = figures.Point("</script><b>", 0, "x", 1.0, 2.0)
    drawn = figures.ReportFigure("recall", "Recall", "Caption.", (figures.PanelImage(image.svg, (*image.points, hostile)),))
    text = html.page(found, [drawn], LINKS)
    svg = re.search(r"<svg.*?</svg>", text, flags=re.DOTALL)[0]
    names = [each.get("id") for each in xml.etree.ElementTree.fromstring(svg).iter() if each.get("id")]
    assert len(names) == len(set(names)) and all(name.startswith("recall-0-") for name in names)
    series = {int(name.split("-")[3]) for name in names if name.startswith("recall-0-series-")}
    assert series == set(range(COUNT))
    assert figures.INK not in svg and "var(--series-0)" in svg and "var(--grey)" in svg
    points = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])
    assert len(points) == COUNT + 1 and points[-1][0] == "</script><b>" and text.count("</script>") == 2
    assert all(f'href="#{name}"' in text and f'id="{name}"' in text for name in ("quality", "cost", "tests", "recall", "paper"))
    assert 'href="https://arxiv.org/abs/2312.00752">gu2023mamba</a>' in text and 'href="../mixer.py">mamba.py</a>' in text
    assert "prefers-color-scheme: dark" in text


def test_each_landmark_of_a_page_has_a_name_of_its_own():
    published = Path(__file__).parents[2] / "docs" / "results" / "tinystories_small" / "results.json"
    text = html.page(results.read(published), [], LINKS)
    names = re.findall(r'<(?:nav|div[^>]* role="region")[^>]* aria-label="([^"]*)"', text)
    assert len(names) == len(set(names)) > 5


@pytest.mark.parametrize(("wanted", "expected"), [
    ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
    ([0.9, 0.2, 0.21], [0.9, 0.155, 0.255]),
    ([0.0, 0.0], [0.05, 0.15]),
    ([1.0, 1.0], [0.85, 0.95]),
])  # fmt: skip
def test_apart(wanted, expected):
    assert labels.apart(wanted, 0.1, 0.05, 0.95) == pytest.approx(expected)


def test_apart_shares_a_room_that_is_too_small():
    heights = labels.apart([0.5] * 30, 0.1, 0.0, 1.0)
    assert min(heights) == 0.0 and max(heights) == pytest.approx(1.0) and np.ptp(np.diff(sorted(heights))) < 1e-9


def test_files_for_a_paper(found):
    files = latex.files(found)
    lines = files["table.tex"].splitlines()
    columns = len(re.search(r"\{tabular\}\{l(r+)\}", files["table.tex"])[1]) + 1
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == COUNT + 1 and {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert rows[1].startswith(r"mamba~\cite{gu2023mamba} & $1.0481 \pm 0.0504$")
    assert "gain over no mixer" not in files["table.tex"], "a column without figures"
    assert files["table.tex"].count("{") == files["table.tex"].count("}")
    table = list(csv.DictReader(io.StringIO(files["table.csv"])))
    best = found["mixers"]["mamba"]["quality"]["bits_per_byte"]
    assert [float(table[0][f"bits_per_byte{end}"]) for end in ("", "_low", "_high")] == [
        best[end] for end in ("mean", "low", "high")
    ]
    assert len(table) == COUNT and table[0]["mixer"] == "mamba"
    cited = set(re.findall(r"[\w]+", " ".join(re.findall(r"\\cite\{([^}]*)\}", files["methods.tex"] + files["table.tex"]))))
    entries = set(re.findall(r"^@\w+\{(\w+),", files["references.bib"], flags=re.MULTILINE))
    assert cited == entries and {"vaswani2017attention", "holm1979", "eldan2023tinystories"} <= cited
    assert "1,328,256" in files["methods.tex"] and "2,007,040 tokens" in files["methods.tex"]
    assert "[@holm1979]" in markdown.page(found, [], LINKS)


def test_names_are_shown_and_not_obeyed(found):
    """Labels are the user's own: mathematics to matplotlib, a formula to a table calculator."""
    hostile = "=a_$x$_b_$"
    rows = {hostile: found["mixers"]["mamba"]} | {label: found["mixers"][label] for label in ("gla", "attention")}
    with matplotlib.rc_context(figures.STYLE):
        _, [panel] = figures.render(found | {"mixers": rows}, figures.CHARTS["recall"].panels(found | {"mixers": rows}))
    [drawn] = [name for name in panel.names if name.get_text() == hostile]
    assert not drawn.get_parse_math()
    table = list(csv.DictReader(io.StringIO(latex.files(found | {"mixers": rows})["table.csv"])))
    assert f"'{hostile}" in {row["mixer"] for row in table}


def test_results_of_earlier_versions_are_read():
    old = json.loads((OLD_RESULTS / "compare_toy.json").read_text())
    read = results.read(OLD_RESULTS / "compare_toy.json")
    assert "Lowest mean of 3: mamba" in content.headline(read)
    assert "alike for all" not in content.headline(read), "what that version did not test is not said"
    assert "gain over no mixer" not in html.page(read, [], LINKS), "no empty column"
    assert all(old["mixers"][label].items() <= row.items() for label, row in read["mixers"].items())
    assert "</html>" in html.page(read, [], LINKS)


def test_every_mixer_names_its_paper():
    for name in mixers.names():
        reference = references.of_mixer(name)
        assert reference is not None and reference.url.startswith("https://arxiv.org/abs/"), name
        assert f"eprint = {{{reference.arxiv}}}" in reference.bibtex and reference.bibtex.count("{") == reference.bibtex.count(
            "}"
        )
    assert references.mixers_in("attention(window=64) mlp gla+mamba2 mlp gla no_such") == ["attention", "gla", "mamba2"]


def test_a_mixer_without_an_entry_is_cited_by_its_header(monkeypatch):
    monkeypatch.setattr(references, "references", dict)
    references.of_mixer.cache_clear()
    try:
        made = references.of_mixer("gla")
    finally:
        references.of_mixer.cache_clear()
    assert made.key == "gla_2312.06635" and "title = {Gated linear attention transformers" in made.bibtex


@pytest.mark.parametrize(("seconds", "written"), [(370, "370 s"), (3_720, "62 min"), (36_000, "10 h"), (400_000, "4.63 d")])
def test_times_have_a_unit_that_suits_them(seconds, written):
    unit, formatter = figures._time_unit(seconds)
    assert formatter(seconds / unit) == written


@pytest.mark.parametrize(("low", "high"), [(12.9, 27.3), (21.0, 24.0), (100.0, 370.0), (2e3, 1e6)])
def test_the_marks_of_a_logarithmic_axis_are_apart(low, high):
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.WIDTH, figures.HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([low, high], [1.25, 2.25])
        figures._logarithmic(axes.set_xscale, axes.xaxis, EngFormatter("s"))
        axes.set_ylabel("bits per byte")
        axes.margins(x=0.15)
        figure.draw_without_rendering()
        seen = [tick for tick in axes.xaxis.get_major_ticks() if axes.get_xlim()[0] <= tick.get_loc() <= axes.get_xlim()[1]]
        boxes = [tick.label1.get_window_extent() for tick in seen]
    assert 2 <= len(boxes) <= 8 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
