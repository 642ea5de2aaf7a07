"""Text from a stream of tokens: the bytes that each token adds, and an incremental UTF-8 decoder behind them.

A character may take several tokens (of a byte-level BPE, or where a vocabulary falls back to bytes), and what a token adds may
depend on the one before it (the space between two words). So a token is first turned into bytes, given the token before it, and
only bytes are turned into text.
"""

import codecs
import json
import os
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

_LONGEST_CHARACTER: Final = 4  # bytes of UTF-8
_REPLACEMENT: Final = "\ufffd"
_HALF_SURROGATE: Final = re.compile(rb"\xed[\xa0-\xbf]")  # Python waits for its third byte, with which it is no character either
_FALLBACK_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR_CANDIDATES: Final = 4096  # tokens looked at for one that is a word
_MOST_UNWRITTEN: Final = (
    256  # tokens at the beginning of a text of which nothing is written: a decoder strips up to 64 characters
)


class HasTokenBytes(Protocol):
    """The part of a tokenizer that `IncrementalText` uses."""

    def token_bytes(self, token: int, before: int | None, unwritten: tuple[int, ...] = ()) -> bytes | None:
        """What a token adds to a text whose last token is `before`; None: it is no text.

        `before` is None where nothing of the text is written yet, and `unwritten` are then the tokens of which that is so.
        """
        ...


class IncrementalText:
    """Turns a stream of tokens into text, never splitting a character that takes several tokens.

    `push` returns what the new token adds, `flush` what is left at the end. All of it together is `tokenizer.decode` of all
    tokens without the text of the context. Bytes that are not UTF-8 become U+FFFD, one for each maximal part of a character.
    """

    def __init__(self, tokenizer: HasTokenBytes, context: Sequence[int] = ()):
        """`context`: the tokens before; they are not returned as text.

        Where the context ends inside a character, that character is the first of the new text.
        """
        self._tokenizer = tokenizer
        self._unwritten = _unwritten(tokenizer, context)
        self._before, unfinished = _end_of(tokenizer, context) if self._unwritten is None else (None, b"")
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.decode(unfinished)
        self._has_new_bytes = False

    def push(self, token: int) -> str:
        """The text that is complete with this token; nothing for a special token, or an id that is no token."""
        added = self._tokenizer.token_bytes(token, self._before, self._unwritten or ())
        if added is None:
            return ""
        self._unwritten = None if self._unwritten is None else _longer(self._unwritten, token, added)
        self._before = token if self._unwritten is None else None
        self._has_new_bytes |= bool(added)
        return self._utf8.decode(added)

    def flush(self) -> str:
        """What is left at the end: an unfinished character comes out as U+FFFD."""
        left = self._utf8.decode(b"", final=True)
        return left if self._has_new_bytes else ""


def _longer(unwritten: tuple[int, ...], token: int, added: bytes) -> tuple[int, ...] | None:
    """The tokens of which nothing is written, with one more, which adds this; None: the text has begun."""
    return None if added or len(unwritten) >= _MOST_UNWRITTEN else (*unwritten, token)


def _unwritten(tokenizer: HasTokenBytes, context: Sequence[int]) -> tuple[int, ...] | None:
    """The tokens of a context of which nothing is written, as a decoder takes away what a text begins with; None: it has begun."""
    unwritten: tuple[int, ...] | None = ()
    for token in context:
        added = tokenizer.token_bytes(token, None, unwritten)
        if added is not None:
            unwritten = _longer(unwritten, token, added)
        if unwritten is None:
            return None
    return unwritten


def _end_of(tokenizer: HasTokenBytes, context: Sequence[int]) -> tuple[int | None, bytes]:
    """The last token of a context that is text, and the bytes of the character that the context leaves unfinished."""
    texts = (token for token in reversed(context) if tokenizer.token_bytes(token, None) is not None)
    tail, last = b"", next(texts, None)
    token = last
    while token is not None and len(tail) < _LONGEST_CHARACTER:
        # What a decoder does to the beginning of a text (a space that it takes away) it does to the first token alone.
        before = next(texts, None)
        tail = tokenizer.token_bytes(token, before) + tail
        token = before
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    utf8.decode(tail)
    unfinished = utf8.getstate()[0]
    return last, b"" if _HALF_SURROGATE.fullmatch(unfinished) else unfinished


