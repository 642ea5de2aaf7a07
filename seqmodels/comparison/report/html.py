"""The report as one HTML file that needs nothing else: its figures are SVGs inside it, its script and style too."""

import json
import re
from collections.abc import Mapping, Sequence

from seqmodels.comparison.report import columns, content, latex
from seqmodels.comparison.report.figures import COLOURS, GREY, INK, PanelImage, ReportFigure
from seqmodels.escape import escape

# The colours of figures on a dark background, contrast of 6 or more.
DARK = ("#6fb4f0", "#f0935e", "#4fc79a", "#e58cc0", "#b3a3f5", "#d9b64a", "#f28b92", "#a3cc7a")
DARK_GREY = "#8f959b"


def page(results: Mapping, drawn: Sequence[ReportFigure], links: Mapping[str, str]) -> str:
    """All of report.html.

    Args:
        links: address of each mixer's file, by the mixer's name.
    """
    sections = _sections(results, drawn, links)
    entries = "".join(f'<li><a href="#{name}">{_text(title)}</a></li>' for name, title, _ in sections)
    body = [
        f'<nav aria-label="Contents"><details><summary><h2>Contents</h2></summary><ol>{entries}</ol></details></nav>',
        f'<main><h1>Comparison</h1><p class="lead">{_text(content.headline(results))}</p>',
        _warnings(results["warnings"]),
        *(f'<section id="{name}"><h2>{_text(title)} <a class="anchor" href="#{name}" aria-label="Link to {_text(title)}">#</a></h2>'
          f"{inner}</section>" for name, title, inner in sections),
        "</main>",
    ]  # fmt: skip
    return TEMPLATE.replace("$STYLE", _style()).replace("$SCRIPT", SCRIPT).replace("$BODY", "\n".join(body))


