"""The figures of a report, each from results.json alone.

A figure has one or several panels. A file has them side by side, as PNG, SVG and PDF; the HTML page has each as an SVG of its own,
with the places of its points for the pointer. Few mixers are drawn in colours and named; where there are more, the rest is grey.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from seqmodels.comparison import metric as metrics
from seqmodels.comparison.report import labels
from seqmodels.comparison.report.content import is_scored, ranked
from seqmodels.data import atomic

FOLDER = "figures"
SUFFIXES = ("png", "svg", "pdf")
DPI = 160  # of PNGs
WIDTH, HEIGHT = 4.0, 3.3  # of a panel, inches: its text is legible on a screen as narrow as a phone's
INK, GREY = "#1b1b1b", "#8c8c8c"  # axes and text; mixers that are not named
# Of those that are named: legible on white (contrast of 4.5 or more). The page has other ones for a dark background.
COLOURS = ("#0b62a8", "#b3480b", "#087a55", "#a3327d", "#6a4fc4", "#7a5c00", "#c2242f", "#3f6b21")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "seqmodels", "pdf.fonttype": 42, "font.size": 9, "font.family": "DejaVu Sans",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a figure of a mixer lies in a panel's SVG, and what it says."""

    label: str
    series: int  # the mixer's number in results.json: its artists are those whose id begins with series-<number>-
    text: str
    x: float  # in the SVG's units, from its left
    y: float  # from its top


@dataclasses.dataclass(frozen=True)
class PanelImage:
    """A panel as the page shows it."""

    svg: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure that was drawn: its file without a suffix, below the report's folder, and what it shows."""

    name: str
    title: str
    caption: str
    panels: tuple[PanelImage, ...]

    @property
    def file(self) -> str:
        """Of the PNG."""
        return f"{FOLDER}/{self.name}.png"


