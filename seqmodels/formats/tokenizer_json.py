"""A tokenizer.json, checked before the ``tokenizers`` library builds anything of it.

The library is written in Rust and trusts the file: a normaliser that doubles a text thirty times asks for memory until the
process is aborted, an id of four thousand million makes it count up to it, and a table that is cut off ends in a panic.
None of these can be caught from Python, so what the library would do is bounded here first. The parts and their options are
those of tokenizers 0.23.
"""

import base64
import binascii
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from seqmodels.formats import json_text
from seqmodels.formats.limits import Malformed, excerpt

MOST_BYTES: Final = 64 << 20
MOST_TOKENS: Final = 1 << 22
SPARSEST: Final = 4
"""Ids may have gaps: the largest is below so many times the number of tokens, or below 2^20."""
MOST_GROWTH: Final = 64
"""A normaliser or decoder makes a text at most so many times as long."""
MOST_PARTS: Final = 64
LONGEST_WORD: Final = 1000
"""Characters of a word that WordPiece parts, in time that grows with more than their square; BERT's are at most 100."""
MOST_AFFIX: Final = 256
"""Characters of a prefix, a replacement, a pattern, ..."""

Checks = Mapping[str, Callable[[Any, str], float | None]]


def check(text: str, name: str) -> dict[str, Any]:
    """The description in the text of a tokenizer.json, which messages call ``name``, if the library can be given it.

    Raises:
        Malformed: it is no such JSON, has a part that the library does not have, or numbers outside the limits.
    """
    description = json_text.parse(text, name)
    if not isinstance(description, dict):
        raise Malformed(f"{name} is no object")
    try:
        _description(description)
    except _Wrong as wrong:
        raise Malformed(f"{name} cannot be read as a tokenizer.json: {wrong}") from None
    return description


class _Wrong(ValueError):
    pass


def _description(description: dict[str, Any]) -> None:
    if not isinstance(description.get("model"), dict):
        raise _Wrong("it has no 'model'")
    highest, count = _model(description["model"])
    added = description.get("added_tokens")
    if added is not None:
        _need(isinstance(added, list) and len(added) <= MOST_TOKENS, "added_tokens is no list, or too long")
        for entry in added:
            _need(isinstance(entry, dict), f"an added token is {excerpt(entry)}")
            content, number = entry.get("content"), entry.get("id")
            _need(isinstance(content, str) and len(content) <= 4096, f"an added token is {excerpt(content)}")
            _need(_is_whole(number, 0, 2**32 - 1), f"the added token {excerpt(content)} has the id {excerpt(number)}")
            highest, count = max(highest, number), count + 1
    _need(
        highest < max(1 << 20, SPARSEST * count),
        f"its largest id is {highest:,}, and it has only {count:,} tokens",
    )
    for part, kinds in _PARTS.items():
        if description.get(part) is not None:
            _part(description[part], part, kinds)
    _need(description.get("truncation") is None or isinstance(description["truncation"], dict), "truncation is no object")
    _need(description.get("padding") is None or isinstance(description["padding"], dict), "padding is no object")


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


# -- the model ------------------------------------------------------------------------------------------------------


def _model(model: dict[str, Any]) -> tuple[int, int]:
    """The largest id and the number of tokens."""
    kind = model.get("type")
    if kind is None:  # as old files have it: the library tells by what is there
        kind = "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"
    _need(kind in ("BPE", "WordPiece", "WordLevel", "Unigram"), f"there is no model {excerpt(kind)}")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        value = model.get(name)
        _need(value is None or (isinstance(value, str) and len(value) <= MOST_AFFIX), f"model.{name} is {excerpt(value)}")
    longest = model.get("max_input_chars_per_word")
    _need(longest is None or _is_whole(longest, 0, LONGEST_WORD), f"model.max_input_chars_per_word is {excerpt(longest)}")
    vocab = model.get("vocab")
    if kind == "Unigram":
        return _unigram(model, vocab)
    _need(isinstance(vocab, dict) and 0 < len(vocab) <= MOST_TOKENS, "model.vocab has no tokens, or too many")
    for token, number in vocab.items():
        _need(_is_whole(number, 0, 2**32 - 1), f"model.vocab gives {excerpt(token)} the id {excerpt(number)}")
    if kind == "BPE":
        _merges(model, vocab)
    else:
        unknown = model.get("unk_token")
        _need(unknown in vocab, f"model.unk_token {excerpt(unknown)} is not in model.vocab")
    return max(vocab.values()), len(vocab)