def _sections(results: Mapping, drawn: Sequence[ReportFigure], links: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, title and HTML of each part of the page."""
    starts = [_table(*each, name) for each, name in zip(content.start_tables(results), ("Starts", "Starts beside results"))]
    rates = [_table(*each, "Learning rates") for each in content.rate_tables(results)]
    commands = "\n".join(_text(command) for _, command in content.commands(results))
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in content.circumstances(results))
    return [
        ("quality", "Quality", _sortable(results, columns.QUALITY, "results", links)),
        ("cost", "Cost", _sortable(results, columns.COST, "costs", {})),
        ("tests", "What the tests show", _paragraphs(content.paragraph_on_pairs(results)) + _matrix(results)),
        *((figure.name, figure.title, _figure(figure)) for figure in drawn),
        ("starts", "How the mixers start", _paragraphs(content.paragraph_on_starts(results)) + "".join(starts)),
        ("rate-search", "The search for the learning rates", _paragraphs(content.paragraph_on_rates(results)) + "".join(rates)),
        ("sizes", "Sizes", _table(*content.size_table(results), "Sizes")),
        ("circumstances", "Circumstances", f"<dl>{facts}</dl>"),
        ("paper", "For a paper", _for_a_paper(results)),
        ("commands", "Commands", "<p>Every run that is reported, from the folder of the repository.</p>"
         f'<pre tabindex="0" aria-label="Commands">{commands}</pre>'),
    ]  # fmt: skip


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    lines = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    title = f"{len(warnings)} warnings" if len(warnings) > 1 else "A warning"
    return f'<div class="warnings"><p><strong>{title}</strong></p><ul>{lines}</ul></div>'


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{_text(text)}</p>" for text in texts if text)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f'<th scope="col">{_text(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", name)


def _scroll(table: str, name: str) -> str:
    """On a screen that is too narrow the table moves sideways, by the keyboard too."""
    return f'<div class="scroll" role="region" aria-label="Table: {_text(name)}" tabindex="0">{table}</div>'


def _matrix(results: Mapping) -> str:
    """The matrix of pairs; a cell's title has the tests."""
    heads, rows = content.pair_matrix(results)
    by_pair = {(pair["better"], pair["worse"]): pair for pair in results["pairs"]}
    head = "".join(f'<th scope="col">{_text(each)}</th>' for each in heads)
    body = ""
    for better, *cells in rows:
        body += f'<tr><th scope="row">{_text(better)}</th>'
        for worse, cell in zip(heads[1:], cells):
            pair = by_pair[better, worse] if (better, worse) in by_pair else None
            shown = ' class="shown"' if pair is not None and pair["significant"] else ""
            title = "" if pair is None else f' title="{_text(content.describe_pair(pair))}"'
            body += f"<td{shown}{title}>{_text(cell)}</td>"
        body += "</tr>"
    table = f'<table class="matrix"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _scroll(table, "differences of pairs") if rows else ""


def _sortable(results: Mapping, part: str, name: str, links: Mapping[str, str]) -> str:
    """A part of the main table, sorted by a press on a head; below it what its columns mean."""
    heads, rows = content.main_table(results, part)
    shown = columns.shown_columns(results, part)
    head = "".join(
        f'<th scope="col"><button type="button" title="{_text(meaning)}">{_text(title)}</button></th>'
        for title, meaning in zip(heads, ["as in config.mixers", *(column.meaning for column in shown)])
    )
    head += '<th scope="col">paper, code</th>' if links else ""
    body = ""
    for (first, *cells), (label, row) in zip(rows, content.ranked(results)):
        keys = [column.key(row) for column in shown]
        body += f'<tr><th scope="row" data-key="{_text(label)}">{_text(first)}</th>'
        body += "".join(
            f'<td data-key="{_text("" if key is None else str(key))}">{_interval(cell)}</td>' for cell, key in zip(cells, keys)
        )
        body += f"<td>{_links(results, label, links)}</td>" if links else ""
        body += "</tr>"
    table = f'<table id="{name}" class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    meanings = "".join(f"<dt>{_text(column.title)}</dt><dd>{_text(column.meaning)}</dd>" for column in shown)
    return _scroll(table, part) + f"<details><summary>What these columns mean</summary><dl>{meanings}</dl></details>"


def _interval(cell: str) -> str:
    """The mean, and its interval in a line below."""
    mean, bracket, rest = cell.partition(" [")
    return _text(mean) + (f'<small class="interval">{_text(bracket.strip() + rest)}</small>' if bracket else "")


def _links(results: Mapping, label: str, links: Mapping[str, str]) -> str:
    papers = (f'<a href="{_text(each.url)}">{_text(each.key)}</a>' for each in content.papers(results, label))
    code = (f'<a href="{_text(links[name])}">{_text(name)}.py</a>' for name in content.mixers_of(results, label))
    return ", ".join([*papers, *code])


def _figure(figure: ReportFigure) -> str:
    panels = "".join(_panel(image, f"{figure.name}-{index}", figure.title) for index, image in enumerate(figure.panels))
    files = ", ".join(
        f'<a href="{figure.file.removesuffix("png")}{suffix}">{suffix.upper()}</a>' for suffix in ("png", "svg", "pdf")
    )
    return (
        f'<figure><div class="panels">{panels}</div><figcaption>{_text(figure.caption)} Beside this page: {files}.</figcaption>'
        "</figure>"
    )


def _panel(image: PanelImage, name: str, title: str) -> str:
    """An SVG within the page: its names are its own, its colours those of the page; and what the pointer finds in it."""
    svg = image.svg[image.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(title)}"', 1)
    svg = svg.replace(INK, "currentColor").replace(GREY, "var(--grey)")
    for index, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{index})")
    points = [[each.label, each.series, each.text, round(each.x, 1), round(each.y, 1)] for each in image.points]
    # "<" as JSON may write it: no text can end the element
    data = json.dumps(points, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<div class="panel" data-name="{name}">{svg}<script type="application/json">{data}</script></div>'


def _for_a_paper(results: Mapping) -> str:
    known = content.cited(results)
    text = ""
    for part in content.methods(results):
        if isinstance(part, tuple):
            links = (_citation(known[key].url, key) for key in part)
            text += f" [{'; '.join(links)}]"
        else:
            text += _text(part)
    sources = "".join(
        f'<details><summary>{name}</summary><pre tabindex="0" aria-label="{name}">{_text(source)}</pre></details>'
        for name, source in latex.files(results).items()
        if name != "table.csv"
    )
    return f"<p>{text}</p><p>Beside this page: table.csv with every figure in full, figures/*.pdf, and these files.</p>{sources}"


def _citation(url: str | None, key: str) -> str:
    return _text(key) if url is None else f'<a href="{_text(url)}">{_text(key)}</a>'


def _text(text: str) -> str:
    return escape(text, "html")


def _style() -> str:
    def variables(colours: Sequence[str], grey: str) -> str:
        return "".join(f"--series-{index}: {colour}; " for index, colour in enumerate(colours)) + f"--grey: {grey};"

    return STYLE.replace("$LIGHT", variables(COLOURS, GREY)).replace("$DARK", variables(DARK, DARK_GREY))


STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1b1b; --soft: #565b61; --line: #d7dade; --link: #0b57b0; --raised: #f4f6f8;
  --warn: #fff4d1; --warn-line: #b98900; --shown: #d8efd5; $LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --ink: #e6e8ea; --soft: #a9b0b7; --line: #3a4047; --link: #86b8ff; --raised: #1e2327; --warn: #33290c;
    --warn-line: #d9b64a; --shown: #1f4a2c; $DARK } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; } @media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: var(--back); }
a { color: var(--link); } h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; }
main { padding: 1rem; max-width: 80rem; margin: 0 auto; min-width: 0; } section { scroll-margin-top: 1rem; margin-top: 2.2rem; }
nav { padding: 1rem 1rem 0; max-width: 80rem; margin: 0 auto; } nav h2 { font-size: 1rem; margin: 0; display: inline; }
nav ol { margin: .3rem 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
nav a { display: inline-block; padding: .25rem 0; }
@media (min-width: 90rem) {
  body { display: grid; grid-template-columns: 15rem minmax(0, 80rem); justify-content: center; }
  nav { position: sticky; top: 0; align-self: start; margin: 0; } nav ol { flex-direction: column; } main { margin: 0; } }
.lead { font-size: 1.12rem; max-width: 60rem; } p, dl, figcaption { max-width: 60rem; }
.anchor { text-decoration: none; font-weight: 400; color: var(--soft); }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .1rem .9rem; max-width: 60rem; }
.warnings p { margin: .4rem 0; } .warnings ul { margin: .4rem 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; max-width: 100%;
  background: linear-gradient(to right, var(--back), transparent) 0 0 / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--back), transparent) 100% 0 / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--grey), transparent) 0 0 / .5rem 100% no-repeat,
    linear-gradient(to left, var(--grey), transparent) 100% 0 / .5rem 100% no-repeat; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; } tbody td { white-space: nowrap; } td:has(a) { white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); font-weight: 600; white-space: nowrap; }
