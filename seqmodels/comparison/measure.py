"""What mixers are ranked by in a report: bits per byte of text, or the accuracy on a synthetic task."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from seqmodels.data import TEXT


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of `quality` in results.json, and how to speak of it."""

    name: str
    title: str
    digits: int
    better: str  # Lower or Higher
    compared: str  # what the tests of a difference are of
    documents: str  # what the tests draw from
    is_text: bool


BITS_PER_BYTE: Final = Measure("bits_per_byte", "bits per byte", 4, "Lower", "mean losses in nats per token", "documents", True)
ACCURACY: Final = Measure("accuracy", "accuracy", 4, "Higher", "shares of wrong labels", "examples", False)


def of(results: Mapping) -> Measure:
    """The one that suits what was trained on."""
    return BITS_PER_BYTE if results["base"]["data"]["task"] == TEXT else ACCURACY
