"""The report of a comparison: one HTML page, Markdown, figures, and what a paper takes; all from results.json."""

import os
from collections.abc import Mapping
from pathlib import Path

from seqmodels import mixers
from seqmodels.comparison.report import figures, html, latex, markdown
from seqmodels.data import atomic


def write(results: Mapping, folder: Path, *, is_final: bool = True) -> None:
    """report.html, report.md, table.tex, table.csv, methods.tex, references.bib and figures/, each file whole or not at all.

    Args:
        is_final: False while a comparison goes on: figures are PNGs alone, as SVGs and PDFs take most of the time.
    """
    drawn = figures.draw(results, folder, figures.SUFFIXES if is_final else ("png",))
    sources = Path(mixers.__file__).resolve().parent
    links = {name: Path(os.path.relpath(sources / f"{name}.py", folder.resolve())).as_posix() for name in mixers.names()}
    texts = latex.files(results) | {
        "report.md": markdown.page(results, drawn, links),
        "report.html": html.page(results, drawn, links),
    }
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
