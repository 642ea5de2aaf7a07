"""What a paper takes of a comparison: table.tex, table.csv, methods.tex and references.bib."""

import csv
import io
from collections.abc import Mapping

from seqmodels.comparison import metric as metrics
from seqmodels.comparison.report import columns, content
from seqmodels.escape import escape

# Of the main table, those that a paper's table has.
COLUMNS = (
    "bits_per_byte", "gain_bits_per_byte", "perplexity", "hit_loss", "rest_loss", "accuracy", "loss", "learning_rate", "parameters",
    "state_bytes", "train_tokens_per_second",
)  # fmt: skip


def files(results: Mapping) -> dict[str, str]:
    """Name and text of each."""
    return {
        "table.tex": table(results), "table.csv": comma_separated(results), "methods.tex": methods(results),
        "references.bib": bibliography(results),
    }  # fmt: skip


def table(results: Mapping) -> str:
    """The main table with booktabs, the best first; what has an interval shows half of its width."""
    shown = [
        column
        for column in columns.columns(results)
        if column.name in COLUMNS and any(column.text(row) for row in results["mixers"].values())
    ]
    heads = ["mixer", *(escape(column.title, "latex") for column in shown)]
    rows = []
    for label, row in content.ranked(results):
        keys = [reference.key for reference in content.papers(results, label)]
        cite = f"~\\cite{{{','.join(keys)}}}" if keys else ""
        rows.append([escape(label, "latex") + cite, *(_cell(column, row) for column in shown)])
    metric = metrics.of(results)
    caption = escape(
        f"{metric.better} {metric.title} is better; ± is half of the 95 % interval over seeds. {content.headline(results)}",
        "latex",
    )
    return "\n".join([
        "% Made from results.json; needs \\usepackage{booktabs}, and references.bib for the citations.",
        "\\begin{table}",
        "\\centering",
        "\\small",
        f"\\begin{{tabular}}{{l{'r' * len(shown)}}}",
        "\\toprule",
        f"{' & '.join(heads)} \\\\",
        "\\midrule",
        *(f"{' & '.join(cells)} \\\\" for cells in rows),
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{caption}}}",
        "\\label{tab:comparison}",
        "\\end{table}",
        "",
    ])  # fmt: skip


def _cell(column: columns.Column, row: Mapping) -> str:
    ends = column.interval and column.interval(row)
    text = column.text(row)
    if not ends:
        return escape(text, "latex")
    mean = text.partition(" ")[0]
    digits = len(mean.partition(".")[2])
    return f"${mean} \\pm {columns.number((ends[1] - ends[0]) / 2, digits)}$".replace(",", "{,}")


def comma_separated(results: Mapping) -> str:
    """Every figure of the main table in full, with both ends of the intervals; empty where there is none."""
    shown = columns.columns(results)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = ["mixer", "pattern"]
    for column in shown:
        heads += [column.name, *((f"{column.name}_low", f"{column.name}_high") if column.interval else ())]
    writer.writerow(heads)
    for label, row in content.ranked(results):
        cells = [escape(label, "csv"), escape(row["sizes"]["pattern"], "csv")]
        for column in shown:
            cells.append(column.key(row))
            if column.interval:
                cells += column.interval(row) or (None, None)
        writer.writerow(["" if cell is None else cell for cell in cells])
    return file.getvalue()


def methods(results: Mapping) -> str:
    """A paragraph for the section on methods."""
    parts = (
        f"~\\cite{{{','.join(part)}}}" if isinstance(part, tuple) else escape(part, "latex") for part in content.methods(results)
    )
    return "".join(parts) + "\n"


def bibliography(results: Mapping) -> str:
    """An entry for everything that is cited."""
    return "\n\n".join(reference.bibtex for reference in content.cited(results).values()) + "\n"
