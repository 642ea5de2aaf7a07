"""The metric that a report ranks mixers by: bits per byte of text, or the accuracy on a synthetic task."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from seqmodels.data import TEXT


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of `quality` in results.json, and its names in a report."""

    name: str
    summary: tuple[str, ...]  # figures of `quality` that compare.py's last line has
    curve: str  # what is drawn over training and learning rates
    title: str
    digits: int
    better: str  # Lower or Higher
    compared: str  # the quantity whose difference is tested
    documents: str  # the units that the tests resample
    is_text: bool


BITS_PER_BYTE: Final = Metric(
    "bits_per_byte", ("perplexity", "bits_per_byte"), "loss", "bits per byte", 4, "Lower", "mean losses in nats per token",
    "documents", True,
)  # fmt: skip
ACCURACY: Final = Metric(
    "accuracy", ("accuracy",), "accuracy", "accuracy", 4, "Higher", "shares of wrong labels", "examples", False
)  # fmt: skip


def of(results: Mapping) -> Metric:
    """The metric of what was trained on."""
    return BITS_PER_BYTE if results["base"]["data"]["task"] == TEXT else ACCURACY