th button { font: inherit; border: 0; background: none; padding: 0; cursor: pointer; color: var(--link); text-align: inherit; }
th[aria-sort] button::after { content: " \\2191"; } th[aria-sort="descending"] button::after { content: " \\2193"; }
.interval { display: block; color: var(--soft); font-size: .92em; }
.matrix { font-size: .75rem; } .matrix thead th { white-space: nowrap; }
.matrix thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .5rem .2rem; }
.matrix td { padding: .2rem .35rem; } .shown { background: var(--shown); font-weight: 600; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem; } .panel { flex: 1 1 20rem; max-width: 30rem; position: relative; min-width: 0; }
.panel svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
.panel.pointed [id*="-series-"] { opacity: .25; } .panel.pointed .at { opacity: 1; }
.said { position: absolute; pointer-events: none; background: var(--ink); color: var(--back); padding: .2rem .5rem; font-size: .8rem;
  border-radius: .25rem; max-width: 16rem; z-index: 2; }
.said strong { display: block; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .75rem; background: var(--raised); padding: .6rem; } summary { cursor: pointer; margin: .6rem 0; }
@media print { nav { display: none; } }
"""

SCRIPT = """
"use strict";
document.querySelector("nav details").open = matchMedia("(min-width: 50rem)").matches;  // on a narrow screen the result is first
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = Array.from(table.tBodies[0].rows);
      const key = row => row.cells[column].dataset.key;
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = Number.isNaN(Number(x)) || Number.isNaN(Number(y)) ? x.localeCompare(y) : Number(x) - Number(y);
        return descending ? -order : order;
      });
      rows.forEach(row => table.tBodies[0].appendChild(row));
    });
  });
}
const REACH = 24;  // of the pointer, in the SVG's units
for (const panel of document.querySelectorAll(".panel")) {
  const svg = panel.querySelector("svg");
  const points = JSON.parse(panel.querySelector("script").textContent);
  const said = document.createElement("div");
  said.className = "said";
  said.hidden = true;
  const name = said.appendChild(document.createElement("strong")), text = said.appendChild(document.createElement("span"));
  panel.appendChild(said);
  const leave = () => {
    said.hidden = true;
    panel.classList.remove("pointed");
    panel.querySelectorAll(".at").forEach(each => each.classList.remove("at"));
  };
  const point = event => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = null, least = REACH;
    for (const each of points) {
      const distance = Math.hypot(each[3] - place.x, each[4] - place.y);
      if (distance < least) [nearest, least] = [each, distance];
    }
    leave();
    if (nearest === null) return;
    panel.classList.add("pointed");
    panel.querySelectorAll(`[id^="${panel.dataset.name}-series-${nearest[1]}-"]`).forEach(each => each.classList.add("at"));
    name.textContent = nearest[0];
    text.textContent = nearest[2];
    said.hidden = false;
    const box = panel.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    said.style.left = `${Math.max(0, Math.min(x + 12, box.width - said.offsetWidth))}px`;
    said.style.top = `${y > said.offsetHeight + 16 ? y - said.offsetHeight - 12 : y + 20}px`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>Comparison</title>
<style>$STYLE</style>
</head>
<body>
$BODY
<script>$SCRIPT</script>
</body>
</html>
"""
