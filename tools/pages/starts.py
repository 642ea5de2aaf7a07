"""Writes docs/starts.md and docs/starts.png from what --suite=starts measured.

    python scripts/benchmark.py --suite=starts --source=PATH --out=benchmarks/results/starts.json
    python -m tools.pages.starts

`make test-tools` fails when the page is not what this would write.
"""

import collections
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from benchmarks.suites.starts import NO_MIXER, STARTS
from seqmodels import command_line, mixers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "starts.json"
PAGE = ROOT / "docs" / "starts.md"
MAIN = {"width": 64, "learning_rate": 0.008, "steps": 150, "repeats": 4}  # the setting with all mixers
FEWEST_RANKED = 5  # mixers, of which a rank correlation says something

INTRODUCTION = """\
# How models start, and what it does to a ranking

Made by `python -m tools.pages.starts` from `benchmarks/results/starts.json`, which holds each row's commit. The command, with
`--starts`, `--widths`, `--repeats`, `--rates`, `--steps` and `--seeds` for the other rows (`--help` says what they are):

```
{command}
```

A comparison is of architectures only if its models start alike. Until November 2026 the embedding started with deviation 0.02
and entered the residual stream unscaled, while layers added vectors of rms 0.02 to 0.5, depending on the mixer: the token
was lost in what they added. The order of losses was mostly the order in which mixers left the plateau that this made.
The starts compared here (`embedding_norm`: the embedding passes a norm before the first layer; `branch_rms`: the rms with which each
layer's output enters the stream; None: as the initial values have it):

| start | `model.embedding_norm` | `model.branch_rms` |
|---|---|---|
"""

OTHER_SETTINGS = """\
## Other settings

After few steps at a low rate some mixers end above the model without one. That model has MLPs alone, so it is smaller than the
others (139,520 parameters where attention's has 172,416, at width 64 with 2 repeats). A second MLP in the mixer's place,
`mlp(hidden=85) mlp`, is a control of their size. It ends at 4.070 nats after 200 steps instead of 4.079, and at 3.563 after 800
instead of 3.568. Linear attention is the farthest above this control after 200 steps, by 0.064 nats (0.030 bits per byte, standard
error 0.002 over five seeds); the other mixers are at most 0.03 nats above it. After 800 steps all are at least 0.10 nats below it.

Until December 2026 the LSTM stood alone in its layer, 1.22 times as wide as the stream, in place of attention and an MLP: in the
tables it is `alone=lstm(hidden_size=76)`, 156 and 312 at the larger widths. After 200 steps it was 0.18 nats (0.08 bits per byte)
above the control of its size. An LSTM of attention's size with an MLP after it, as in the sLSTM blocks of xLSTM, is 0.04 nats below
this control, and 0.07 to 0.27 nats below the wide LSTM in every table that has both. What the width does and what the MLP does was
not measured apart. Forget gates that start closed help the wide LSTM at first: with a bias of -3 in place of 1 (Jozefowicz et al.
2015) it is 0.05 nats above the control after 200 steps. After 800 steps a bias of 0 or -1 is 0.06 nats better than 1, and 0.10
worse than the LSTM with an MLP.

At width 256 and a learning rate of 0.008 DFW and GateLoop end above the model without a mixer; at 0.003 they end below it. Neither
norms what its heads read out, a product of queries, keys and values, and one step of AdamW changes the output of a wide projection
more than that of a narrow one. Both have such a norm as an option, `dfw(head_norm=True) mlp` and `gateloop(output_norm=True) mlp`:
with it the loss after one token is within the range of the other mixers, and DFW ends 0.02 nats above the model without a mixer
instead of 0.50, GateLoop 0.08 instead of 0.12. What keeps GateLoop above it at this rate is not known.
"""


def main() -> None:
    command_line.Parser(description=__doc__.splitlines()[0]).parse_args()
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results), encoding="utf-8")
    draw(results, PAGE.with_suffix(".png"))
    print(f"wrote {PAGE.relative_to(ROOT)} and its picture")


def rows_at(results: dict, **setting) -> dict[tuple[str, str], dict]:
    """(mixer, start) -> the means over its seeds of the rows with this setting, and how many those are."""
    found = collections.defaultdict(list)
    for row in results["rows"]:
        if all(row[name] == value for name, value in setting.items()):
            found[row["mixer"], row["start"]].append(row)
    means = ("loss", "position_1_loss", "token_share")
    return {
        key: {"seeds": len(rows)} | {name: np.mean([row[name] for row in rows], axis=0) for name in means}
        for key, rows in found.items()
    }


