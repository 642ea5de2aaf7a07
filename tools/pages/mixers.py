"""Writes the tables of README.md and the page docs/mixers.md from what was measured and from the mixers' own files.

    python -m tools.pages.mixers [--results=benchmarks/results/tinystories_cpu.json]

`make test` fails when one of them is not what this would write. The results file was measured on 2026-11-26, one run for
each mixer; scripts/compare.py (configs/compare/tinystories_small.py) makes docs/tinystories_small.
"""

import argparse
import json
import re
from pathlib import Path

from seqmodels import command_line, mixers
from seqmodels.data import atomic
from seqmodels.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "tinystories_cpu.json"
COMPARISON = ROOT / "docs" / "tinystories_small" / "results.json"
BEGIN, END = "<!-- table: python -m tools.pages.mixers -->", "<!-- end of table -->"
BEGIN_COMPARISON = "<!-- table: docs/tinystories_small -->"

# Table 1 of arXiv 2312.06635: what the state is multiplied by. The names are those of seqmodels/mixers.
TABLE_1 = {
    "mamba": "exp(-(1ᵀα_t) ⊙ exp(A)), α_t = softplus(x_t W_1 W_2)",
    "mamba2": "γ_t 1ᵀ1, γ_t = exp(-softplus(x_t W_γ) exp(a))",
    "mlstm": "γ_t 1ᵀ1, γ_t = σ(x_t W_γ)",
    "gated_retention": "γ_t 1ᵀ1, γ_t = σ(x_t W_γ)^(1/τ)",
    "dfw": "α_tᵀ β_t, α_t = σ(x_t W_α), β_t = σ(x_t W_β)",
    "gateloop": "α_tᵀ 1, α_t = σ(x_t W_α1) exp(i x_t W_α2)",
    "hgrn2": "α_tᵀ 1, α_t = γ + (1 - γ) σ(x_t W_α)",
    "rwkv6": "α_tᵀ 1, α_t = exp(-exp(x_t W_α))",
    "gla": "α_tᵀ 1, α_t = σ(x_t W_α1 W_α2)^(1/τ)",
}


def main() -> None:
    parser = command_line.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="one run for each mixer")
    options = parser.parse_args()
    if not options.results.is_file():
        raise UserError(f"{options.results} does not exist")
    results = json.loads(options.results.read_text())
    for path, text in pages(results, json.loads(COMPARISON.read_text())).items():
        path.parent.mkdir(exist_ok=True)
        atomic.write_text(path, text)
        print(f"wrote {path.relative_to(ROOT)}")


def pages(results: dict, comparison: dict) -> dict[Path, str]:
    """Each file that holds a table, as it should be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, table in ((BEGIN, results_table(results)), (BEGIN_COMPARISON, comparison_table(comparison))):
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}"
    return {ROOT / "README.md": readme, ROOT / "docs" / "mixers.md": mixers_page(results)}


def comparison_table(results: dict) -> str:
    """The mixers of a comparison by bits per byte, best first, and last those that have not been run."""
    seq_len = str(results["base"]["data"]["seq_len"])
    lines = [
        "| mixer | bits per byte | perplexity | recall hits, nats | the rest, nats | learning rate | parameters "
        f"| state bytes at T = {seq_len} | training tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def rank(item):
        quality = item[1]["quality"]
        return quality["bits_per_byte"]["mean"] if quality else float("inf")

    for name, row in sorted(results["mixers"].items(), key=rank):
        quality, cost = row["quality"], row["cost"]
        figures = (("bits_per_byte", 3), ("perplexity", 2), ("hit_loss", 3), ("rest_loss", 3))
        cells = [
            f"`{name}`",
            *(f"{quality[part]['mean']:.{digits}f}" if quality else "" for part, digits in figures),
            f"{row['best_rate']:g}" if quality else "",
            f"{row['counted']:,.0f}",
            f"{cost['state_bytes'][seq_len]:,}" if cost else "",
            f"{cost['train_tokens_per_second']:,.0f}" if cost else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def results_table(results: dict) -> str:
    """The rows by bits per byte, best first."""
    lines = [
        "| mixer | layers | perplexity | bits per byte | parameters | state bytes at T = 256 | at 4,096 "
        "| training tokens/s | decoding tokens/s, batch 1 | batch 32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results["rows"].items(), key=lambda item: item[1]["bits_per_byte"]):
        layers = f"{row['repeats']} x [{', '.join(row['pattern'].split())}]"
        if len(layers) > 60:
            layers = f"{row['repeats'] * len(row['pattern'].split())}, configs/hybrid.py"
        cells = [
            f"`{name}`",
            layers,
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['parameters']:,}",
            *(f"{row['state_bytes'][context]:,}" for context in ("256", "4096")),
            *(
                f"{row[key]:,.0f}" if key in row else ""
                for key in (
                    "train_tokens_per_second",
                    "decode_tokens_per_second_batch_1",
                    "decode_tokens_per_second_batch_32",
                )
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mixers_page(results: dict) -> str:
    rows = results["rows"]
    lines = [
        "# The mixers",
        "",
        "Made by `python -m tools.pages.mixers` from the header of each file in `seqmodels/mixers/` and from "
        "`benchmarks/results/tinystories_cpu.json`; the figures are those of the README's table (TinyStories, the small setting).",
        "",
        "## What multiplies the state",
        "",
        "Table 1 of the GLA paper (arXiv 2312.06635) writes one recurrence for nine architectures, "
        "S_t = G_t ⊙ S_{t-1} + k_tᵀ v_t, "
        "and G_t is what tells them apart. What the table leaves out (scales, bonuses, normalisers, ties) is in each "
        "file's header, below.",
        "",
        "| model | G_t | file | state bytes at T = 256 | perplexity |",
        "|---|---|---|---|---|",
    ]
    for name, gate in TABLE_1.items():
        lines.append(f"| {name} | {gate} | {link(name)} | {state_bytes(rows, name)} | {perplexity(rows, name)} |")
    lines += ["", "State bytes are of one sequence through the whole model, counted from `init_state`.", ""]
    for name in mixers.names():
        title, equations, facts = header(name)
        lines += [f"## {name}", "", title, "", "```", *equations, "```", ""]
        lines += [f"- {fact}" for fact in facts]
        lines += [
            f"- File: {link(name)}. Layers of its config: `{mixers.pattern(name)}`. "
            f"State bytes at T = 256: {state_bytes(rows, name) or 'not measured'}; "
            f"perplexity: {perplexity(rows, name) or 'not measured'}.",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def link(name: str) -> str:
    return f"[`seqmodels/mixers/{name}.py`](../seqmodels/mixers/{name}.py)"


def state_bytes(rows: dict, name: str) -> str:
    return f"{rows[name]['state_bytes']['256']:,}" if name in rows else ""


def perplexity(rows: dict, name: str) -> str:
    return f"{rows[name]['perplexity']:.2f}" if name in rows else ""


def header(name: str) -> tuple[str, list[str], list[str]]:
    """Title, equations and facts (state, parameters, trap, deviations) of a mixer file's docstring.

    The equations are the first block of lines that are indented by four.
    """
    paragraphs = re.split(r"\n\s*\n", mixers.load(name).__doc__.strip())
    equations = next(each for each in paragraphs if each.startswith("    "))
    facts = [
        " ".join(each.split())
        for each in paragraphs
        if re.match(r"(State|Parameters|Numerical trap|Deviations from the paper)\b", each)
    ]
    return " ".join(paragraphs[0].split()), [line[4:] for line in equations.splitlines()], facts


if __name__ == "__main__":
    command_line.run(main)