class LibraryBytes:
    """The bytes that a token of the ``tokenizers`` library adds to a text.

    Tokens that stand for bytes (all of a byte-level BPE, ``<0xE4>`` of a vocabulary with byte fallback) are those bytes. What
    any other token adds is the difference that it makes to what the library's decoder writes.
    """

    def __init__(self, library: Any):
        """``library``: a ``tokenizers.Tokenizer`` that does not change any more; its special tokens are no text."""
        self._library = library
        description = json.loads(library.to_str())
        steps = _decoder_steps(description["decoder"])
        model = description["model"]
        self._special = {token for token, added in library.get_added_tokens_decoder().items() if added.special}
        self._is_byte_level = "ByteLevel" in steps and steps <= {"ByteLevel", "Fuse"}
        self._is_byte_level_within = "ByteLevel" in steps and steps <= {"ByteLevel", "Fuse", "Strip"}
        self._symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())} if "ByteLevel" in steps else {}
        # A decoder without the step would write the bytes' names.
        self._falls_back = "ByteFallback" in steps or bool("byte_fallback" in model and model["byte_fallback"])
        self._anchor = self._find_anchor()

    def __call__(self, token: int, before: int | None, unwritten: tuple[int, ...] = ()) -> bytes | None:
        """What ``token`` adds to a text whose last token is ``before`` (None: to one of ``unwritten``, of which nothing is written).

        None: it is no text, being a special token or an id of no token.
        """
        piece = self._piece(token)
        if piece is None:
            return None
        if self._is_byte_level or (self._is_byte_level_within and before is not None):
            return self._bytes_of_symbols(piece)
        byte = self._fallback_byte(piece)
        # A decoder may take the space away that a text begins with, even one that is spelled as a byte.
        if byte is not None and (byte >= 0x80 or before is not None):
            return bytes([byte])
        text = self._added(token, before, unwritten)
        return self._bytes_of_symbols(piece) if self._symbols and _REPLACEMENT in text else text.encode()

    def has_fallback_byte(self, ids: Sequence[int]) -> bool:
        """Whether one of the ids stands for a byte of a vocabulary with byte fallback."""
        pieces = map(self._piece, ids) if self._falls_back else ()
        return any(piece is not None and self._fallback_byte(piece) is not None for piece in pieces)

    def _piece(self, token: int) -> str | None:
        """The name of a token that is text."""
        return None if token in self._special or not 0 <= token < 1 << 32 else self._library.id_to_token(token)

    def _fallback_byte(self, piece: str) -> int | None:
        found = _FALLBACK_BYTE.fullmatch(piece) if self._falls_back else None
        return None if found is None else int(found[1], 16)

    def _bytes_of_symbols(self, piece: str) -> bytes:
        """An added token is not always written in the symbols of bytes; it is then the text that it looks like."""
        try:
            return bytes([self._symbols[symbol] for symbol in piece])
        except KeyError:
            return piece.encode()

    def _added(self, token: int, before: int | None, unwritten: tuple[int, ...]) -> str:
        if before is None:
            return self._decoded([*unwritten, token])
        # With a word in front, so that what a decoder does to the beginning of a text is done to that.
        context = [] if self._anchor is None else [self._anchor]
        if not self._is_part_of_character(before):
            context.append(before)
        without, added = self._decoded(context), self._decoded([*context, token])
        return added[len(os.path.commonprefix([without, added])) :]

    def _is_part_of_character(self, token: int) -> bool:
        """Whether a token stands for bytes that are no text by themselves."""
        if self._fallback_byte(self._piece(token) or "") is not None:
            return True
        return bool(self._symbols) and _REPLACEMENT in self._decoded([token])

    def _decoded(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=True)

    def _find_anchor(self) -> int | None:
        """A token that is a word, or part of one, and nothing else."""
        for token in sorted(self._library.get_vocab(with_added_tokens=False).values())[:_ANCHOR_CANDIDATES]:
            piece = self._piece(token)
            if piece is not None and self._fallback_byte(piece) is None and self._decoded([token]).isalnum():
                return token
        return None


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(0x100)]


def _decoder_steps(decoder: dict[str, Any] | None) -> set[str]:
    """The types of a decoder's steps."""
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*map(_decoder_steps, decoder["decoders"]))
    return {decoder["type"]}
