"""The rows of a metrics.jsonl: a JSON object a line, of numbers that a run writes of one step and split."""

from typing import Any, Final

from seqmodels.errors import UserError
from seqmodels.formats import json_text

SPLITS: Final = ("train", "validation")
ALWAYS: Final = ("loss", "tokens", "seconds")
"""Numbers that every row has beside its step; the loss is null where it was not finite."""
MOST_STEPS: Final = 2**31 - 1


def row(line: str) -> dict[str, Any] | None:
    """The row in a line; None where it holds none: cut off, damaged, or of values that no run writes.

    Whoever takes a row may rely on a ``step``, a ``split``, the numbers that a row always has, and on all that is beside them
    being numbers, null, or numbers by name.
    """
    try:
        found = json_text.parse(line, "a row")
    except UserError:
        return None
    if not isinstance(found, dict) or found.get("split") not in SPLITS:
        return None
    if type(found.get("step")) is not int or not 0 <= found["step"] <= MOST_STEPS:
        return None
    numbers = {name: value for name, value in found.items() if name != "split"}
    whole = all(name in found for name in ALWAYS) and None not in (found["tokens"], found["seconds"])
    return found if whole and all(map(_is_number_or_several, numbers.values())) else None


def _is_number_or_several(value: Any) -> bool:
    return all(map(_is_number, value.values())) if isinstance(value, dict) else _is_number(value)


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)
