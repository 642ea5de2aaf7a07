"""Writes docs/decoding.md and docs/decoding.png from what --suite=decode measured.

    python scripts/benchmark.py --suite=decode --out=benchmarks/results/decode_cpu.json
    python -m tools.pages.decoding [--results=benchmarks/results/decode_cpu.json]

`make test` fails when the page is not what this would write.
"""

import argparse
import json
from collections.abc import Callable, Iterable
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
    parser = command_line.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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


class Rows:
    """What was measured, by mixer, batch size and context."""

    def __init__(self, rows: list[dict]):
        self._rows = {(row["name"], row["batch_size"], row["context"]): row for row in rows}
        self.names, self.batch_sizes, self.contexts = (list(dict.fromkeys(key[axis] for key in self._rows)) for axis in range(3))

    def __iter__(self):
        return iter(self._rows.values())

    def at(self, name: str, batch_size: int, context: int) -> dict:
        return self._rows[name, batch_size, context]

    def over_contexts(self, name: str, batch_size: int) -> list[dict]:
        """From the shortest context to the longest."""
        return [self.at(name, batch_size, context) for context in self.contexts]

    def slowdown(self, name: str, batch_size: int) -> float | None:
        """How many times as long a token takes after the longest context as after the shortest; None: not measured."""
        first, *_, last = self.over_contexts(name, batch_size)
        both = "seconds_per_step" in first and "seconds_per_step" in last
        return last["seconds_per_step"] / first["seconds_per_step"] if both else None


def page(results: dict, source: str) -> str:
    """The page as it should be; ``source`` is the name of the results' file."""
    rows = Rows(results["rows"])
    lines = [
        *opening(results, source),
        *growth(rows),
        "",
        *(line for batch_size in rows.batch_sizes for line in milliseconds(rows, batch_size)),
        *throughput(rows),
        *states(rows),
        *the_host(results["host"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def opening(results: dict, source: str) -> list[str]:
    """What was measured, where and by which command."""
    sizes, machine = results["sizes"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in ("jax", "jaxlib"))
    return [
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
        *([results["note"], ""] if "note" in results else []),  # of the writer of the results, by hand
        f"![time and state against context]({PAGE.with_suffix('.png').name})",
        "",
    ]


def growth(rows: Rows) -> list[str]:
    """Who takes longer after a longer context: those whose state grows, and those whose state does not."""
    alone = rows.batch_sizes[0]
    groups = {"grows": {}, "has one size": {}}
    for name in rows.names:
        slowdown = rows.slowdown(name, alone)
        if slowdown is not None:
            first, *_, last = rows.over_contexts(name, alone)
            one_size = first["counted_state_bytes"] == last["counted_state_bytes"]
            groups["has one size" if one_size else "grows"][name] = slowdown
    lines = [f"A token after {rows.contexts[-1]:,} tokens against one after {rows.contexts[0]:,}, batch {alone}:", ""]
    for which, ratios in groups.items():
        if ratios:
            ends = dict.fromkeys(f"{end(ratios.values()):.2f}" for end in (min, max))
            each = f"{' to '.join(ends)} times as long"
            lines.append(f"- where the state {which} ({', '.join(f'`{name}`' for name in ratios)}): {each}")
    return lines


def milliseconds(rows: Rows, batch_size: int) -> list[str]:
    first, *_, last = rows.contexts

    def line(name):
        slowdown = rows.slowdown(name, batch_size)
        cells = [cell(row, "seconds_per_step", lambda s: f"{1e3 * s:.2f}") for row in rows.over_contexts(name, batch_size)]
        return [f"`{name}`", *cells, "" if slowdown is None else f"{slowdown:.2f}"]

    header = ["mixer", *(f"at {context:,}" for context in rows.contexts), f"at {last:,} / at {first:,}"]
    return [f"## Milliseconds per token, batch {batch_size}", "", *table(header, map(line, rows.names))]


def throughput(rows: Rows) -> list[str]:
    alone, first = rows.batch_sizes[0], rows.contexts[0]

    def line(name):
        decoding = (cell(rows.at(name, size, first), "tokens_per_second", "{:,.0f}".format) for size in rows.batch_sizes)
        reading = (cell(row, "prefill_tokens_per_second", "{:,.0f}".format) for row in rows.over_contexts(name, alone))
        return [f"`{name}`", *decoding, *reading]

    header = [
        "mixer",
        *(f"decoding, batch {size}" for size in rows.batch_sizes),
        *(f"reading the last of {context:,}" for context in rows.contexts),
    ]
    return [f"## Tokens per second after {first:,} tokens, and reading", "", *table(header, map(line, rows.names))]


def states(rows: Rows) -> list[str]:
    alone = rows.batch_sizes[0]
    measured = [row for row in rows if "state_bytes" in row]
    equal = sum(row["state_bytes"] == row["counted_state_bytes"] for row in measured)
    left_out = len(list(rows)) - len(measured)

    def line(name):
        compiled = [rows.over_contexts(name, size) for size in rows.batch_sizes]
        return [
            f"`{name}`",
            *(f"{row['counted_state_bytes']:,}" for row in rows.over_contexts(name, alone)),
            *(
                f"{sum(row.get('compilations') or 0 for row in of)} for {sum('compilations' in row for row in of)} contexts"
                for of in compiled
            ),
        ]

    header = [
        "mixer",
        *(f"at {context:,}" for context in rows.contexts),
        *(f"programs, batch {size}" for size in rows.batch_sizes),
    ]
    return [
        f"## Bytes of state, batch {alone}, and programs compiled",
        "",
        f"Counted over the shapes of `init_state`; of {len(measured)} states that were made, {equal} have just these bytes. "
        "The programs are those of the decoding loop: a state of one size needs one for each batch size, whatever the "
        "context; a cache of keys and values is another shape for each.",
        *([f"{left_out} states were too large to be made here; their cells are empty."] if left_out else []),
        "",
        *table(header, map(line, rows.names)),
    ]


def the_host(host: dict) -> list[str]:
    return [
        "## The host",
        "",
        f"A token that is streamed by {host['pattern']} of width {host['width']} takes {1e3 * host['streamed_s']:.2f} ms, of "
        f"which the host needs {1e3 * host['dispatch_s']:.2f} until its call returns: {100 * host['share']:.1f} % (goal: under "
        "5 %).",
    ]


def cell(row: dict, field: str, written: Callable[[float], str]) -> str:
    return written(row[field]) if field in row else ""


def table(header: list[str], body: Iterable[list[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


if __name__ == "__main__":
    command_line.run(main)