def _merges(model: dict[str, Any], vocab: dict[str, int]) -> None:
    merges, prefix = model.get("merges"), model.get("continuing_subword_prefix") or ""
    _need(isinstance(merges, list) and len(merges) <= MOST_TOKENS, "model.merges is no list, or too long")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        _need(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) and half for half in pair),
            f"model.merges has {excerpt(merge)}",
        )
        first, second = pair
        _need(second.startswith(prefix), f"model.merges has {excerpt(merge)}, without the prefix {excerpt(prefix)}")
        merged = first + second[len(prefix) :]
        missing = next((token for token in (first, second, merged) if token not in vocab), None)
        _need(missing is None, f"model.merges needs {excerpt(missing)}, which model.vocab lacks")
    dropout, unknown = model.get("dropout"), model.get("unk_token")
    _need(dropout is None or (type(dropout) in (int, float) and 0 <= dropout <= 1), f"model.dropout is {excerpt(dropout)}")
    _need(unknown is None or unknown in vocab, f"model.unk_token {excerpt(unknown)} is not in model.vocab")
    capacity = model.get("cache_capacity")
    _need(capacity is None or _is_whole(capacity, 0, 1 << 20), f"model.cache_capacity is {excerpt(capacity)}")


def _unigram(model: dict[str, Any], vocab: Any) -> tuple[int, int]:
    _need(isinstance(vocab, list) and 0 < len(vocab) <= MOST_TOKENS, "model.vocab has no tokens, or too many")
    for entry in vocab:
        _need(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and len(entry[0]) <= 4096
            and type(entry[1]) in (int, float) and math.isfinite(entry[1]),
            f"model.vocab has {excerpt(entry)}, no token and logarithm",
        )  # fmt: skip
    _need(len({entry[0] for entry in vocab}) == len(vocab), "model.vocab has a token twice")
    unknown = model.get("unk_id")
    _need(_is_whole(unknown, 0, len(vocab) - 1), f"model.unk_id is {excerpt(unknown)}")
    return len(vocab) - 1, len(vocab)


# -- normaliser, pre-tokeniser, post-processor, decoder ---------------------------------------------------------------


def _part(value: Any, name: str, kinds: Mapping[str, Checks], parts: list[int] | None = None) -> float:
    """How many times as long a part makes a text, at most; a sequence multiplies."""
    parts = [0] if parts is None else parts
    parts[0] += 1
    _need(parts[0] <= MOST_PARTS, f"{name} has more than {MOST_PARTS} parts")
    _need(isinstance(value, dict), f"{name} is {excerpt(value)}")
    kind = value.get("type")
    _need(isinstance(kind, str) and kind in kinds, f"there is no {name} {excerpt(kind)}")
    growth = 1.0
    if kind == "Sequence":
        inner = value.get(_SEQUENCES[name])
        _need(isinstance(inner, list), f"{name}.{_SEQUENCES[name]} is {excerpt(inner)}")
        for each in inner:
            growth *= _part(each, name, kinds, parts)
    for option, allowed in kinds[kind].items():
        try:
            growth *= allowed(value.get(option), kind) or 1.0
        except _Wrong as wrong:
            raise _Wrong(f"{name} {kind}: {option} {wrong}") from None
    if kind == "Replace":
        growth *= _replacement(value)
    _need(growth <= MOST_GROWTH, f"{name} makes a text up to {growth:,.0f} times as long, more than {MOST_GROWTH} times")
    return growth


def _text(least: int = 0, most: int = MOST_AFFIX) -> Callable[[Any, str], None]:
    def allowed(value: Any, kind: str) -> None:
        _need(isinstance(value, str) and least <= len(value) <= most, f"is {excerpt(value)}")

    return allowed


def _ascii_character(value: Any, kind: str) -> None:
    """What a decoder takes away from the beginning of a text; of more than one byte, streaming would have to take bytes back."""
    _need(isinstance(value, str) and len(value) == 1 and value.isascii(), f"is {excerpt(value)}, not one character of ASCII")


def _whole(least: int, most: int) -> Callable[[Any, str], None]:
    def allowed(value: Any, kind: str) -> None:
        _need(_is_whole(value, least, most), f"is {excerpt(value)}, not a whole number from {least} to {most:,}")

    return allowed


