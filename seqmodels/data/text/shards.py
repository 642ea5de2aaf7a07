"""Tokens, written once to memory-mapped files under a cache folder.

One entry of the cache is a folder ``tokens/<key>`` with one shard per kind of number: the tokens of a
split, end of text after every document, in one stream; and for each document where it ends and how
many bytes of text it has. The key is a digest of all that the tokens depend on (the source's
fingerprint, the split, the repair, the tokenizer), so an entry is never out of date: another text has
another key.

Safe by construction instead of by locks: an entry is built in a folder of its own name and renamed
into place when complete. A writer killed half-way leaves a folder nobody reads; of two writers that
race, the later finds the other's entry, which is equal to its own, and uses that.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int64, UInt

from seqmodels.data import atomic, progress
from seqmodels.data.fingerprint import content_sample, key_of
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import Tokenizer, digest
from seqmodels.errors import UserError
from seqmodels.escape import say

_MANIFEST: Final = "manifest.json"
_TOKENS, _ENDS, _BYTES = "tokens.bin", "document_ends.bin", "document_bytes.bin"
_BATCH_CHARACTERS: Final = 1 << 21
_ABANDONED_AFTER_SECONDS: Final = 24 * 3600
_ATTEMPTS: Final = 5


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a split in one stream, end of text after every document.

    ``tokens`` are uint16 or uint32; ``document_ends`` the index after each document's end of text;
    ``document_bytes`` the bytes of text of each, end of text not counted.
    All are memory maps, read-only.
    """

    tokens: UInt[np.ndarray, "tokens"]
    document_ends: Int64[np.ndarray, "documents"]
    document_bytes: Int64[np.ndarray, "documents"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, the ends of text counted as tokens."""
        return float(self.document_bytes.sum()) / len(self.tokens)


def cached_tokens(
    cache_dir: str | os.PathLike[str], split: Split, tokenizer: Tokenizer, *, label: str
) -> TokenStream:
    """The tokens of a split, from the cache if they are there, else made and put there.

    ``label`` says to people which split of what this is.

    Raises:
        UserError: there are no documents, or the cache folder cannot be written.
    """
    description = {"source": split.fingerprint, "tokenizer": digest(tokenizer)}
    with atomic.disk_errors_as_user_errors("data.cache_dir", cache_dir):
        folder = Path(cache_dir).expanduser() / "tokens"
        entry = folder / key_of(description)
        stream = _opened(entry, notify=True)
        if stream is not None:
            return stream
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        building = folder / f"{entry.name}.building.{atomic.unique()}"
        try:
            building.mkdir()
            documents = progress.over(split.documents(), f"tokenising {label}", split.text_bytes())
            totals = _write(building, documents, tokenizer)
            if not totals["documents"]:
                raise UserError(f"the {label} holds no text")
            _write_manifest(building, description, totals)
            stream = _opened(building)  # opened before it has its name: what others do to that cannot matter
            if stream is None:
                raise UserError(f"tokens written to '{folder}' do not read back: set another data.cache_dir")
            _put_in_place(building, entry)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return stream


def _write(folder: Path, documents: Iterable[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the shards; returns their totals. Holds one batch of documents at a time."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    total_tokens = total_documents = 0
    with (
        open(folder / _TOKENS, "wb") as tokens_file,
        open(folder / _ENDS, "wb") as ends_file,
        open(folder / _BYTES, "wb") as bytes_file,
    ):
        for batch in _batched(documents):
            encoded = tokenizer.encode_batch(batch)
            ends = np.cumsum([len(ids) + 1 for ids in encoded], dtype="<i8")
            tokens = np.full(ends[-1], tokenizer.end_of_text, dtype)
            for ids, end in zip(encoded, ends, strict=True):
                tokens[end - 1 - len(ids) : end - 1] = ids
            tokens_file.write(tokens.tobytes())
            ends_file.write((total_tokens + ends).tobytes())
            bytes_file.write(np.array([len(text.encode("utf-8")) for text in batch], "<i8").tobytes())
            total_tokens += len(tokens)
            total_documents += len(batch)
    return {"dtype": dtype, "tokens": total_tokens, "documents": total_documents, "tokenizer": tokenizer.name}


def _write_manifest(folder: Path, description: dict[str, Any], totals: dict[str, Any]) -> None:
    samples = {name: content_sample(folder / name) for name in (_TOKENS, _ENDS, _BYTES)}
    manifest = {"description": description, "totals": totals, "samples": samples}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _opened(entry: Path, *, notify: bool = False) -> TokenStream | None:
    """The tokens in a complete entry; None where there is none, or it is damaged."""
    if not entry.exists():
        return None
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        for shard in (_TOKENS, _ENDS, _BYTES):
            if content_sample(entry / shard) != manifest["samples"][shard]:
                raise ValueError(f"{shard} is not what was written")
        totals = manifest["totals"]
        return TokenStream(
            tokens=np.memmap(entry / _TOKENS, totals["dtype"], mode="r", shape=(totals["tokens"],)),
            document_ends=np.memmap(entry / _ENDS, "<i8", mode="r", shape=(totals["documents"],)),
            document_bytes=np.memmap(entry / _BYTES, "<i8", mode="r", shape=(totals["documents"],)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if notify:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"cached tokens in '{entry}' are damaged ({reason}): making them again")
        return None


def _put_in_place(building: Path, entry: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            building.rename(entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _opened(entry) is not None:
            return  # another process was faster
        # Damaged. It is set aside first: renaming is atomic, removing a folder is not.
        damaged = entry.with_name(f"{entry.name}.building.{atomic.unique()}")
        with contextlib.suppress(FileNotFoundError):  # another process set it aside
            entry.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Takes away what killed writers left behind, long enough after that none can still be writing."""
    for building in folder.glob("*.building.*"):
        with contextlib.suppress(FileNotFoundError):  # its writer just finished
            if time.time() - building.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(building, ignore_errors=True)
