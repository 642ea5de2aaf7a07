"""Tokenizers: bytes, a byte-level BPE trained on the training text, or any tokenizer.json.

All three are one interface and one file format, the ``tokenizers`` library's JSON: the byte
tokenizer is a BPE without merges, so other programs can read the tokenizer of any run.

Text is only ever text: a story that spells out ``<|endoftext|>`` does not become the separator
(``encode_special_tokens``). The separator is put after each document by whoever writes the tokens.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer

from seqmodels import suggest
from seqmodels.data import atomic
from seqmodels.data.text import end_of_text
from seqmodels.data.text.incremental import IncrementalText, LibraryBytes, byte_symbols
from seqmodels.data.text.unicode import well_formed
from seqmodels.data.text.word_cache import WordCache
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.formats import tokenizer_json
from seqmodels.formats.limits import excerpt, read_text

END_OF_TEXT: Final = "<|endoftext|>"
MIN_BPE_SIZE: Final = 257
"""256 bytes and the separator; every piece beyond is a merge."""
BPE_TRAINING_BYTES: Final = 200_000_000
"""Text the BPE is trained on at most: 4,096 pieces do not change with more, and this is half a minute."""
FILE_NAME: Final = "tokenizer.json"
RARE_LETTER: Final = "\U00013000"
"""Of Egyptian hieroglyphs: one that vocabularies lack, and that no normaliser takes for a control character."""
MOST_BEGINNING: Final = 64
"""Tokens that a file may put before a text."""

# Separators of other people's tokenizers, in the order of preference, for a file beside which nothing says which it is.
_END_NAMES: Final = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are below ``vocab_size``; ``end_of_text`` is one of them."""

    name: str
    vocab_size: int
    ids: np.ndarray
    """Every id that is a token, in ascending order: the ids of some files have gaps."""
    end_of_text: int
    """What stands between two texts."""
    ends: tuple[int, ...]
    """All that end a text that is written; ``end_of_text`` is the first."""
    end_name: str
    """How ``end_of_text`` is spelled."""
    is_guess: bool
    """Whether it is one only by that name: nothing says so."""
    is_new: bool
    """Whether the file had no such token: no model was trained with it."""
    beginning: tuple[int, ...]
    """What a text begins with for a model that was trained so, as Llama's ``<s>``: mostly nothing."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any separator; a lone surrogate counts as U+FFFD."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, each an integer array [T]."""
        ...

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " T"]) -> str:
        """The text of ids; an incomplete character becomes U+FFFD.

        Separators are left out, and ids that are no tokens: there is no sequence of integers that raises.
        """
        ...

    def token_bytes(self, token: int, before: int | None, unwritten: tuple[int, ...] = ()) -> bytes | None:
        """What a token adds to a text whose last token is ``before`` (None: to no text); None: it is no text."""
        ...

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, whole or not at all; beside it what ends a text, where that does not go without saying."""
        ...


class BytesTokenizer:
    """Ids 0..255 are the bytes of UTF-8, 256 ends a text."""

    name = "bytes"
    vocab_size = 257
    ids = np.arange(257)
    end_of_text = 256
    ends = (256,)
    end_name = END_OF_TEXT
    is_guess = False
    is_new = False
    beginning = ()

    def encode(self, text: str) -> list[int]:
        return list(well_formed(text).encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(well_formed(text).encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " T"]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token: int, before: int | None, unwritten: tuple[int, ...] = ()) -> bytes | None:
        return bytes([token]) if 0 <= token < 256 else None

    def to_json(self) -> str:
        from tokenizers import models

        symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        library = _byte_level(models.BPE(vocab=symbols, merges=[]))
        library.add_special_tokens([END_OF_TEXT])
        return library.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        _save(self, path)


class LibraryTokenizer:
    """A tokenizer of the ``tokenizers`` library, trained here or read from a tokenizer.json."""

    def __init__(self, library: Any, ends: Sequence[int] = ()):
        """``library``, a ``tokenizers.Tokenizer``, and the ids that end a text, its separator first.

        Without any, the separator is guessed by its name, and is a new ``<|endoftext|>`` where no name is known.
        """
        library.encode_special_tokens = True
        library.no_padding()
        library.no_truncation()
        if _dropout(library):
            library.model.dropout = None
        self.is_guess = not ends
        names = [library.id_to_token(end) for end in ends] or [_end_by_name(library)]
        taken = {library.id_to_token(token): token for token in library.get_vocab(with_added_tokens=True).values()}
        library.add_special_tokens(names)  # new, or special from now on, so that no text becomes it
        self.ends: tuple[int, ...] = tuple(map(library.token_to_id, names))
        self.end_of_text: int = self.ends[0]
        self.end_name: str = names[0]
        self.is_new = names[0] not in taken
        if self.is_new and self.end_of_text in taken.values():
            raise ValueError(f"no token ends a text, and the id {self.end_of_text} of a new one is taken")
        self._library = library
        self._words = WordCache(library) if WordCache.serves(library) else None
        self.ids = np.unique(list(library.get_vocab(with_added_tokens=True).values()))
        # The largest id, not the number of pieces: the ids of some files have gaps.
        self.vocab_size: int = 1 + int(self.ids[-1])
        self.name = f"{type(library.model).__name__.lower()}-{self.vocab_size}"
        # The file says what goes around a text; what goes before it is what a continuation needs.
        around, text = (library.encode("a", add_special_tokens=special).ids for special in (True, False))
        starts = [start for start in range(len(around)) if around[start : start + len(text)] == text]
        self.beginning: tuple[int, ...] = tuple(around[: starts[0]]) if text and starts else ()
        if len(self.beginning) > MOST_BEGINNING or not set(self.beginning) <= set(self.ids.tolist()):
            raise ValueError(f"it puts {excerpt(list(self.beginning))} before a text, which are no tokens, or too many")

    def encode(self, text: str) -> list[int]:
        with _library_errors_as_user_errors(f"the tokenizer {self.name} cannot read a text"):
            return self._library.encode(well_formed(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = list(map(well_formed, texts))
        cached = [self._words is not None and text.isascii() for text in texts]
        others = [text for text, is_cached in zip(texts, cached, strict=True) if not is_cached]
        with _library_errors_as_user_errors(f"the tokenizer {self.name} cannot read a text"):
            encodings = iter(self._library.encode_batch_fast(others, add_special_tokens=False))
        return [
            np.asarray(self._words.encode(text) if is_cached else next(encodings).ids, np.uint32)
            for text, is_cached in zip(texts, cached, strict=True)
        ]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " T"]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if self._bytes.has_fallback_byte(known):
            # The library makes U+FFFD of whole characters beside a broken one.
            text = IncrementalText(self)
            return "".join([*map(text.push, known), text.flush()])
        return self._library.decode(known, skip_special_tokens=True)

    def token_bytes(self, token: int, before: int | None, unwritten: tuple[int, ...] = ()) -> bytes | None:
        return self._bytes(token, before, unwritten)

    @functools.cached_property
    def _bytes(self) -> LibraryBytes:
        return LibraryBytes(self._library)

    def to_json(self) -> str:
        return self._library.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        _save(self, path)


def _dropout(library: Any) -> float | None:
    """With which probability a BPE leaves out a merge (Provilkov et al. 2020); None or 0: it does not."""
    return getattr(library.model, "dropout", None)


def _end_by_name(library: Any) -> str:
    return next((name for name in _END_NAMES if library.token_to_id(name) is not None), END_OF_TEXT)


def train_bpe(documents: Iterable[str], vocab_size: int) -> LibraryTokenizer:
    """A byte-level BPE (Sennrich et al. 2016 on GPT-2's byte alphabet) of at most ``vocab_size`` pieces.

    The same documents give the same tokenizer. A text with little variety gives fewer pieces. Reads
    at most ``BPE_TRAINING_BYTES`` of text.

    Raises:
        UserError: ``vocab_size`` is below 257, or there is no text.
    """
    from tokenizers import models, pre_tokenizers, trainers

    check_bpe_size(vocab_size)
    library = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_first_bytes(documents, BPE_TRAINING_BYTES), trainer)
    return LibraryTokenizer(library)


def check_bpe_size(vocab_size: int) -> None:
    """Raises UserError where a byte-level BPE of that size cannot be."""
    if vocab_size < MIN_BPE_SIZE:
        raise UserError(
            f"data.vocab_size is {vocab_size}, but a byte-level BPE needs at least {MIN_BPE_SIZE} "
            "(256 bytes and the end of text); raise it or set data.tokenizer=bytes"
        )


def load_tokenizer(path_or_name: str | os.PathLike[str], report: Callable[[str], None] = say) -> Tokenizer:
    """The tokenizer ``bytes``, or the one in a tokenizer.json, with the end of text that the files beside it name.

    Args:
        report: called with one line for each thing a person should know, such as an end of text that is only guessed.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.json.
    """
    if path_or_name == BytesTokenizer.name:
        return BytesTokenizer()
    path = atomic.expanded(path_or_name)
    if path.is_dir() and (path / FILE_NAME).exists():
        path = path / FILE_NAME
    if path.name == FILE_NAME and path.exists() and not path.is_file():
        raise UserError(f"'{path}' is not a regular file, and so no tokenizer.json")
    if not path.is_file():
        near = suggest.hint(str(path_or_name), [BytesTokenizer.name, "bpe"]) or ("" if path.exists() else suggest.path_hint(path))
        raise UserError(
            f"no tokenizer at '{path_or_name}': {near}data.tokenizer is 'bpe', 'bytes' or the path of a tokenizer.json"
        )

    def ends_of(library: Any) -> Sequence[int]:
        if _dropout(library):
            report(f"{path}: its dropout={_dropout(library):.3g} is not applied: a text has the same tokens whenever it is read")
        if not library.encode(RARE_LETTER, add_special_tokens=False).ids:
            report(
                f"{path}: a character that it has no token for is left out of a text, without a word or a token for the unknown; "
                "bits per byte count it all the same, and so are too low"
            )
        return end_of_text.read_ids(path, library, report)

    try:
        tokenizer = from_json(read_text(path, tokenizer_json.MOST_BYTES), "it", ends_of)
    except UserError as error:
        raise UserError(f"'{path}' is not a tokenizer.json that can be read ({error})") from None
    if tokenizer.is_guess and tokenizer.end_name != END_OF_TEXT:
        report(
            f"{path}: no file beside it says what ends a text; {tokenizer.end_name!r} is taken, by its name. If it is another "
            f'token, write {{"eos_token": "NAME"}} to {path.with_name(end_of_text.NAME_FILES[0])}'
        )
    return tokenizer


def from_json(text: str, name: str = FILE_NAME, ends_of: Callable[[Any], Sequence[int]] = lambda library: ()) -> Tokenizer:
    """The tokenizer a tokenizer.json describes.

    Args:
        name: what messages call it.
        ends_of: the ids that end a text, of the ``tokenizers.Tokenizer``.

    Raises:
        UserError: it describes none, or one outside the limits of `formats.tokenizer_json`.
    """
    from tokenizers import Tokenizer as Library

    description = tokenizer_json.check(text, name)
    with _library_errors_as_user_errors(f"{name} cannot be read by the tokenizers library"):
        library = Library.from_str(text)
        if _displaced(library, description):
            library = Library.from_str(json.dumps(_with_added_in_vocab(description)))
            for token, number in _displaced(library, description).items():
                raise ValueError(f"it gives the added token {excerpt(token)} the id {number}, which it does not have there")
        library.no_padding()
        library.no_truncation()
        ends = tuple(ends_of(library))
        # Nothing else: not another token beside the bytes, nor what changes a text first.
        if ends in ((), BytesTokenizer.ends) and json.loads(library.to_str()) == json.loads(BytesTokenizer().to_json()):
            return BytesTokenizer()
        return LibraryTokenizer(library, ends)


def _displaced(library: Any, description: dict[str, Any]) -> dict[str, int]:
    """The added tokens whose ids the library does not take from the file: it counts on from the vocabulary's size instead."""
    added = {token["content"]: token["id"] for token in description.get("added_tokens") or () if token["content"]}
    return {token: number for token, number in added.items() if library.token_to_id(token) != number}


def _with_added_in_vocab(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the added tokens among those of the model, where each keeps its id if no other has it."""
    vocab = description["model"]["vocab"]
    if not isinstance(vocab, dict):
        return description
    taken, added = set(vocab.values()), {}
    for token in description["added_tokens"]:
        if token["id"] not in taken:
            added[token["content"]] = token["id"]
            taken.add(token["id"])
    return description | {"model": description["model"] | {"vocab": added | vocab}}


@contextlib.contextmanager
def _library_errors_as_user_errors(what: str) -> Iterator[None]:
    """Inside, what the library raises is a UserError that begins with ``what``: a bare Exception and, where it panics, a bare
    BaseException. What the system refuses stays what it is."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = excerpt(" ".join(str(error).split()), 200)[1:-1]
        raise UserError(f"{what}: {reason}") from error


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a model reads it that is to go on with it; an empty one is at least the end of the text before."""
    return [*tokenizer.beginning, *tokenizer.encode(text)] or [tokenizer.end_of_text]


def token_mask(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, " L"] | None:
    """Which of a model's ``vocab_size`` ids are tokens; None: all of them.

    The others are rows of padding, and gaps between the ids of a file.
    """
    if len(tokenizer.ids) == vocab_size:
        return None
    mask = np.zeros(vocab_size, bool)
    mask[tokenizer.ids] = True
    return mask


def digest(tokenizer: Tokenizer) -> str:
    """A short name for exactly this tokenizer, for keys of cached tokens."""
    said = tokenizer.to_json() + ("" if _is_plain(tokenizer) else f"\n{tokenizer.ends}")
    return digest_of(said.encode("utf-8"))


def digest_of(file: bytes) -> str:
    """The `digest` of the tokenizer that a saved file is of, if it is undamaged and says itself what ends a text."""
    return hashlib.blake2b(file, digest_size=8).hexdigest()


def _is_plain(tokenizer: Tokenizer) -> bool:
    """Whether its tokenizer.json alone says what ends a text."""
    return tokenizer.end_name == END_OF_TEXT and len(tokenizer.ends) == 1


def _save(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    if path.name == FILE_NAME and not _is_plain(tokenizer):
        end_of_text.write_ids(path, tokenizer.end_name, tokenizer.ends)
    atomic.write_text(path, tokenizer.to_json())


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    read = 0
    for document in map(well_formed, documents):
        if read >= limit:
            return
        read += len(document.encode("utf-8"))
        yield document
