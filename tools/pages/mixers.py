"""Writes docs/mixers.md from the mixers' own files, and the list, table and picture of README.md and the table in docs/results.md.

    python -m tools.pages.mixers

`make test-tools` fails when one of them is not what this would write. The results are those of scripts/compare.py with
configs/compare/tinystories_small.py.
"""

import json
import re
from pathlib import Path

import jax

from configs import tinystories
from seqmodels import command_line, mixers, model, references
from seqmodels.comparison.report import content, figures
from seqmodels.config import from_config_dict
from seqmodels.data import atomic

ROOT = Path(__file__).resolve().parents[2]

COMPARISON = ROOT / "docs" / "results" / "tinystories_small" / "results.json"
PICTURE = ROOT / "docs" / "quality_by_state.png"  # of README.md
BEGIN, END = "<!-- table: python -m tools.pages.mixers -->", "<!-- end of table -->"
BEGIN_SHORT = "<!-- short table: python -m tools.pages.mixers -->"
VOCAB_SIZE, SEQ_LEN = 4096, 256  # of configs/tinystories.py
GATE = "Table 1 of arXiv 2312.06635: "  # how a line of a mixer's header begins that says what multiplies its state


def main() -> None:
    command_line.Parser(description=__doc__.splitlines()[0]).parse_args()
    comparison = json.loads(COMPARISON.read_text())
    for path, text in pages(comparison).items():
        atomic.write_text(path, text)
        print(f"wrote {path.relative_to(ROOT)}")
    figures.draw_panel(comparison, "pareto", 0, PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


def pages(comparison: dict) -> dict[Path, str]:
    """Each file that holds a table, as it should be."""
    return {
        ROOT / "README.md": _with_table(
            with_table(ROOT / "README.md", BEGIN, mixers_list()), BEGIN_SHORT, short_table(comparison)
        ),
        ROOT / "docs" / "results.md": with_table(ROOT / "docs" / "results.md", BEGIN, comparison_table(comparison)),
        ROOT / "docs" / "mixers.md": mixers_page(),
    }


def with_table(path: Path, begin: str, table: str) -> str:
    """The text of a file with ``table`` between the line ``begin`` and the next END."""
    return _with_table(path.read_text(encoding="utf-8"), begin, table)


def _with_table(text: str, begin: str, table: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}"


def mixers_list() -> str:
    """The mixers, each a link to its paper."""
    return ", ".join(f"[{name}]({references.of_mixer(name).url})" for name in mixers.names()) + "."


def short_table(results: dict) -> str:
    """The mixers of a comparison that have been run, by bits per byte, best first, in two columns; the control is the last."""
    seq_len = str(results["base"]["data"]["seq_len"])
    cells = []
    for name, row in content.ranked(results):
        if not row["quality"]:
            continue
        gain = f"{row['gain']['bits_per_byte']:.3f}" if row["gain"] else ""
        state = f"{row['cost']['state_bytes'][seq_len]:,}" if row["cost"] else ""
        cells.append(f"| `{name}` | {row['quality']['bits_per_byte']['mean']:.3f} | {gain} | {state} |")
    half = -(-len(cells) // 2)
    cells += ["| " * 4 + "|"] * (2 * half - len(cells))
    heads = f"| mixer | bits per byte | gain over `{results['control']}` | state bytes at T = {seq_len} |"
    lines = [heads + heads[1:], "|" + "---|" * 8, *(left + right[1:] for left, right in zip(cells[:half], cells[half:]))]
    return "\n".join(lines)


def comparison_table(results: dict) -> str:
    """The mixers of a comparison by bits per byte, best first, and last those that have not been run and the control."""
    seq_len = str(results["base"]["data"]["seq_len"])
    controlled = "control" in results  # older results have none
    extra = ["gain over no mixer", "loss at position 1, nats"] if controlled else []
    heads = [
        "mixer", "bits per byte", *extra, "perplexity", "repeated bigrams, nats", "other tokens, nats", "learning rate", "parameters",
        f"state bytes at T = {seq_len}", "training tokens/s",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def rank(item):
        name, row = item
        return controlled and name == results["control"], row["quality"]["bits_per_byte"]["mean"] if row["quality"] else float(
            "inf"
        )

    def extras(row):
        if not controlled:
            return []
        gain = f"{row['gain']['bits_per_byte']:+.3f}" if row["gain"] else ""
        return [gain, f"{row['quality']['position_1_loss']['mean']:.2f}" if row["quality"] else ""]

    for name, row in sorted(results["mixers"].items(), key=rank):
        quality, cost = row["quality"], row["cost"]
        digits = {"bits_per_byte": 3, "perplexity": 2, "hit_loss": 3, "rest_loss": 3}
        bits_per_byte, *figures = [f"{quality[part]['mean']:.{digits[part]}f}" if quality else "" for part in digits]
        cells = [
            f"`{name}`",
            bits_per_byte,
            *extras(row),
            *figures,
            f"{row['best_rate']:g}" if quality else "",
            f"{row['counted']:,.0f}",
            f"{cost['state_bytes'][seq_len]:,}" if cost else "",
            f"{cost['train_tokens_per_second']:,.0f}" if cost else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mixers_page() -> str:
    """The page: what multiplies the state in each mixer that says it, and each mixer's header."""
    lines = [
        "# The mixers",
        "",
        "Made by `python -m tools.pages.mixers` from the header of each file in `seqmodels/mixers/`. The BibTeX entries are those of",
        "[`seqmodels/references.bib`](../seqmodels/references.bib); [`CITATION.cff`](../CITATION.cff) cites this project.",
        "",
        "## What multiplies the state",
        "",
        "Table 1 of the GLA paper ([arXiv 2312.06635](https://arxiv.org/abs/2312.06635)) writes one recurrence for nine "
        "architectures, S_t = G_t ⊙ S_{t-1} + k_tᵀ v_t, "
        "and G_t is what tells them apart. What the table leaves out (scales, bonuses, normalisers, ties) is in each "
        "file's header, below.",
        "",
        "| model | G_t | file | state bytes |",
        "|---|---|---|---|",
    ]
    for name in mixers.names():
        gate = next((line for line in mixers.load(name).__doc__.splitlines() if line.startswith(GATE)), None)
        if gate is not None:
            lines.append(f"| {name} | {gate.removeprefix(GATE).removeprefix('G_t = ')} | {link(name)} | {state_bytes(name):,} |")
    lines += [
        "",
        f"State bytes are of one sequence of {SEQ_LEN} tokens through the whole model of `configs/tinystories.py:<name>`, counted "
        "from `init_state`.",
        "",
    ]
    for name in mixers.names():
        title, equations, facts = header(name)
        lines += [f"## {name}", "", title, "", "```", *equations, "```", ""]
        lines += [f"- {fact}" for fact in facts]
        lines += [
            f"- Paper: <{references.of_mixer(name).url}>. File: {link(name)}. Layers of its config: `{mixers.pattern(name)}`; "
            f"state bytes: {state_bytes(name):,}.",
            "",
            "```bibtex",
            references.of_mixer(name).bibtex,
            "```",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def link(name: str) -> str:
    """To the mixer's file."""
    return f"[`seqmodels/mixers/{name}.py`](../seqmodels/mixers/{name}.py)"


def state_bytes(name: str) -> int:
    """Of one sequence of SEQ_LEN tokens, through the model of the mixer's config."""
    config = from_config_dict(tinystories.get_config(name)).model
    params = model.param_shapes(config, VOCAB_SIZE)
    graphdef = model.graphdef(config, VOCAB_SIZE)
    state = jax.eval_shape(lambda params: model.merge(graphdef, params).init_state(1, SEQ_LEN), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


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