def page(results: dict) -> str:
    """The page as it should be."""
    lines = INTRODUCTION.format(command=results["command"]).splitlines()
    lines += [f"| {name} | {start['embedding_norm']} | {start['branch_rms']} |" for name, start in STARTS.items()]
    main = rows_at(results, **MAIN)
    lines += ["", "![validation loss of every mixer from two starts](starts.png)", ""]
    lines += ["## Every mixer", ""]
    lines += [
        f"Width {MAIN['width']}, {MAIN['repeats']} repeats, {MAIN['steps']} steps of 8 x 128 tokens of TinyStories, 1,024 tokens "
        f"in the vocabulary, learning rate {MAIN['learning_rate']:g}, one seed but where more are named. "
        "Repeats are of the pattern's layers. An empty cell was not measured. "
        "Validation loss in nats per token; in brackets the loss after one token of context, where there is nothing to mix; "
        "the token's share is the part of the "
        "untrained stream's variance that its embedding explains, after the first and the last layer.",
        "",
    ]
    lines += table(main)
    complete = [start for start in STARTS if all((name, start) in main for name, _ in main)]
    lines += ["", *conclusions(main, complete), "", OTHER_SETTINGS]
    others = {}
    for row in results["rows"]:
        setting = {name: row[name] for name in MAIN}
        if setting != MAIN:
            others[tuple(setting.values())] = setting
    for setting in sorted(others.values(), key=lambda setting: tuple(setting.values())):
        found = rows_at(results, **setting)
        lines += [
            f"## Width {setting['width']}, {setting['repeats']} repeats, {setting['steps']} steps, "
            f"learning rate {setting['learning_rate']:g}",
            "",
            *table(found),
            "",
            *conclusions(found, [start for start in STARTS if (NO_MIXER, start) in found]),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def table(rows: dict) -> list[str]:
    """Mixers in the order of their loss from the first start, one column a start."""
    starts = [start for start in STARTS if any(start == key[1] for key in rows)]
    names = list(dict.fromkeys(name for name, _ in rows))
    names.sort(key=lambda name: rows[name, starts[0]]["loss"] if (name, starts[0]) in rows else math.inf)
    lines = [
        "| mixer | " + " | ".join(starts) + " | " + " | ".join(f"token's share: {start}" for start in starts) + " |",
        "|---" * (1 + 2 * len(starts)) + "|",
    ]
    for name in names:
        found = [rows.get((name, start)) for start in starts]
        losses = ["" if row is None else f"{row['loss']:.3f} ({row['position_1_loss']:.3f})" for row in found]
        shares = ["" if row is None else f"{row['token_share'][0]:.2f} .. {row['token_share'][-1]:.2f}" for row in found]
        seeds = max(row["seeds"] for row in found if row is not None)
        lines.append("| " + " | ".join([name if seeds == 1 else f"{name}, {seeds} seeds", *losses, *shares]) + " |")
    return lines


def conclusions(rows: dict, starts: list[str]) -> list[str]:
    """What the rows of one setting say of each of these starts, from which the model without a mixer was trained as well."""
    lines = []
    for start in starts:
        found = {name: row for (name, its), row in rows.items() if its == start}
        of_mixers = {name: row for name, row in found.items() if name in mixers.names()}  # not those of a pattern
        control = found[NO_MIXER]["loss"]
        at_one = sorted(of_mixers, key=lambda name: of_mixers[name]["position_1_loss"])
        spread = of_mixers[at_one[-1]]["position_1_loss"] - of_mixers[at_one[0]]["position_1_loss"]
        better = sum(row["loss"] < control for row in of_mixers.values())
        above = {name: row["loss"] - control for name, row in of_mixers.items() if row["loss"] > control}
        worst = max(above, key=above.get, default=None)
        farthest = "" if worst is None else f" The one farthest above it is {worst}, by {above[worst]:.2f} nats."
        lines.append(
            f"- `{start}`: {better} of {len(of_mixers)} mixers end below the model without one ({control:.3f}).{farthest} "
            f"The loss after one token spreads over {spread:.2f} nats ({at_one[0]} to {at_one[-1]})."
            + (_of_the_share(of_mixers) if len(of_mixers) >= FEWEST_RANKED else "")
        )
    return lines


def _of_the_share(rows: dict[str, dict]) -> str:
    """Whether the mixers rank by the start alone."""
    order = scipy.stats.spearmanr(
        [row["token_share"][0] for row in rows.values()], [row["loss"] for row in rows.values()]
    ).statistic
    return f" Spearman's rank correlation of the token's share after the first layer with the loss is {order:.2f}."


def draw(results: dict, path: Path) -> None:
    """The losses of every mixer from the two starts that all were trained from."""
    rows = rows_at(results, **MAIN)
    names = sorted({name for name, _ in rows}, key=lambda name: -rows[name, "equal"]["loss"])
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(names) + 1.2), layout="constrained")
    places = range(len(names))
    before, after = ([rows[name, start]["loss"] for name in names] for start in ("unscaled", "equal"))
    axes.hlines(places, after, before, color="0.8", zorder=1)
    axes.scatter(before, places, marker="o", facecolors="white", edgecolors="C1", label="unscaled start (until November 2026)")
    axes.scatter(after, places, marker="o", color="C0", label="equal start")
    axes.axvline(rows[NO_MIXER, "equal"]["loss"], color="C0", linestyle=":", linewidth=1, label="no mixer, equal start")
    axes.set_yticks(places, [name.replace("_", " ") for name in names])
    axes.set_xlabel(f"validation loss after {MAIN['steps']} steps, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    command_line.run(main)
