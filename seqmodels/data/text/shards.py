"""Tokens, written once to files under a cache folder.

One entry of the cache is a folder ``tokens/<key>`` with one shard per kind of number: the tokens of a
split, end of text after every document, in one stream; and for each document where it ends and how
many bytes of text it has. The key is a digest of all that the tokens depend on (the source's
fingerprint, the split, the repair, the tokenizer), so an entry is never out of date: another text has
another key.

An entry is whole or not used. It is built in a folder of its own name, by the process that holds the key's
lock, and renamed into place when complete and on the disk. The folder has a lock of its own, so that nobody removes it
while it is being built, whatever became of the key's. A digest of every block of every shard was taken
from the numbers before they were written, and is compared when a block is first read: of small shards at
once, and a damaged entry is made again; of large ones as training reaches it, which then stops and says so.
Where a file system has no locks, several processes build side by side, and the later finds the other's
entry, which is equal to its own, and uses that.
"""

import contextlib
import errno
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int64, UInt

from seqmodels import failures
from seqmodels.data import atomic, progress
from seqmodels.data.fingerprint import key_of
from seqmodels.data.text import encoders
from seqmodels.data.text.readers import Piece
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import Tokenizer, digest
from seqmodels.data.text.unicode import MARK
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.formats import json_text
from seqmodels.formats.limits import Malformed, OpenFile

_FORMAT: Final = 2
"""Of an entry: raise it when its files change their meaning."""
_MANIFEST: Final = "manifest.json"
_TOKENS, _ENDS, _BYTES = "tokens.bin", "document_ends.bin", "document_bytes.bin"
_BATCH_CHARACTERS: Final = 1 << 21
_BLOCK_BYTES: Final = 1 << 18
"""Bytes of a shard under one digest: 0.5 ms of a first read, 16 characters of the manifest."""
_VERIFIED_AT_ONCE_BYTES: Final = 1 << 28
"""A shard up to so large is compared with its digests when it is opened, in about 0.5 s."""
_ATTEMPTS: Final = 5


