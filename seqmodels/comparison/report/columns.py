"""The columns of a report's main table: what each holds, from results.json alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from seqmodels.comparison import metric as metrics

EMPTY: Final = ""
ALL: Final = "all"  # in the column of diverged seeds: at every learning rate

QUALITY, COST = "quality", "cost"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the main table, which is shown in two parts: QUALITY and COST."""

    part: str
    name: str  # in table.csv
    title: str
    meaning: str
    text: Callable[[Mapping], str]
    key: Callable[[Mapping], float | str | None]  # the value; to sort by: None sorts last
    interval: Callable[[Mapping], tuple[float, float] | None] | None = None  # its 95 % interval, where there is one


def columns(results: Mapping) -> list[Column]:
    """Of the main table, in order."""
    qualities = _of_text() if metrics.of(results).is_text else _of_task()
    training = [
        Column(QUALITY, "learning_rate", "learning rate", "the best of those tried",
               lambda row: EMPTY if row["best_rate"] is None else f"{row['best_rate']:g}", lambda row: row["best_rate"]),
        Column(QUALITY, "diverged", "diverged", "seeds at the best rate whose loss was not finite; all: at every rate",
               lambda row: diverged(results, row), lambda row: len(row["diverged"])),
    ]  # fmt: skip
    return [*qualities, *training, *_costs(results)]


def _of_text() -> list[Column]:
    return [
        _quality("bits_per_byte", "bits per byte", "of the reported documents", 4),
        Column(QUALITY, "gain_bits_per_byte", "gain over no mixer", "bits per byte less than the same model of MLPs alone", _gain,
               lambda row: row["gain"] and row["gain"]["bits_per_byte"]),
        _quality("perplexity", "perplexity", "per token, of the same text", 3),
        _quality("position_1_loss", "loss at position 1", "nats after one token of context, where there is nothing to mix: what "
                 "mixers differ by there is not their mixing", 3),
        _quality("hit_loss", "loss, repeated bigrams", "nats per token where the same pair of tokens stood earlier in the same "
                 "story and window and is rare in training", 3),
        _quality("rest_loss", "loss, other tokens", "nats per token", 3),
    ]  # fmt: skip


def _of_task() -> list[Column]:
    return [
        _quality("accuracy", "accuracy", "top-1 accuracy of the labels, reported examples", 4),
        _quality("loss", "loss", "nats per label", 4),
    ]


def _costs(results: Mapping) -> list[Column]:
    seq_len = str(results["base"]["data"]["seq_len"])
    contexts = [str(context) for context in results["comparison"]["contexts"]]
    return [
        _cost("parameters", "parameters", "trained, a tied head counted once", "parameters"),
        _cost("mflops_per_token", "MFLOPs/token", "of the matrix products of a training step, counted", "flops_per_token",
              scale=1e-6, digits=2),
        _cost("state_bytes", "state bytes", f"of one sequence at {seq_len} tokens, counted", "state_bytes", seq_len),
        _cost("train_tokens_per_second", "train tokens/s", "of the median training step, measured alone after the runs",
              "train_tokens_per_second"),
        _cost("utilisation_percent", "utilisation %", "of the device's peak FLOP/s; empty where that is unknown",
              "flop_utilisation", scale=100.0, digits=1),
        _cost("step_mib", "step MiB", "memory the compiler allots to a training step: arguments, outputs, temporaries",
              "train_step_bytes", scale=1 / 2**20),
        *(
            _cost(f"ms_per_token_at_{context}", f"ms/token at {int(context):,}",
                  f"one decoded token of one sequence after {int(context):,} tokens", "decode_seconds", context, scale=1e3, digits=3)
            for context in contexts
        ),
    ]  # fmt: skip


def _quality(name: str, title: str, meaning: str, digits: int) -> Column:
    """A column of `quality`: the mean over the seeds, with its interval."""

    def estimate(row):
        found = row["quality"] and row["quality"].get(name)
        return found if found and found["mean"] is not None else None

    def interval(row):
        found = estimate(row)
        return None if found is None or None in (found["low"], found["high"]) else (found["low"], found["high"])

    def mean(row):
        return (estimate(row) or {"mean": None})["mean"]

    def text(row):
        ends = interval(row)
        return number(mean(row), digits) + ("" if ends is None else f" [{number(ends[0], digits)}, {number(ends[1], digits)}]")

    meaning += ": mean over the seeds and Student's 95 % interval"
    return Column(QUALITY, name, title, meaning, text, mean, interval)


def _cost(name: str, title: str, meaning: str, *path: str, scale: float = 1.0, digits: int = 0) -> Column:
    """A column of `cost`: the figure at a path of its keys."""

    def value(row):
        found = row["cost"]
        for key in path:
            found = None if found is None else found[key]
        return None if found is None else scale * found

    return Column(COST, name, title, meaning, lambda row: number(value(row), digits), value)


def _gain(row: Mapping) -> str:
    return EMPTY if row["gain"] is None or row["gain"]["bits_per_byte"] is None else f"{row['gain']['bits_per_byte']:+.4f}"


def diverged(results: Mapping, row: Mapping) -> str:
    """How many seeds diverged at the best rate; `ALL` where every rate did, and empty where that is not known yet."""
    if row["best_rate"] is None:
        tried = [each["diverged_at"] for each in row["rates"]]
        return ALL if len(tried) >= len(results["comparison"]["learning_rates"]) and all(tried) else EMPTY
    return str(len(row["diverged"])) if row["quality"] or row["diverged"] else EMPTY


def shown_columns(results: Mapping, part: str) -> list[Column]:
    """Those of a part that say something of some mixer."""
    rows = results["mixers"].values()
    return [column for column in columns(results) if column.part == part and any(column.text(row) for row in rows)]


def number(value: float | None, digits: int) -> str:
    return EMPTY if value is None else f"{value:,.{digits}f}"
