"""JSON as RFC 8259 has it, within limits: no NaN, no number that overflows, no name twice in an object."""

import hashlib
import json
import os
import re
from collections import Counter
from typing import Any, Final

from seqmodels.formats.limits import Malformed, excerpt, read_text

MOST_BYTES: Final = 64 << 20
MOST_DEPTH: Final = 64
MOST_VALUES: Final = 4_000_000
MOST_DIGITS: Final = 40
"""Of a whole number: more than any field holds, far from the 4,300 at which Python itself refuses."""

# Without its end a string is all that follows: else each quotation mark in it would be looked at as a beginning, in quadratic time.
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET: Final = re.compile(r"[\[\]{}]")


def read(path: str | os.PathLike[str], *, most_bytes: int = MOST_BYTES, infinity: bool = False) -> Any:
    """The value in a file; arguments and errors as in `parse`.

    Raises:
        Malformed: it is no such JSON, or too large.
        OSError: the system cannot read it.
    """
    return parse(read_text(path, most_bytes), path, infinity=infinity)


def parse(text: str, name: str | os.PathLike[str], *, infinity: bool = False) -> Any:
    """The value of a text, which messages call ``name``.

    Args:
        infinity: take ``Infinity`` and ``-Infinity``, which are not JSON, but which Python writes.

    Raises:
        Malformed: it is not JSON, or is deeper, longer or of larger numbers than the limits allow.
    """
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MOST_VALUES and len(_STRING.sub("", text)) > MOST_VALUES:
        raise Malformed(f"{name} is not read: it has up to {values:,} values, more than {MOST_VALUES:,}")
    if text.count("[") + text.count("{") > MOST_DEPTH:
        _check_depth(text, name)

    def constant(literal: str) -> float:
        if not infinity or literal == "NaN":
            raise ValueError(f"{literal} is no number in JSON")
        return float(literal)

    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole_number, parse_float=_number, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{name} is not valid JSON ({error})") from None


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted names, in hexadecimal: a file that holds it beside the value shows damage."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_depth(text: str, name: str | os.PathLike[str]) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MOST_DEPTH:
            raise Malformed(f"{name} is not read: its values are nested more than {MOST_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{excerpt(twice)} is there twice in one object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, {digits[:8]}...")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {excerpt(digits)[1:-1]} is too large")
    return number
