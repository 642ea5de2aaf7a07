"""Writes docs/meshes.md from what --suite=meshes counted.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/benchmark.py --suite=meshes --out=benchmarks/results/meshes.json
    python -m tools.pages.meshes

`make test-tools` fails when the page is not what this would write.
"""

import json
from pathlib import Path

from benchmarks.suites.meshes import MESHES
from seqmodels import command_line
from seqmodels.data import atomic

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "meshes.json"
PAGE = ROOT / "docs" / "meshes.md"

LAWS = {"FLOPs": 1.1, "temporaries": 1.6}
"""The most, times what a device has with ``data`` alone; tests/training/test_mesh.py holds programs of another size to them."""

FIGURES = {
    "FLOPs": (lambda row: row["flops"], lambda value: f"{value / 1e6:,.1f} M"),
    "temporaries": (lambda row: row["temporary_bytes"], lambda value: f"{value / 1024:,.0f} KiB"),
    "sent": (lambda row: sum(row["collective_bytes"].values()), lambda value: f"{value / 1024:,.0f} KiB"),
}

INTRODUCTION = """\
# What a device of a mesh does

Made by `python -m tools.pages.meshes` from `benchmarks/results/meshes.json`, which holds each row's commit and which this command
writes, row by row (`--mixers` and `--meshes` choose):

```
XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/benchmark.py --suite=meshes --out=benchmarks/results/meshes.json
```

{commits}

One training step of one block (what replaces attention and an MLP in the mixer's paper), width {width}, {batch_size} rows of {seq_len}
tokens, float32, compiled for eight virtual devices of a CPU. FLOPs, bytes of temporaries and bytes that collectives result in are of
one device, read from XLA's program; a loop counts once. Nothing was run or timed. [Scaling](scaling.md) says what the meshes are.
"""
BEFORE = """\
## Before the residual stream was pinned

The same at commit {commit}, when nothing said where the residual stream lies; each figure over that of `data` today.
"""


def main() -> None:
    command_line.Parser(description=__doc__.splitlines()[0]).parse_args()
    atomic.write_text(PAGE, page(json.loads(RESULTS.read_text(encoding="utf-8"))))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def page(results: dict) -> str:
    """The page as it should be."""
    rows = {(row["mixer"], row["mesh"]): row for row in results["rows"]}
    before = {(row["mixer"], row["mesh"]): row for row in results["before"]}
    first = results["rows"][0]
    lines = INTRODUCTION.format(commits=commits(results["rows"]), **first).splitlines()
    lines += ["", "## Now", "", *table(rows, rows)]
    lines += ["", *BEFORE.format(commit=results["before"][0]["commit"]).splitlines(), "", *table(before, rows)]
    loops, gathered = (sum(bool(row[name]) for row in rows.values()) for name in ("in_loops", "rematerialisations"))
    lines += [
        "",
        "## Laws",
        "",
        f"Of the {len(rows)} programs of today {loops} have a collective in a loop, and of {gathered} XLA says that it gathered "
        f"an array whole for want of a better way. Every device has {whole(rows)} bytes of parameters whole: vectors, of `rwkv6` "
        "one for each head too. " + " ".join(most(rows, figure) for figure in LAWS),
    ]
    return "\n".join(lines) + "\n"


def commits(rows: list[dict]) -> str:
    """Of which commit the rows of which mixers are."""
    mixers_of = {}
    for row in rows:
        mixers_of.setdefault(row["commit"], {})[f"`{row['mixer']}`"] = None
    newest, *others = sorted(mixers_of, key=lambda commit: -len(mixers_of[commit]))
    older = "".join(f", those of {', '.join(mixers_of[commit])} at {commit}" for commit in others)
    return f"Rows were counted at commit {newest}{older}."


def most(rows: dict, figure: str) -> str:
    """Where a device has most of a figure beside what it has with ``data``, and all who have more than the law."""
    read, law = FIGURES[figure][0], LAWS[figure]
    times = {(mixer, mesh): read(row) / read(rows[mixer, "data"]) for (mixer, mesh), row in rows.items()}
    (mixer, mesh), largest = max(times.items(), key=lambda each: each[1])
    beyond = [f"`{mixer}` on `{mesh}`" for (mixer, mesh), value in times.items() if value > law]
    rest = f"Above {law}: {', '.join(beyond)}; [Scaling](scaling.md) says why." if beyond else f"None is above {law}."
    return f"The most {figure} are {largest:.2f} times those with `data`: `{mixer}` on `{mesh}`. {rest}"


def whole(rows: dict) -> str:
    found = sorted(row["whole_bytes"] for row in rows.values() if row["mesh"] != "one" and row["mesh"] != "data")
    return f"{found[0]:,} to {found[-1]:,}"


def table(rows: dict, today: dict) -> list[str]:
    """Every figure, and in brackets how many times that of ``data`` today it is."""
    meshes = [mesh for mesh in MESHES if mesh != "one"]
    lines = [f"| mixer | | {' | '.join(f'`{mesh}`' for mesh in meshes)} |", "|---|---|" + "---|" * len(meshes)]
    for mixer in dict.fromkeys(mixer for mixer, _ in rows):
        for figure, (read, written) in FIGURES.items():
            base = read(today[mixer, "data"])
            cells = [f"{written(read(rows[mixer, mesh]))} ({read(rows[mixer, mesh]) / base:.2f})" for mesh in meshes]
            lines.append(f"| `{mixer}` | {figure} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    command_line.run(main)
