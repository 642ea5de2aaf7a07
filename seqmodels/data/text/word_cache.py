"""Encode plain English four times as fast as the ``tokenizers`` library: every word once, then from memory.

A byte-level BPE first cuts a text into words (GPT-2's pattern) and encodes each by itself, and stories
use the same ten thousand words over and over. For ASCII text Python's ``re`` can state the pattern
exactly; all other text, and every tokenizer of another kind, stays with the library.
"""

import json
import re
from typing import Any, Final

# GPT-2's pattern, its classes of letters, digits and white space restricted to ASCII.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+")
_MOST_WORDS: Final = 1 << 20


class WordCache:
    """The words of ASCII text and their ids, as a library tokenizer gives them."""

    def __init__(self, library: Any):
        self._library = library
        self._ids: dict[str, list[int]] = {}

    @staticmethod
    def serves(library: Any) -> bool:
        """Whether the tokenizer encodes word by word as above, with nothing before or after."""
        description = json.loads(library.to_str())
        words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        pre_tokenizer = description["pre_tokenizer"] or {}
        return (
            description["normalizer"] is None
            and words.items() <= pre_tokenizer.items()
            and all(token["special"] for token in description["added_tokens"])
            and description["model"]["type"] == "BPE"
            and not description["model"]["dropout"]
        )

    def encode(self, text: str) -> list[int]:
        """The ids of an ASCII text."""
        known = self._ids
        ids: list[int] = []
        for word in _WORD.findall(text):
            word_ids = known.get(word)
            if word_ids is None:
                word_ids = self._remember(word)
            ids += word_ids
        return ids

    def _remember(self, word: str) -> list[int]:
        if len(self._ids) >= _MOST_WORDS:
            self._ids.clear()
        ids = self._library.encode(word, add_special_tokens=False).ids
        self._ids[word] = ids
        return ids
