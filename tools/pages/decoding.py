"""Writes docs/decoding.md and docs/decoding.png from what --suite=decode measured.

    python scripts/benchmark.py --suite=decode --out=benchmarks/results/decode_cpu.json
    python -m tools.pages.decoding [--results=benchmarks/results/decode_cpu.json]

`make test` fails when the page is not what this would write.
"""

import argparse
import json
from pathlib import Path

from benchmarks.decode_report import draw
from seqmodels import command_line
from seqmodels.data import atomic
from seqmodels.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "decode_cpu.json"
PAGE = ROOT / "docs" / "decoding.md"
COMMAND = "python -m tools.pages.decoding"


def main() -> None:
    parser = command_line.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="what --suite=decode wrote")
    options = parser.parse_args()
    if not options.results.is_file():
        raise UserError(
            f"{options.results} does not exist; python scripts/benchmark.py --suite=decode --out={options.results} makes it"
        )
    results = json.loads(options.results.read_text())
    atomic.write_text(PAGE, page(results, options.results.name))
    draw(results, PAGE.with_suffix(".png"))
    print(f"wrote {PAGE.relative_to(ROOT)} and its picture")


def page(results: dict, source: str) -> str:
    """The page as it should be; ``source`` is the name of the results' file."""
    sizes, machine, host = (results[name] for name in ("sizes", "machine", "host"))
    rows = {(row["name"], row["batch_size"], row["context"]): row for row in results["rows"]}
    names, batch_sizes, contexts = (list(dict.fromkeys(key[axis] for key in rows)) for axis in range(3))
    alone, last = batch_sizes[0], contexts[-1]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in ("jax", "jaxlib"))
    lines = [
        "# What a decoded token costs",
        "",
        f"Made by `{COMMAND}` from `benchmarks/results/{source}`, which this command wrote on {results['date']} at commit "
        f"{results['commit']}, with {versions} on {machine['cores']} cores of {machine['processor']}:",
        "",
        "```",
        results["command"],
        "```",
        "",
        f"Width {sizes['d_model']}, {sizes['repeats']} repeats of each mixer's block (what replaces attention and an MLP in its "
        "paper), 4,096 tokens in the vocabulary, float32, random weights. A row is fed random tokens up to the context; then "
        f"{sizes['tokens']} tokens are decoded greedily by the loop that `scripts/generate.py` runs, and the fastest run counts. "
        "`attention_window` sees 256 tokens.",
        "",
        f"![time and state against context]({PAGE.with_suffix('.png').name})",
        "",
        *growth(rows, names, alone, contexts),
        "",
    ]
    for batch_size in batch_sizes:
        lines += [f"## Milliseconds per token, batch {batch_size}", ""]
        lines += table(
            ["mixer", *(f"at {context:,}" for context in contexts), f"at {last:,} / at {contexts[0]:,}"],
            [
                [
                    f"`{name}`",
                    *(cell(rows[name, batch_size, each], "seconds_per_step", lambda s: f"{1e3 * s:.2f}") for each in contexts),
                    ratio(rows, name, batch_size, contexts),
                ]
                for name in names
            ],
        )
    lines += [f"## Tokens per second after {contexts[0]:,} tokens, and reading", ""]
    lines += table(
        ["mixer", *(f"decoding, batch {size}" for size in batch_sizes), *(f"reading the last of {c:,}" for c in contexts)],
        [
            [
                f"`{name}`",
                *(cell(rows[name, size, contexts[0]], "tokens_per_second", "{:,.0f}".format) for size in batch_sizes),
                *(cell(rows[name, alone, each], "prefill_tokens_per_second", "{:,.0f}".format) for each in contexts),
            ]
            for name in names
        ],
    )
    lines += [f"## Bytes of state, batch {alone}, and programs compiled", "", *states(rows, batch_sizes), ""]
    lines += table(
        ["mixer", *(f"at {each:,}" for each in contexts), *(f"programs, batch {size}" for size in batch_sizes)],
        [
            [
                f"`{name}`",
                *(f"{rows[name, alone, each]['counted_state_bytes']:,}" for each in contexts),
                *(
                    f"{sum(row.get('compilations') or 0 for row in of)} for {sum('compilations' in row for row in of)} contexts"
                    for of in ([rows[name, size, each] for each in contexts] for size in batch_sizes)
                ),
            ]
            for name in names
        ],
    )
    lines += [
        "## The host",
        "",
        f"A token that is streamed by {host['pattern']} of width {host['width']} takes {1e3 * host['streamed_s']:.2f} ms, of "
        f"which the host needs {1e3 * host['dispatch_s']:.2f} until its call returns: {100 * host['share']:.1f} % (goal: under "
        "5 %).",
    ]
    return "\n".join(lines).rstrip() + "\n"


def growth(rows: dict, names: list[str], batch_size: int, contexts: list[int]) -> list[str]:
    """Who takes longer after a longer context: those whose state grows, and those whose state does not."""
    first, last = contexts[0], contexts[-1]
    groups = {"grows": {}, "has one size": {}}
    for name in names:
        ends = [rows[name, batch_size, context] for context in (first, last)]
        if all("seconds_per_step" in row for row in ends):
            one_size = ends[0]["counted_state_bytes"] == ends[1]["counted_state_bytes"]
            group = groups["has one size" if one_size else "grows"]
            group[name] = ends[1]["seconds_per_step"] / ends[0]["seconds_per_step"]
    lines = [f"A token after {last:,} tokens against one after {first:,}, batch {batch_size}:", ""]
    for which, ratios in groups.items():
        if ratios:
            ends = dict.fromkeys(f"{end(ratios.values()):.2f}" for end in (min, max))
            each = f"{' to '.join(ends)} times as long"
            lines.append(f"- where the state {which} ({', '.join(f'`{name}`' for name in ratios)}): {each}")
    return lines


def states(rows: dict, batch_sizes: list[int]) -> list[str]:
    measured = [row for row in rows.values() if "state_bytes" in row]
    equal = sum(row["state_bytes"] == row["counted_state_bytes"] for row in measured)
    left_out = len(rows) - len(measured)
    lines = [
        f"Counted over the shapes of `init_state`; of {len(measured)} states that were made, {equal} have just these bytes. "
        "The programs are those of the decoding loop: a state of one size needs one for each batch size, whatever the "
        "context; a cache of keys and values is another shape for each."
    ]
    return lines + ([f"{left_out} states were too large to be made here; their cells are empty."] if left_out else [])


def cell(row: dict, field: str, written) -> str:
    return written(row[field]) if field in row else ""


def ratio(rows: dict, name: str, batch_size: int, contexts: list[int]) -> str:
    ends = [rows[name, batch_size, context] for context in (contexts[-1], contexts[0])]
    if not all("seconds_per_step" in row for row in ends):
        return ""
    return f"{ends[0]['seconds_per_step'] / ends[1]['seconds_per_step']:.2f}"


def table(header: list[str], body: list[list[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]




if __name__ == "__main__":
    command_line.run(main)