def draw(results: Mapping, folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[ReportFigure]:
    """Write every figure that there is something for, into FOLDER below `folder`, in the formats of `suffixes`."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, chart in CHARTS.items():
            panels = chart.panels(results)
            if not panels:
                continue
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            figure, _ = render(results, panels)
            for suffix in suffixes:
                atomic.write_whole(folder / FOLDER / f"{name}.{suffix}", functools.partial(_save, figure, suffix=suffix))
            images = tuple(panel_image(results, panel) for panel in panels)
            caption = chart.caption.format(better=metrics.of(results).better)
            if len(results["mixers"]) > len(highlighted(results)):
                caption += " Named: the best, the first, and the model without a mixer; the others are grey."
            drawn.append(ReportFigure(name, chart.title, caption, images))
    return drawn


def draw_panel(results: Mapping, name: str, number: int, path: Path) -> None:
    """Write one panel of a figure alone, as a PNG of `WIDTH` x `HEIGHT` inches, which a narrow screen shows legibly."""
    with matplotlib.rc_context(STYLE):
        figure, _ = render(results, [CHARTS[name].panels(results)[number]])
        atomic.write_whole(path, functools.partial(_save, figure, suffix="png"))


def highlighted(results: Mapping) -> dict[str, int]:
    """The mixers that figures name, each with the number of its colour: all of them, or the best, the first and the control."""
    order = list(results["mixers"])
    if len(order) <= len(COLOURS):
        return {label: index for index, label in enumerate(order)}
    fixed = [order[0], *([results["control"]] if results["control"] is not None else [])]
    best = [label for label, row in ranked(results) if row["quality"] and label not in fixed]
    chosen = {*fixed, *best[: len(COLOURS) - len(fixed)]}
    return {label: index for index, label in enumerate(label for label in order if label in chosen)}


class Panel:
    """Axes with what is drawn into them: lines and points of mixers, and what the pointer and the names say of them."""

    def __init__(self, axes: Axes, results: Mapping):
        self.axes, self._colours = axes, highlighted(results)
        self._series = {label: index for index, label in enumerate(results["mixers"])}
        self.values: list[tuple[str, float, float]] = []  # of every point: label, x, y
        self._ends: dict[str, tuple[float, float]] = {}  # of lines, by label
        self._dots: list[tuple[str, float, float]] = []
        self.names: list = []  # the artists that name mixers
        axes.grid(alpha=0.13, color=INK)
        axes.spines[["top", "right"]].set_visible(False)

    def line(self, label: str, x: Sequence[float], y: Sequence[float]) -> None:
        """A mixer's figures along an axis; its name will stand at the end of the line."""
        named = label in self._colours
        self.axes.plot(
            x, y, lw=1.7 if named else 0.8, marker=self._marker(label), ms=3.5 if named else 2, color=self._colour(label),
            zorder=3 if named else 2, gid=self._id(label),
        )  # fmt: skip
        self.values += [(label, float(a), float(b)) for a, b in zip(x, y)]
        if len(x):
            self._ends[label] = (float(x[-1]), float(y[-1]))

    def point(self, label: str, x: float | None, y: float | None, interval: tuple[float, float] | None = None) -> None:
        """One figure of a mixer, with an interval of its height where the mixer is named."""
        if x is None or y is None:
            return  # of a mixer whose quality is not known
        named = label in self._colours
        if named and interval is not None:
            reach = [[y - interval[0]], [interval[1] - y]]
            self.axes.errorbar([x], [y], yerr=reach, fmt="none", lw=1, capsize=2, color=self._colour(label), alpha=0.6)
        self.axes.plot(
            [x], [y], self._marker(label), ms=6 if named else 4, color=self._colour(label), zorder=3 if named else 2,
            gid=self._id(label),
        )  # fmt: skip
        self.values.append((label, x, y))
        self._dots.append((label, x, y))

    def reserve(self) -> None:
        """Room for the names at the ends of lines, before the layout is made."""
        for label, (_, y) in self._ends.items():
            if label in self._colours:
                self.names.append(labels.at_the_side(self.axes, label, y, self._colour(label)))

    def write_names(self) -> None:
        """Where they belong, now that the layout is made."""
        ends = [end for label, end in self._ends.items() if label in self._colours]
        labels.spread(self.axes, self.names, ends)
        self.names += labels.beside_points(self.axes, self._dots, {label: self._colour(label) for label in self._colours}, GREY)

    def points(self) -> Iterator[Point]:
        """Every figure in the units of an SVG: points of 1/72 inch."""
        figure = self.axes.figure
        scale, height = 72 / figure.dpi, 72 * figure.get_figheight()
        say_x, say_y = (axis.get_major_formatter() for axis in (self.axes.xaxis, self.axes.yaxis))
        for label, x, y in self.values:
            place = self.axes.transData.transform((x, y)) * scale
            if np.isfinite(place).all():
                yield Point(
                    label, self._series[label], f"{_said(say_y, y, self.axes.get_ylabel() or self.axes.get_title())}; "
                    f"{_said(say_x, x, self.axes.get_xlabel())}", float(place[0]), float(height - place[1]),
                )  # fmt: skip

    def _colour(self, label: str) -> str:
        return COLOURS[self._colours[label]] if label in self._colours else GREY

    def _id(self, label: str) -> str:
        """One that no other artist of the panel has."""
        return f"series-{self._series[label]}-{len(self.values)}"

    def _marker(self, label: str) -> str:
        return MARKERS[self._colours[label]] if label in self._colours else "o"


Drawer = Callable[[Panel], None]


def render(results: Mapping, panels: Sequence[Drawer]) -> tuple[Figure, list[Panel]]:
    """A figure with the panels side by side, all names in their places."""
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    found = [Panel(axes, results) for axes in figure.subplots(1, len(panels), squeeze=False)[0]]
    for panel, drawer in zip(found, panels):
        drawer(panel)
        panel.reserve()
    figure.draw_without_rendering()  # makes the layout
    figure.set_layout_engine("none")  # which stays
    for panel in found:
        panel.write_names()
    return figure, found


def panel_image(results: Mapping, drawer: Drawer) -> PanelImage:
    """A panel alone, for the page; within matplotlib's STYLE."""
    figure, [panel] = render(results, [drawer])
    file = io.BytesIO()
    _save(figure, file, "svg", transparent=True)
    return PanelImage(file.getvalue().decode(), tuple(panel.points()))


def _save(figure: Figure, file, suffix: str, **options) -> None:
    """The same bytes for the same results: no date is written."""
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[suffix]
    figure.savefig(file, format=suffix, dpi=DPI if suffix == "png" else 72, metadata=undated, **options)


def _said(formatter, value: float, name: str) -> str:
    """A value as its axis would write it, with four digits."""
    if isinstance(formatter, EngFormatter):
        text = EngFormatter(formatter.unit, places=3 - int(math.floor(math.log10(abs(value)))) % 3)(value) if value else "0"
    else:
        text = formatter(value) if isinstance(formatter, FuncFormatter) else f"{value:.4g}"
    return f"{name} {text}"


# -- what is drawn


def _pareto(results: Mapping) -> list[Drawer]:
    """Quality against what it costs; the lower left corner is good, of accuracies the upper left one."""
    metric = metrics.of(results)
    rows = {label: row for label, row in _with_quality(results, metric.name).items() if row["cost"] is not None}
    if not rows:
        return []
    seq_len = str(results["base"]["data"]["seq_len"])
    longest = str(max(results["comparison"]["contexts"]))
    seconds = _training_seconds(results)
    unit, in_unit = _time_unit(max(seconds(row) for row in rows.values()))
    costs = {
        f"state of one sequence at {seq_len} tokens": (lambda row: row["cost"]["state_bytes"][seq_len], EngFormatter("B")),
        "time to train, at the speed measured alone": (lambda row: seconds(row) / unit, in_unit),
        f"one decoded token after {int(longest):,}": (lambda row: row["cost"]["decode_seconds"][longest], EngFormatter("s")),
    }

    def drawer(title: str, cost: Callable[[Mapping], float], formatter: Formatter) -> Drawer:
        def panel(into: Panel) -> None:
            for label, row in rows.items():
                if cost(row) <= 0:
                    continue  # no state at all has no place on a logarithmic axis
                found = row["quality"][metric.name]
                into.point(label, cost(row), found["mean"], None if found["low"] is None else (found["low"], found["high"]))
            _logarithmic(into.axes.set_xscale, into.axes.xaxis, formatter)
            into.axes.set_xlabel(title)
            into.axes.set_ylabel(metric.title)
            into.axes.margins(x=0.15, y=0.1)

        return panel

    return [drawer(title, *cost) for title, cost in costs.items()]


def _curves(results: Mapping) -> list[Drawer]:
    rows = {label: row for label, row in _with(results, "quality", "cost").items() if row["curves"]}
    if not rows:
        return []
    metric = metrics.of(results)
    unit, in_unit = _time_unit(max(map(_training_seconds(results), rows.values())))
    scales: dict[str, tuple[Callable, Formatter]] = {
        "tokens of training": (lambda row: 1.0, EngFormatter()),
        "FLOPs of training": (lambda row: row["cost"]["flops_per_token"], EngFormatter()),
        "time, at the speed measured alone": (lambda row: 1.0 / row["cost"]["train_tokens_per_second"] / unit, in_unit),
    }

    def drawer(title: str, per_token: Callable[[Mapping], float], formatter: Formatter) -> Drawer:
        def panel(into: Panel) -> None:
            for label, row in rows.items():
                for curve in reversed(row["curves"]):  # the first seed last: the name stands at its end
                    into.line(label, np.array(curve["tokens"]) * per_token(row), curve[metric.curve])
            into.axes.set_xlabel(title)
            into.axes.xaxis.set_major_formatter(formatter)
            into.axes.set_ylabel("validation loss, nats per token" if metric.is_text else metric.title)

        return panel

    return [drawer(title, *scale) for title, scale in scales.items()]


def _by_position(results: Mapping) -> list[Drawer]:
    rows = _with_quality(results, "by_position")

    def panel(into: Panel) -> None:
        for label, row in rows.items():
            middles = [math.sqrt(first * last) for first, last, _ in row["quality"]["by_position"]]
            into.line(label, middles, [loss for *_, loss in row["quality"]["by_position"]])
        into.axes.set_xscale("log", base=2)
        into.axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        into.axes.set_xlabel("tokens of context")
        into.axes.set_ylabel("validation loss, nats per token")

    return [panel] if rows else []


def _recall(results: Mapping) -> list[Drawer]:
    rows = _with_quality(results, "hit_loss")
    rows = {label: row for label, row in rows.items() if row["quality"]["hit_loss"]["mean"] is not None}

    def panel(into: Panel) -> None:
        for label, row in rows.items():
            into.point(label, row["quality"]["rest_loss"]["mean"], row["quality"]["hit_loss"]["mean"])
        into.axes.set_xlabel("loss on all other tokens, nats")
        into.axes.set_ylabel("loss on repeated bigrams, nats")
        into.axes.margins(x=0.15, y=0.12)

    return [panel] if rows else []


def _by_segment(results: Mapping) -> list[Drawer]:
    """Accuracy against the length of the test's examples; where lengths come more than once, against the sizes in their order."""
    rows = _with_quality(results, "by_segment")
    if not rows:
        return []
    names, lengths, _ = zip(*next(iter(rows.values()))["quality"]["by_segment"])
    by_length = len(set(lengths)) == len(lengths)

    def panel(into: Panel) -> None:
        axes = into.axes
        for label, row in rows.items():
            accuracies = [accuracy for *_, accuracy in row["quality"]["by_segment"]]
            into.line(label, lengths if by_length else range(len(names)), accuracies)
        if by_length:
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=40 if len(lengths) > 6 else 0)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.axvline(results["base"]["data"]["seq_len"], color=GREY, lw=1, ls=":")
            axes.set_xlabel("tokens of an example (dotted: data.seq_len)")
        else:
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axes.set_ylim(-0.02, 1.05)
        axes.set_ylabel("accuracy")

    return [panel]


