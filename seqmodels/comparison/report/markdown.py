"""The report as Markdown; its figures are files beside it."""

from collections.abc import Mapping, Sequence

from seqmodels.comparison.report import columns, content
from seqmodels.comparison.report.figures import ReportFigure
from seqmodels.escape import code_block, escape


def page(results: Mapping, drawn: Sequence[ReportFigure], links: Mapping[str, str]) -> str:
    """All of report.md.

    Args:
        links: address of each mixer's file, by the mixer's name.
    """
    lines = ["# Comparison", "", _text(content.headline(results)), ""]
    lines += [f"- **Warning:** {_text(warning)}" for warning in results["warnings"]]
    lines += ["", *(f"- {name}: {_text(text)}" for name, text in content.circumstances(results)), ""]
    for title, part in (("Quality", columns.QUALITY), ("Cost", columns.COST)):
        lines += [f"## {title}", "", *table(*content.main_table(results, part)), ""]
        lines += [*(f"- {column.title}: {column.meaning}" for column in columns.shown_columns(results, part)), ""]
    lines += ["## What the tests show", "", *map(_text, content.paragraph_on_pairs(results)), ""]
    lines += table(*content.pair_matrix(results))
    for figure in drawn:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({figure.file})", "", figure.caption]
    lines += ["", "## How the mixers start", "", *map(_text, content.paragraph_on_starts(results)), ""]
    for each in content.start_tables(results):
        lines += [*table(*each), ""]
    lines += ["## The search for the learning rates", "", *map(_text, content.paragraph_on_rates(results)), ""]
    for each in content.rate_tables(results):
        lines += [*table(*each), ""]
    lines += ["## Sizes", "", *table(*content.size_table(results)), ""]
    lines += ["## Papers and code", "", *_papers(results, links), ""]
    lines += ["## For a paper", "", _methods(results), ""]
    lines += ["`table.tex`, `table.csv`, `methods.tex`, `references.bib` and `figures/*.pdf` beside this file have the same.", ""]
    lines += ["## Commands", "", "Every run that is reported, from the folder of the repository:", ""]
    lines += code_block([command for _, command in content.commands(results)])
    return "\n".join([*lines, ""])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose cells are text without markup."""

    def line(cells):
        return "| " + " | ".join(map(_text, cells)) + " |"

    return [line(heads), f"|{'---|' * len(heads)}", *map(line, rows)]


def _papers(results: Mapping, links: Mapping[str, str]) -> list[str]:
    lines = []
    for label in results["mixers"]:
        papers = [f"[{reference.key}]({reference.url})" for reference in content.papers(results, label)]
        code = [f"[{name}.py]({links[name]})" for name in content.mixers_of(results, label)]
        if papers or code:
            lines.append(f"- {_text(label)}: {', '.join([*papers, *code])}")
    return lines


def _methods(results: Mapping) -> str:
    """The paragraph, its citations as Pandoc writes them."""
    return "".join(
        " [" + "; ".join(f"@{key}" for key in part) + "]" if isinstance(part, tuple) else _text(part)
        for part in content.methods(results)
    )


def _text(text: str) -> str:
    return escape(text, "markdown")