def _longer_by(value: Any, kind: str) -> float:
    """What is put before a text of at least one character."""
    _text()(value, kind)
    return 1.0 + len(value)


def _nothing(value: Any, kind: str) -> None:
    """So many characters at the end of a text are taken away: of one that has none the library takes them too, and aborts."""
    _need(type(value) is int and value == 0, f"is {excerpt(value)}, not 0: the library cannot take it from an empty text")


def _pattern(value: Any, kind: str, *, least: int = 1) -> None:
    """A text to look for, or a regular expression, whose repetitions of a counted number multiply when it is compiled.

    One of no characters parts a text into its characters.
    """
    _need(isinstance(value, dict) and len(value) == 1, f"is {excerpt(value)}")
    form, text = next(iter(value.items()))
    _need(form in ("String", "Regex") and isinstance(text, str), f"is {excerpt(value)}")
    _need(least <= len(text) <= 4096, "is empty or long")
    if form == "Regex":
        repeated = math.prod(max(1, int(count)) for count in _COUNTED.findall(text))
        _need(repeated <= 100_000, f"repeats up to {repeated:,} times")
        _need(text.count("(") <= 200, "has more than 200 groups")


_COUNTED: Final = re.compile(r"\{\d*,?(\d{1,9})\}")


def _replacement(value: dict[str, Any]) -> float:
    """A text of n characters has at most n + 1 matches, of a text to look for n divided by its length."""
    form, pattern = next(iter(value["pattern"].items()))
    content = len(value["content"])
    return max(1.0, content / len(pattern)) if form == "String" else 1.0 + content


def _charsmap(value: Any, kind: str) -> None:
    """SentencePiece's table: the size of a double-array trie, the trie, and texts, each ended by a zero, to look up."""
    try:
        table = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        table = b""
    trie = int.from_bytes(table[:4], "little")
    _need(len(table) > 4 and trie % 4 == 0 and 0 < trie <= len(table) - 4, "is cut off or no table")
    texts = table[4 + trie :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise _Wrong("holds texts that are not UTF-8") from None
    _need(texts[-1:] in (b"", b"\0"), "is cut off")


def _template(value: Any, kind: str) -> None:
    """Pieces of a template, and the special tokens that they may name."""
    _need(isinstance(value, list) and len(value) <= MOST_PARTS, f"is {excerpt(value)}")
    for piece in value:
        _need(isinstance(piece, dict) and len(piece) == 1, f"has {excerpt(piece)}")


_NOTHING: Final[Checks] = {}
_SEQUENCES: Final = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders",
}  # fmt: skip
_REPLACE: Final[Checks] = {"pattern": _pattern, "content": _text()}
_PARTS: Final[Mapping[str, Mapping[str, Checks]]] = {
    "normalizer": {
        **dict.fromkeys("Sequence BertNormalizer Strip StripAccents NFC NFD NFKC NFKD Lowercase Nmt ByteLevel".split(), _NOTHING),
        "Precompiled": {"precompiled_charsmap": _charsmap},
        "Replace": _REPLACE,
        "Prepend": {"prepend": _longer_by},
    },
    "pre_tokenizer": {
        **dict.fromkeys(
            "Sequence BertPreTokenizer ByteLevel Whitespace WhitespaceSplit Punctuation Digits UnicodeScripts".split(), _NOTHING
        ),
        "CharDelimiterSplit": {"delimiter": _text(1, 1)},
        "Metaspace": {"replacement": _text(1, 1)},
        "Split": {"pattern": functools.partial(_pattern, least=0)},
        "FixedLength": {"length": _whole(1, 1 << 20)},
    },
    "post_processor": {
        **dict.fromkeys("Sequence ByteLevel BertProcessing RobertaProcessing".split(), _NOTHING),
        "TemplateProcessing": {"single": _template, "pair": _template},
    },
    "decoder": {
        **dict.fromkeys("Sequence ByteLevel ByteFallback Fuse".split(), _NOTHING),
        "BPEDecoder": {"suffix": _text()},
        "WordPiece": {"prefix": _text()},
        "Metaspace": {"replacement": _text(1, 1)},
        "CTC": {"pad_token": _text(1), "word_delimiter_token": _text()},
        "Replace": _REPLACE,
        "Strip": {"content": _ascii_character, "start": _whole(0, 64), "stop": _nothing},
    },
}