def _contexts(results: Mapping) -> list[Drawer]:
    rows = _with(results, "cost")

    def drawer(name: str, unit: str, title: str) -> Drawer:
        def panel(into: Panel) -> None:
            for label, row in rows.items():
                by_context = {int(context): value for context, value in row["cost"][name].items() if value > 0}
                into.line(label, list(by_context), list(by_context.values()))
            into.axes.set_xscale("log", base=2)
            into.axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
            _logarithmic(into.axes.set_yscale, into.axes.yaxis, EngFormatter(unit))
            into.axes.set_xlabel("tokens of context")
            into.axes.set_title(title, fontsize=9)

        return panel

    panels = [drawer("decode_seconds", "s", "one decoded token, batch 1"), drawer("state_bytes", "B", "state of one sequence")]
    return panels if rows else []


def _rates(results: Mapping) -> list[Drawer]:
    metric = metrics.of(results)
    tried = {label: [each for each in row["rates"] if each["loss"] is not None] for label, row in results["mixers"].items()}
    tried = {label: sorted(rates, key=lambda each: each["rate"]) for label, rates in tried.items() if rates}

    def panel(into: Panel) -> None:
        for label, rates in tried.items():
            into.line(label, [each["rate"] for each in rates], [each[metric.curve] for each in rates])
        _logarithmic(into.axes.set_xscale, into.axes.xaxis, FuncFormatter(lambda rate, _: f"{rate:g}"))
        into.axes.set_xlabel("learning rate")
        into.axes.set_ylabel(f"{metric.curve} on the {metric.documents} that choose")

    return [panel] if tried else []


