"""Writes the index of published comparisons in docs/results.md, and the report of each, from docs/results/NAME/results.json.

    python -m tools.pages.comparisons [NAME ...]

Without names every report is written again. A comparison is published by a pull request that adds its results.json; `make test-tools`
fails when the index is not what this would write.
"""

from pathlib import Path

from seqmodels import command_line
from seqmodels.comparison import metric as metrics
from seqmodels.comparison import report, results
from seqmodels.comparison.report import content, markdown
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import escape
from tools.pages.mixers import ROOT, with_table

FOLDER = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN = "<!-- table: python -m tools.pages.comparisons -->"
HEADS = (
    "comparison", "data", "matched", "parameters", "tokens", "mixers", "seeds", "best mean", "pairs shown to differ", "device", "date",
    "commit", "command",
)  # fmt: skip


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="folders below docs/results; none: all")
    known = published()
    for name in parser.parse_args().names or known:
        if name not in known:
            raise UserError(f"there is no docs/results/{name}/results.json; there are {', '.join(known)}")
        report.write(known[name], FOLDER / name)
        print(f"wrote the report of docs/results/{name}")
    atomic.write_text(PAGE, with_table(PAGE, BEGIN, index(known)))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def published() -> dict[str, dict]:
    """The results of each comparison, by the name of its folder."""
    return {path.parent.name: results.read(path) for path in sorted(FOLDER.glob("*/results.json"))}


def index(known: dict[str, dict]) -> str:
    """A table with a row for each; the site sorts and filters it (docs/site.js)."""
    rows = [row(name, found) for name, found in known.items()]
    lines = markdown.table(HEADS, rows)
    for number, name in enumerate(known, start=2):  # what has markup
        lines[number] = lines[number].replace(f"| {escape(name, 'markdown')} |", f"| [{name}](results/{name}/report.md) |", 1)
        command = rows[number - 2][-1]
        lines[number] = lines[number].removesuffix(f" {escape(command, 'markdown')} |") + f" `{command}` |"
    return "\n".join(['<div class="comparisons" markdown>', "", *lines, "", "</div>"])


def row(name: str, found: dict) -> list[str]:
    """The cells of a comparison."""
    base, metric, about = found["base"], metrics.of(found), found["about"]
    labels = [label for label in found["mixers"] if label != found["control"]]
    best = next((each for each in content.ranked(found) if each[1]["quality"]), None)
    device = next((each["cost"]["device"] for each in found["mixers"].values() if each["cost"]), "")
    sizes = [each["cost"]["parameters"] for each in found["mixers"].values() if each["cost"]]
    pairs = [pair for pair in found["pairs"] if found["control"] not in (pair["better"], pair["worse"])]
    source = base["data"]["source"] if metric.is_text else base["data"]["task"]
    return [
        name, Path(str(source)).name or str(source), "nothing" if found["matched"] is None else found["matched"]["in_words"],
        f"{max(sizes):,}" if sizes else "",
        f"{base['train']['steps'] * base['data']['batch_size'] * base['data']['seq_len']:,}",
        str(len(labels)), str(found["comparison"]["seeds"]),
        "" if best is None else
        f"{best[0]}: {content.number(best[1]['quality'][metric.name]['mean'], metric.digits)} {metric.title}",
        f"{sum(pair['significant'] for pair in pairs)} of {len(pairs)}", device, about["date"].partition(" ")[0], about["commit"],
        about["command"],
    ]  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)
