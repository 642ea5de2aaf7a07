"""Pictures of runs: learning curves, and the loss by position in the window."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import escape
from seqmodels.evaluation.perplexity import Evaluation, by_context_length

SUFFIXES = (".png", ".svg", ".pdf")
LINES = ("-", "--", ":", "-.")  # of each ten runs
MOST_INSIDE = 6  # curves whose legend stands in the picture

Rows = Sequence[Mapping[str, float]]  # rows of a metrics.jsonl


def learning_curves(runs: Mapping[str, Rows], path: str | os.PathLike) -> None:
    """Training loss (thin) and validation loss (dots) of each run, against tokens and against seconds.

    Args:
        runs: a run's name to its rows of metrics.jsonl.
        path: the picture to write, of one of `SUFFIXES`.
    """
    figure = Figure(figsize=(11, max(4.2, 0.17 * len(runs))), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for axes, unit in ((by_tokens, "tokens"), (by_seconds, "seconds")):
        for index, (name, rows) in enumerate(runs.items()):
            for split, style in (("train", dict(lw=0.8, alpha=0.5)), ("validation", dict(marker="o", ms=4, lw=1.8))):
                chosen = [row for row in rows if row["split"] == split]
                label = escape(name, "figure") if split == "validation" else None
                axes.plot(
                    [row[unit] for row in chosen], [row["loss"] for row in chosen],
                    color=f"C{index % 10}", ls=LINES[index // 10 % len(LINES)], label=label, **style,
                )  # fmt: skip
        axes.set_xlabel(f"{unit} of training")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes)
    by_tokens.set_ylabel("loss (nats per token)")
    place = {} if len(runs) <= MOST_INSIDE else {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 7}
    (by_seconds if place else by_tokens).legend(
        *by_tokens.get_legend_handles_labels(), title="dots: validation, thin: training", frameon=False, **place
    )
    _write(figure, path)


def loss_by_position(runs: Mapping[str, Float[np.ndarray, " T"]], path: str | os.PathLike) -> None:
    """Each run's loss against how many tokens of context the model had, with means over powers of two.

    Args:
        runs: a run's name to its `Evaluation.loss_by_position`.
        path: as in `learning_curves`.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, losses) in enumerate(runs.items()):
        axes.plot(np.arange(1, len(losses) + 1), losses, color=f"C{index}", lw=0.8, alpha=0.4)
        means = by_context_length(losses)
        middles = [math.sqrt(first * last) for first, last in means]
        axes.plot(middles, means.values(), color=f"C{index}", label=escape(name, "figure"), lw=1.8, marker="o", ms=4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    _finish(axes)
    _write(figure, path)


def extrapolation(by_length: Mapping[int, Evaluation], trained_at: int, path: str | os.PathLike) -> None:
    """How a model fares at several lengths, and its loss by position at each; a line marks the length of its training.

    Args:
        by_length: tokens to what was scored there: accuracy, where targets are labels, or else loss.
        trained_at: tokens.
        path: as in `learning_curves`.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_lengths, over_positions = figure.subplots(1, 2)
    labelled = all(evaluation.accuracy is not None for evaluation in by_length.values())
    scores = [evaluation.accuracy if labelled else evaluation.loss for evaluation in by_length.values()]
    over_lengths.plot(list(by_length), scores, marker="o", ms=4, lw=1.8)
    over_lengths.set_xlabel("length (tokens)")
    over_lengths.set_ylabel("accuracy" if labelled else "validation loss (nats per token)")
    if labelled:
        over_lengths.set_ylim(-0.02, 1.02)
    for index, (length, evaluation) in enumerate(by_length.items()):
        means = by_context_length(evaluation.loss_by_position)
        middles = [math.sqrt(first * last) for first, last in means]
        over_positions.plot(middles, means.values(), color=f"C{index % 10}", label=f"{length}", lw=1.5, marker="o", ms=4)
    over_positions.set_xlabel("position (tokens)")
    over_positions.set_ylabel("loss (nats)")
    over_positions.legend(title="length", frameon=False)
    for axes in (over_lengths, over_positions):
        axes.axvline(trained_at, color="grey", lw=1.0, ls="--")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes)
    _write(figure, path)


def attention_weights(
    weights: Float[np.ndarray, "layers B H T T"] | Float[np.ndarray, "layers H T T"],
    path: str | os.PathLike,
    tokens: Sequence[str] | None = None,
) -> None:
    """One square per layer (down) and head (across): queries down, keys across, dark where a query looks.

    Args:
        weights: of one text, what `run.attention_weights` gives; of a batch, its part ``[:, index]``.
        path: as in `learning_curves`.
        tokens: the text's T pieces, to stand at the axes.

    Raises:
        ValueError: of a batch of several texts.
    """
    weights = np.asarray(weights)
    if weights.ndim == 5:
        if weights.shape[1] != 1:
            raise ValueError(f"weights of {weights.shape[1]} texts: choose one, weights[:, index]")
        weights = weights[:, 0]
    layers, heads, length, _ = weights.shape
    names = None if tokens is None else [escape(token, "figure") for token in tokens]
    figure = Figure(figsize=(2.4 * heads + 0.6, 2.4 * layers + 0.4), layout="constrained")
    for row, of_layer in enumerate(figure.subplots(layers, heads, squeeze=False)):
        for head, axes in enumerate(of_layer):
            axes.imshow(weights[row, head], cmap="Blues", vmin=0.0, vmax=1.0)
            axes.set_title(f"layer {row}, head {head}", fontsize=8)
            axes.tick_params(labelsize=6)
            if names is not None:
                axes.set_xticks(range(length), names, rotation=90)
                axes.set_yticks(range(length), names)
    _write(figure, path)


def sparkline(values: Float[np.ndarray, " N"], width: int = 64) -> str:
    """A row of at most `width` bars for the terminal; a longer series is averaged over neighbours, nans left out."""
    blocks = np.array_split(values, min(width, len(values)))
    means = np.array([np.mean(block[np.isfinite(block)]) for block in blocks if np.isfinite(block).any()])
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low) if high > low else np.zeros(len(means))
    return "".join("▁▂▃▄▅▆▇█"[round(height * 7)] for height in heights)


def check_suffix(flag: str, path: Path | None) -> None:
    """Raises UserError where a flag names a picture of a format that is not one of `SUFFIXES`."""
    if path is not None and path.suffix not in SUFFIXES:
        raise UserError(f"--{flag}={path} must end in {', '.join(SUFFIXES)}")


def _write(figure: Figure, path: str | os.PathLike) -> None:
    form = Path(path).suffix.removeprefix(".")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it draws a box instead
        atomic.write_whole(path, lambda file: figure.savefig(file, format=form, dpi=120))


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