@dataclasses.dataclass(frozen=True)
class Chart:
    """A kind of figure: its panels, none where results have nothing for it."""

    panels: Callable[[Mapping], list[Drawer]]
    title: str
    caption: str


CHARTS = {
    "pareto": Chart(_pareto, "Quality against cost", "{better} and further left is better. Bars are 95 % intervals over seeds."),
    "curves": Chart(_curves, "Training curves", "Validation during training, every seed; on train.eval_tokens."),
    "by_segment": Chart(_by_segment, "Accuracy by length", "Means over the seeds, reported examples."),
    "by_position": Chart(
        _by_position, "Loss by position", "What more context is worth: means over powers of two, reported documents."
    ),
    "recall": Chart(
        _recall,
        "Repeated bigrams against other tokens",
        "A bigram repeats where it stood earlier in the same story and window and is rare in training.",
    ),
    "contexts": Chart(_contexts, "Decoding against context", "A line that lies flat is a state of fixed size."),
    "rates": Chart(
        _rates,
        "Learning rates",
        "The rate of each mixer was chosen here; a best rate at either end asks for a wider grid.",
    ),
}


def _with(results: Mapping, *parts: str) -> dict[str, Mapping]:
    return {label: row for label, row in results["mixers"].items() if all(row[part] is not None for part in parts)}


def _with_quality(results: Mapping, name: str) -> dict[str, Mapping]:
    """Of those with figures of what is reported on, whose `quality` has this name."""
    scored = {label: row for label, row in _with(results, "quality").items() if is_scored(row, metrics.of(results))}
    return {label: row for label, row in scored.items() if name in row["quality"]}


def _training_seconds(results: Mapping) -> Callable[[Mapping], float]:
    base = results["base"]
    tokens = base["train"]["steps"] * base["data"]["batch_size"] * base["data"]["seq_len"]
    return lambda row: tokens / row["cost"]["train_tokens_per_second"]


def _time_unit(longest: float) -> tuple[float, Formatter]:
    """The unit, in seconds, that suits times of up to ``longest`` seconds, and how an axis in that unit writes its values."""
    for seconds, name, least in ((86_400, "d", 3 * 86_400), (3_600, "h", 5 * 3_600), (60, "min", 600)):
        if longest >= least:
            return seconds, FuncFormatter(lambda time, _, name=name: f"{time:,.4g} {name}")
    return 1, EngFormatter("s")


class _Marks(LogLocator):
    """Of a logarithmic axis. Where fewer than two are seen, matplotlib takes linear ones, so many that their names overlap."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        found = super().tick_values(vmin, vmax)
        mantissas = found / 10.0 ** np.floor(np.log10(np.maximum(found, 1e-300)))
        are_round = np.isclose(mantissas[:, None], [1.0, 2.0, 5.0, 10.0]).any(axis=1)
        return found if are_round.all() else MaxNLocator(4).tick_values(vmin, vmax)


def _logarithmic(set_scale: Callable, axis, formatter) -> None:
    """A logarithmic axis; one that spans little has marks at 2 and 5 too, as less than a decade may hold no 1."""
    set_scale("log")
    low, high = axis.get_data_interval()
    axis.set_major_locator(_Marks(subs=(1.0, 2.0, 5.0) if high < 50 * low else (1.0,), numticks=8))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())
