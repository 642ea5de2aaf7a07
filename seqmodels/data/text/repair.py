"""Undo the text damage of the hub's TinyStories parquet files, and touch nothing else.

The parquet text is UTF-8 that was read as cp1252, the five bytes that cp1252 does not define
(81 8D 8F 90 9D) dropped: an opening quote stands as ``â€œ``, an apostrophe as ``â€™``, a closing
quote, whose last byte is 9D, as ``â€``. Paragraphs are parted by a blank line where the original
.txt files have one newline.

The inverse must never change sound text, and sound text may hold any of these characters:
``CAFÉ’s`` is also what a damaged ``ɒ`` looks like. So there are two degrees of certainty:

* ``â€`` and ``ðŸ`` (general punctuation, emoji) stand in no language's text: undone wherever found.
* Other sequences, such as ``Ã©`` for é, are undone only in a document that shows a sure sign of
  damage and, as a whole, could have come out of it: a genuine curly quote, or any character outside
  cp1252, proves that it did not.

A character whose bytes were partly dropped stays as it is, except the closing quote: which byte is
missing cannot be known.
"""

import re
from typing import Final

VERSION: Final = 1
"""Part of the key of cached tokens: raise it when a repaired text changes."""

_UNDEFINED_IN_CP1252: Final = {0x81, 0x8D, 0x8F, 0x90, 0x9D}


def _cp1252_character(byte: int) -> str:
    """The character cp1252 shows for a byte; some programs keep the undefined ones as control characters."""
    return chr(byte) if byte in _UNDEFINED_IN_CP1252 else bytes([byte]).decode("cp1252")


_BYTE_OF: Final = {_cp1252_character(byte): byte for byte in range(256)}
# As characters of a regular expression: what a continuation byte (80..BF) of UTF-8 became.
_CONTINUATION: Final = "[" + "".join(re.escape(_cp1252_character(byte)) for byte in range(0x80, 0xC0)) + "]"
_TWO_BYTES: Final = f"[Â-ß]{_CONTINUATION}"
_THREE_BYTES: Final = f"[à-ï]{_CONTINUATION}{{2}}"
_FOUR_BYTES: Final = f"[ð-ô]{_CONTINUATION}{{3}}"
_PUNCTUATION: Final = f"â€{_CONTINUATION}?"
_EMOJI: Final = f"ðŸ{_CONTINUATION}{{2}}"

_SURE = re.compile(f"{_PUNCTUATION}|{_EMOJI}")
_SIGN = re.compile(f"{_PUNCTUATION}|{_EMOJI}|[ÂÃ]{_CONTINUATION}|â{_CONTINUATION}{{2}}")
_ANY = re.compile(f"{_FOUR_BYTES}|{_THREE_BYTES}|{_PUNCTUATION}|{_TWO_BYTES}")
# A sequence that may have lost bytes: everything the damage can produce beyond ASCII.
_POSSIBLE = re.compile(f"[ð-ô]{_CONTINUATION}{{0,3}}|[à-ï]{_CONTINUATION}{{0,2}}|[Â-ß]{_CONTINUATION}?")
_BLANK_LINES = re.compile(r"\n\n+")


def repair(text: str) -> str:
    """The text as it was before the damage; a sound text comes back as the very same object.

    In a damaged text blank lines collapse to one newline as well, so that it equals the original.
    """
    if text.isascii() or not _SIGN.search(text):
        return text
    could_be_damage_as_a_whole = _POSSIBLE.sub("", text).isascii()
    repaired = (_ANY if could_be_damage_as_a_whole else _SURE).sub(_undo, text)
    return text if repaired == text else collapse_blank_lines(repaired)


def collapse_blank_lines(text: str) -> str:
    """Paragraphs parted by one newline, as in the hub's .txt files."""
    return _BLANK_LINES.sub("\n", text)


def _undo(sequence: re.Match[str]) -> str:
    characters = sequence.group()
    if characters == "â€":
        return "”"
    try:
        return bytes(_BYTE_OF[character] for character in characters).decode("utf-8")
    except UnicodeDecodeError:  # an overlong form or a surrogate: no UTF-8 text had these bytes
        return characters
