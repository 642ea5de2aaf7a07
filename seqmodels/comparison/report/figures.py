"""The pictures of a comparison, each from results.json alone."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from seqmodels.comparison import measure as measures

DPI = 130
COLOURS = 10  # matplotlib's; beyond them lines have another style and points another shape
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
CROWD = 6  # rows whose names beside their points want more room


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A PNG and what it shows."""

    file: str
    title: str
    caption: str


def draw(results: Mapping, folder: Path) -> list[ReportFigure]:
    """Write every picture there are figures for."""
    drawn = []
    for name, (function, title, caption) in PICTURES.items():
        figure = function(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=DPI)
            drawn.append(ReportFigure(f"{name}.png", title, caption.format(better=measures.of(results).better)))
    return drawn


def _pareto(results: Mapping) -> Figure | None:
    """Quality against what it costs; the lower left corner is good, of accuracies the upper left one."""
    rows = _with(results, "quality", "cost")
    if not rows:
        return None
    seq_len = str(results["base"]["data"]["seq_len"])
    longest, measure = str(max(results["comparison"]["contexts"])), measures.of(results)
    panels = {
        f"state of one sequence at {seq_len} tokens": (lambda row: row["cost"]["state_bytes"][seq_len], "B"),
        "time to train, at the speed measured alone": (_training_seconds(results), "s"),
        f"one decoded token after {int(longest):,}": (lambda row: row["cost"]["decode_seconds"][longest], "s"),
    }
    figure, axes = _panels(len(panels), larger=len(rows) > CROWD, sharey=True)
    for panel, (title, (cost, unit)) in zip(axes, panels.items()):
        for label, row in rows.items():
            if cost(row) <= 0:
                continue  # no state at all has no place on a logarithmic axis
            found = row["quality"][measure.name]
            reach = None if found["low"] is None else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            panel.errorbar(
                [cost(row)], [found["mean"]], yerr=reach, fmt=_marker(results, label), ms=6, capsize=3, lw=1,
                color=_style(results, label)["color"],
            )  # fmt: skip
            panel.annotate(label, (cost(row), found["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
        _logarithmic(panel.set_xscale, panel.xaxis, EngFormatter(unit))
        panel.set_xlabel(title)
        panel.margins(x=0.25)
    axes[0].set_ylabel(measure.title)
    return figure


def _curves(results: Mapping) -> Figure | None:
    rows = {label: row for label, row in _with(results, "quality", "cost").items() if row["curves"]}
    if not rows:
        return None
    panels: dict[str, tuple[Callable, str]] = {
        "tokens of training": (lambda row: 1.0, ""),
        "FLOPs of training": (lambda row: row["cost"]["flops_per_token"], ""),
        "time, at the speed measured alone": (lambda row: 1.0 / row["cost"]["train_tokens_per_second"], "s"),
    }
    figure, axes = _panels(len(panels), sharey=True)
    measure = measures.of(results)
    for panel, (title, (per_token, unit)) in zip(axes, panels.items()):
        for label, row in rows.items():
            for curve in row["curves"]:
                first = curve is row["curves"][0]
                x = np.array(curve["tokens"]) * per_token(row)
                panel.plot(
                    x, curve[measure.curve], lw=1.4, marker="o", ms=3, alpha=0.8,
                    label=label if first else None, **_style(results, label),
                )  # fmt: skip
        panel.set_xlabel(title)
        panel.xaxis.set_major_formatter(EngFormatter(unit))
    axes[0].set_ylabel("validation loss (nats per token)" if measure.is_text else measure.title)
    return _with_legend(figure, axes[0])


def _by_position(results: Mapping) -> Figure | None:
    rows = _with_quality(results, "by_position")
    if not rows:
        return None
    figure, [axes] = _panels(1)
    for label, row in rows.items():
        middles = [math.sqrt(first * last) for first, last, _ in row["quality"]["by_position"]]
        losses = [loss for *_, loss in row["quality"]["by_position"]]
        axes.plot(middles, losses, lw=1.6, marker="o", ms=4, label=label, **_style(results, label))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("validation loss (nats per token)")
    return _with_legend(figure, axes)


def _recall(results: Mapping) -> Figure | None:
    rows = _with_quality(results, "hit_loss")
    rows = {label: row for label, row in rows.items() if row["quality"]["hit_loss"]["mean"] is not None}
    if not rows:
        return None
    figure, [axes] = _panels(1)
    for label, row in rows.items():
        x, y = row["quality"]["rest_loss"]["mean"], row["quality"]["hit_loss"]["mean"]
        axes.plot([x], [y], "o", ms=7, color=_style(results, label)["color"])
        axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("loss on all other tokens (nats)")
    axes.set_ylabel("loss on recall hits (nats)")
    axes.margins(x=0.2, y=0.15)
    return figure


def _by_segment(results: Mapping) -> Figure | None:
    """Accuracy against the length of the test's examples; where lengths come more than once, against the sizes in their order."""
    rows = _with_quality(results, "by_segment")
    if not rows:
        return None
    names, lengths, _ = zip(*next(iter(rows.values()))["quality"]["by_segment"])
    by_length = len(set(lengths)) == len(lengths)
    figure, [axes] = _panels(1)
    for label, row in rows.items():
        accuracies = [accuracy for *_, accuracy in row["quality"]["by_segment"]]
        axes.plot(
            lengths if by_length else range(len(names)), accuracies, lw=1.6, marker="o", ms=4, label=label,
            **_style(results, label),
        )  # fmt: skip
    if by_length:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(results["base"]["data"]["seq_len"], color="0.6", lw=1, ls=":")
        axes.set_xlabel("tokens of an example (dotted: data.seq_len of training)")
    else:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set_ylim(-0.02, 1.05)
    axes.set_ylabel("accuracy")
    return _with_legend(figure, axes)


def _contexts(results: Mapping) -> Figure | None:
    rows = _with(results, "cost")
    if not rows:
        return None
    figure, axes = _panels(2)
    for panel, (name, unit, title) in zip(
        axes, (("decode_seconds", "s", "one decoded token, batch 1"), ("state_bytes", "B", "state of one sequence"))
    ):
        for label, row in rows.items():
            by_context = row["cost"][name]
            panel.plot(
                [int(context) for context in by_context], list(by_context.values()), lw=1.6, marker="o", ms=4, label=label,
                **_style(results, label),
            )  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:g}")
        _logarithmic(panel.set_yscale, panel.yaxis, EngFormatter(unit))
        panel.set_xlabel("tokens of context")
        panel.set_title(title, fontsize=10)
    return _with_legend(figure, axes[0])


def _rates(results: Mapping) -> Figure | None:
    tried = {
        label: [each for each in row["rates"] if each["loss"] is not None] for label, row in results["mixers"].items()
    }
    measure = measures.of(results)
    if not any(tried.values()):
        return None
    figure, [axes] = _panels(1)
    for label, rates in tried.items():
        if rates:
            axes.plot(
                [each["rate"] for each in rates], [each[measure.curve] for each in rates], lw=1.6, marker="o", ms=4, label=label,
                **_style(results, label),
            )  # fmt: skip
    _logarithmic(axes.set_xscale, axes.xaxis, lambda rate, _: f"{rate:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{measure.curve} on the {measure.documents} that choose")
    return _with_legend(figure, axes)


PICTURES = {
    "pareto": (_pareto, "Quality against cost", "{better} and further left is better. Bars are 95 % intervals over seeds."),
    "curves": (_curves, "Training curves", "Validation during training, every seed; on train.eval_tokens."),
    "by_segment": (_by_segment, "Accuracy by length", "Means over the seeds, reported examples."),
    "by_position": (_by_position, "Loss by position", "What more context is worth: means over powers of two, reported documents."),
    "recall": (
        _recall,
        "Recall hits against the rest",
        "A hit is a token whose pair with the one before it stood earlier in the same story and window, and is rare in training.",
    ),
    "contexts": (_contexts, "Decoding against context", "A line that lies flat is a state of fixed size."),
    "rates": (_rates, "Learning rates", "The rate of each mixer was chosen here; a best rate at either end asks for a wider grid."),
}  # fmt: skip


def _with(results: Mapping, *parts: str) -> dict[str, Mapping]:
    return {label: row for label, row in results["mixers"].items() if all(row[part] is not None for part in parts)}


def _with_quality(results: Mapping, name: str) -> dict[str, Mapping]:
    return {label: row for label, row in _with(results, "quality").items() if name in row["quality"]}


def _training_seconds(results: Mapping) -> Callable[[Mapping], float]:
    base = results["base"]
    tokens = base["train"]["steps"] * base["data"]["batch_size"] * base["data"]["seq_len"]
    return lambda row: tokens / row["cost"]["train_tokens_per_second"]


def _style(results: Mapping, label: str) -> dict:
    index = list(results["mixers"]).index(label)
    return {"color": f"C{index % COLOURS}", "ls": STYLES[index // COLOURS % len(STYLES)]}


def _marker(results: Mapping, label: str) -> str:
    return MARKERS[list(results["mixers"]).index(label) // COLOURS % len(MARKERS)]


def _panels(count: int, *, larger: bool = False, **options) -> tuple[Figure, list[Axes]]:
    width, height = 6.4 if count == 1 else 4.6 * count, 4.4
    figure = Figure(figsize=(1.25 * width, 2.0 * height) if larger else (width, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _logarithmic(set_scale: Callable, axis, formatter) -> None:
    """A logarithmic axis; one that spans little has marks at 2 and 5 too, as less than a decade may hold no 1."""
    set_scale("log")
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