class VerifiedArray:
    """The numbers in a file, [n], read-only: each block is compared with its digest when it is first read."""

    def __init__(self, path: Path, dtype: str, count: int, digests: list[str]):
        """``count`` numbers of ``dtype``; ``digests`` are those of the file's blocks, as `_Shard` takes them.

        Raises:
            Malformed: it is no regular file.
            ValueError: the file has another size.
        """
        self._path, self._digests = path, digests
        self._file = OpenFile(path)
        size = self._file.size
        if size != count * np.dtype(dtype).itemsize or len(digests) != -(-size // _BLOCK_BYTES):
            raise ValueError(f"{path.name} has another size than was written")
        self._verified = bytearray(len(digests))
        self.dtype, self.shape = np.dtype(dtype), (count,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> Any:
        """A number, or those of a slice, in memory.

        Raises:
            UserError: a block of it is not what was written.
            OSError: the system cannot read it.
        """
        if not isinstance(key, slice):
            place = range(len(self))[operator.index(key)]
            return self._checked(place, place + 1)[0]
        places = range(len(self))[key]
        if not places:
            return np.empty(0, self.dtype)
        ends = sorted((places[0], places[-1]))
        return self._checked(ends[0], ends[1] + 1)[:: places.step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._checked(0, len(self)), dtype)

    def whole(self) -> np.ndarray:
        """All of them, read-only.

        Raises:
            ValueError: a block is not what was written.
            OSError: the system cannot read it.
        """
        return self._read(0, len(self))

    def _checked(self, begin: int, end: int) -> np.ndarray:
        """`_read`, whose error ends a run."""
        try:
            return self._read(begin, end)
        except ValueError as error:
            folder, cure = self._path.parent, "start the same command again: it makes them anew"
            try:  # without it the next process to open the entry makes it again
                (folder / _MANIFEST).unlink(missing_ok=True)
            except OSError as obstacle:
                reason = failures.obstacle(obstacle) or obstacle.strerror
                cure = f"they cannot be replaced there ({reason}): give another folder, data.cache_dir or --cache_dir"
            raise UserError(f"cached tokens in '{folder}' are damaged ({error}); {cure}") from None

    def _read(self, begin: int, end: int) -> np.ndarray:
        """The numbers ``begin`` to ``end``, read-only.

        Raises:
            ValueError: a block of them is not what was written.
        """
        first, last = begin * self.dtype.itemsize, end * self.dtype.itemsize
        blocks = range(first // _BLOCK_BYTES, -(-last // _BLOCK_BYTES))
        if all(self._verified[block] for block in blocks):
            return np.frombuffer(self._file.read(first, last), self.dtype)
        start = blocks[0] * _BLOCK_BYTES
        content = memoryview(self._file.read(start, min(blocks[-1] * _BLOCK_BYTES + _BLOCK_BYTES, self._file.size)))
        for block in blocks:
            place = block * _BLOCK_BYTES - start
            if not self._verified[block] and _digest(content[place : place + _BLOCK_BYTES]) != self._digests[block]:
                raise ValueError(f"block {block} of {self._path.name} is not what was written")
            self._verified[block] = True
        return np.frombuffer(content[first - start : last - start], self.dtype)


def digest_of(tokens: np.ndarray, document_ends: np.ndarray, document_bytes: np.ndarray) -> str:
    """The `TokenStream.digest` of these numbers, in the types that a stream has."""
    digests = {}
    for name, numbers in ((_TOKENS, tokens), (_ENDS, document_ends), (_BYTES, document_bytes)):
        content = np.ascontiguousarray(numbers).view(np.uint8)
        digests[name] = [_digest(content[i : i + _BLOCK_BYTES]) for i in range(0, len(content), _BLOCK_BYTES)]
    return _digest_of_blocks(digests)


def _digest_of_blocks(digests: dict[str, list[str]]) -> str:
    return f"{_FORMAT}:{_digest_of({'blocks': digests})}"


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a split in one stream, end of text after every document.

    ``tokens`` are uint16 or uint32; ``document_ends`` the index after each document's end of text;
    ``document_bytes`` the bytes of text of each, end of text not counted.
    All are in memory, read-only; a large one of tokens is a `VerifiedArray`.
    """

    tokens: UInt[np.ndarray, " tokens"] | VerifiedArray
    document_ends: Int64[np.ndarray, " documents"]
    document_bytes: Int64[np.ndarray, " documents"]
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents without text, by reason (`readers.NULL`, `readers.BLANK`, `readers.EMPTY_FILE`)."""
    marked: int = 0
    """Documents that have a byte order mark inside; not counted in entries of 2026-11-30 and before."""
    digest: str = ""
    """Of all numbers in the stream, ``format:digest``; those of one format are another for other tokens, documents or bytes."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, the ends of text counted as tokens."""
        return float(self.document_bytes.sum()) / len(self.tokens)


def cached_tokens(
    cache_dir: str | os.PathLike[str], split: Split, tokenizer: Tokenizer, *, label: str, place: str = "data.cache_dir"
) -> TokenStream:
    """The tokens of a split, from the cache if they are there, else made and put there.

    ``label`` says to people which split of what this is, and ``place`` what they would change to keep tokens elsewhere.

    Raises:
        UserError: there are no documents, or the cache folder cannot be written or read.
    """
    description = {"source": split.fingerprint, "tokenizer": digest(tokenizer), "shards": _FORMAT}
    with atomic.disk_errors_as_user_errors(place, cache_dir):
        folder = atomic.expanded(cache_dir) / "tokens"
        entry = folder / key_of(description)
        if entry.exists():
            stream = _opened(entry, description, tokenizer.vocab_size)
            if stream is not None:
                return stream
        folder.mkdir(parents=True, exist_ok=True)
        with key_lock(cache_dir, entry.name, f"another process is tokenising the {label}: waiting for it"):
            stream = _opened(entry, description, tokenizer.vocab_size, notify=True)
            if stream is not None:
                return stream
            _remove_abandoned(folder)
            return _build(entry, split, tokenizer, description, label)


@contextlib.contextmanager
def key_lock(cache_dir: str | os.PathLike[str], key: str, waiting: str | None) -> Iterator[bool]:
    """The right to make what the cache keeps under a key; see `atomic.lock`."""
    path = _lock_of(atomic.expanded(cache_dir) / "tokens" / key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.lock(path, waiting=waiting) as is_held:
        yield is_held


def _lock_of(path: Path) -> Path:
    return path.parent.with_name("locks") / f"{path.name}.lock"


@contextlib.contextmanager
def _name_of_ones_own(entry: Path) -> Iterator[Path]:
    """A name beside an entry for what is being built or removed. What has it in the end is removed: by this process, or,
    where that was killed, by whoever finds its lock free."""
    path = entry.with_name(f"{entry.name}.building.{atomic.unique()}")
    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with atomic.lock(lock, waiting=None):
        try:
            yield path
        finally:
            atomic.remove(path)
            lock.unlink(missing_ok=True)


def _build(entry: Path, split: Split, tokenizer: Tokenizer, description: dict[str, Any], label: str) -> TokenStream:
    with _name_of_ones_own(entry) as building:
        building.mkdir()
        left_out: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        pieces = progress.over(_counting_marks(split.pieces(left_out), notes), f"tokenising {label}", split.text_bytes())
        others = encoders.processes_for(split.text_bytes(), tokenizer)
        totals, digests = _write(building, pieces, tokenizer, processes=others)
        if not totals["documents"]:
            raise UserError(f"the {label} holds no text")
        split.check_unchanged()
        counts = {"left_out": dict(left_out), "marked": notes["marked"]}
        _write_manifest(building, {"description": description, "totals": totals, **counts, "digests": digests})
        stream = _opened(building, description, tokenizer.vocab_size)  # before it has its name, which others may touch
        if stream is None:
            raise UserError(f"tokens written to '{entry.parent}' do not read back: set another data.cache_dir")
        _put_in_place(building, entry, description, tokenizer.vocab_size)
        return stream


def _counting_marks(pieces: Iterable[Piece], counts: Counter[str]) -> Iterator[Piece]:
    """The pieces; the documents that have a byte order mark inside are counted as ``marked``."""
    is_marked = False
    for piece in pieces:
        is_marked |= MARK in piece.text
        if piece.ends:
            counts["marked"] += is_marked
            is_marked = False
        yield piece


class _Shard:
    """A file being written, and the digests of its blocks."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._rest = b""
        self.digests: list[str] = []

    def write(self, numbers: np.ndarray) -> None:
        content = self._rest + numbers.tobytes()
        whole = len(content) // _BLOCK_BYTES * _BLOCK_BYTES
        self.digests += [_digest(content[i : i + _BLOCK_BYTES]) for i in range(0, whole, _BLOCK_BYTES)]
        self._file.write(content[:whole])
        self._rest = content[whole:]

    def close(self) -> None:
        if self._rest:
            self.digests.append(_digest(self._rest))
            self._file.write(self._rest)
            self._rest = b""
        self._file.close()


def _write(
    folder: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, *, processes: int = 0
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Writes the shards; returns their totals, and the digests of their blocks.

    Holds one batch of pieces at a time, and one for each of the ``processes`` that encode beside this one.
    """
    total_tokens = total_documents = open_bytes = 0  # bytes of the document that the last batch left open
    with contextlib.ExitStack() as stack:
        shards = {}
        for name in (_TOKENS, _ENDS, _BYTES):
            shards[name] = _Shard(folder / name)
            stack.callback(shards[name].close)
        batches = contextlib.closing(encoders.encoded(_batched(pieces), tokenizer, processes=processes))
        for tokens, after, text_bytes, ends in stack.enter_context(batches):
            shards[_TOKENS].write(tokens)
            shards[_ENDS].write(total_tokens + after[ends])
            shards[_BYTES].write(np.diff(text_bytes[ends], prepend=-open_bytes))
            total_tokens += len(tokens)
            total_documents += int(ends.sum())
            closed = text_bytes[ends][-1] if ends.any() else -open_bytes
            open_bytes = int(text_bytes[-1] - closed)
    totals = {
        "dtype": encoders.dtype_of(tokenizer.vocab_size),
        "tokens": total_tokens,
        "documents": total_documents,
        "tokenizer": tokenizer.name,
    }
    return totals, {name: shard.digests for name, shard in shards.items()}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with open(folder / _MANIFEST, "wb") as file:
        file.write(json.dumps(manifest | {"digest": _digest_of(manifest)}).encode())


def _digest_of(manifest: dict[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _opened(entry: Path, description: dict[str, Any], vocab_size: int, *, notify: bool = False) -> TokenStream | None:
    """The tokens in a complete entry; None where there is none, or it is damaged.

    Raises:
        UserError: the entry is there and cannot be read now.
    """
    if not entry.exists():
        return None
    try:
        manifest = json_text.read(entry / _MANIFEST)
        if manifest.pop("digest") != _digest_of(manifest):
            raise ValueError(f"{_MANIFEST} is not what was written")
        if key_of(manifest["description"]) != key_of(description):
            raise ValueError(f"{_MANIFEST} is of another text or tokenizer")
        totals, digests = manifest["totals"], manifest["digests"]
        if totals["dtype"] != encoders.dtype_of(vocab_size):
            raise ValueError(f"{_MANIFEST} says {totals['dtype']!r} of the tokens")
        tokens = VerifiedArray(entry / _TOKENS, totals["dtype"], totals["tokens"], digests[_TOKENS])
        ends, text_bytes = (
            VerifiedArray(entry / shard, "<i8", totals["documents"], digests[shard]).whole() for shard in (_ENDS, _BYTES)
        )
        check_documents(ends, text_bytes, len(tokens))
        if totals["tokens"] * tokens.dtype.itemsize <= _VERIFIED_AT_ONCE_BYTES:
            tokens = tokens.whole()
            if tokens.max() >= vocab_size:
                raise ValueError(f"{_TOKENS} has the id {tokens.max()}, beyond the vocabulary of {vocab_size}")
        marked = manifest["marked"] if "marked" in manifest else 0
        return TokenStream(tokens, ends, text_bytes, manifest["left_out"], marked, _digest_of_blocks(digests))
    except (OSError, Malformed, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in failures.OF_ANOTHER_KIND:
            raise UserError(f"cannot read the cached tokens '{error.filename or entry}': {error.strerror}") from error
        if notify:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"cached tokens in '{entry}' are damaged ({reason}): making them again")
        return None


def check_documents(ends: np.ndarray, text_bytes: np.ndarray, tokens: int) -> None:
    """Raises ValueError where documents do not follow each other from the first of so many ``tokens`` to the last."""
    if ends[0] < 1 or np.any(ends[1:] <= ends[:-1]) or ends[-1] != tokens or np.any(text_bytes < 0):
        raise ValueError("its documents do not end where its tokens do")


def _put_in_place(building: Path, entry: Path, description: dict[str, Any], vocab_size: int) -> None:
    for _ in range(_ATTEMPTS):
        try:
            atomic.rename_folder(building, entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _opened(entry, description, vocab_size) is not None:
            return  # another process was faster
        # Damaged. It is set aside first: renaming is atomic, removing a folder is not.
        with _name_of_ones_own(entry) as damaged, contextlib.suppress(FileNotFoundError):  # another process set it aside
            entry.rename(damaged)


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed writers left: folders being built whose own lock is there and free."""
    for building in folder.glob("*.building.*"):
        lock = _lock_of(building)
        if lock.exists():
            with atomic.lock(lock, waiting=None) as is_free:
                if is_free:
                    atomic.remove(building)
                    lock.unlink(missing_ok=True)
