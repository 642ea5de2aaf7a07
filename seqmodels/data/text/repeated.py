"""Held-out documents that are in the training text, too: a score of them says how well a model remembers.

Files that hold the same bytes are found before they are read (`sources`). Here documents are compared by their tokens, wherever
they come from: the same text as JSON lines and as plain text, with other line ends, or twice in one file.

The answer is kept beside the cached tokens, under a digest of both texts' tokens: only the first run on a text reads it all.
"""

import contextlib
import json
import os
from typing import Any, Final, NamedTuple

import numpy as np

from seqmodels.data import atomic
from seqmodels.data.fingerprint import key_of
from seqmodels.data.text.shards import TokenStream
from seqmodels.data.text.validation import ValidationSet
from seqmodels.errors import UserError
from seqmodels.formats import json_text

_LOOKED_AT: Final = 500
"""Held-out documents, evenly spread."""
_MOST_COMPARED: Final = 1_000_000
"""Training documents that have as many tokens and bytes as one of those looked at, from the first: some seconds."""
_VERSION: Final = 1
"""Of the answers that are kept: raise it when they are counted otherwise."""


class Repeated(NamedTuple):
    """How many held-out documents are in the training text, of how many that were looked at; and how many documents of the
    training text were, of how many there are."""

    found: int
    looked_at: int
    searched: int
    documents: int


def count(train: TokenStream, held_out: ValidationSet) -> Repeated:
    """Compare some held-out documents with all of the training text."""
    documents = len(held_out.document_ends)
    wanted: dict[bytes, int] = {}
    starts = _starts(held_out.document_ends)
    chosen = np.unique(np.linspace(0, documents - 1, min(documents, _LOOKED_AT)).astype(np.int64))
    for number in chosen:
        tokens = np.asarray(held_out.tokens[starts[number] : held_out.document_ends[number]])
        key = tokens.astype(np.uint32).tobytes()
        wanted[key] = wanted[key] + 1 if key in wanted else 1
    ends = np.asarray(train.document_ends)
    begins = _starts(ends)
    sizes = _sizes(ends - begins, np.asarray(train.document_bytes))
    alike = np.flatnonzero(np.isin(sizes, _sizes((held_out.document_ends - starts)[chosen], held_out.document_bytes[chosen])))
    searched = int(alike[_MOST_COMPARED]) if len(alike) > _MOST_COMPARED else len(ends)
    found: set[bytes] = set()
    for number in alike[:_MOST_COMPARED]:
        key = np.asarray(train.tokens[int(begins[number]) : int(ends[number])]).astype(np.uint32).tobytes()
        if key in wanted:
            found.add(key)
    return Repeated(sum(wanted[key] for key in found), len(chosen), searched, len(ends))


def known(cache_dir: str | os.PathLike[str], train: TokenStream, held_out: ValidationSet, digests: dict[str, str]) -> Repeated:
    """`count`, or what the cache has of it; an answer that is damaged there is counted again, and replaced.

    Args:
        digests: of both, by ``train`` and ``validation``.
    """
    asked = {"tokens": digests, "looked_at": _LOOKED_AT, "compared": _MOST_COMPARED, "version": _VERSION}
    path = atomic.expanded(cache_dir) / "repeated" / f"{key_of(asked)}.json"
    with contextlib.suppress(OSError, UserError):
        kept = json_text.read(path)
        if _is_answer(kept) and kept["digest"] == json_text.digest([asked, kept["answer"]]):
            return Repeated(*kept["answer"])
    answer = count(train, held_out)
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written: it is counted again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, json.dumps({"answer": list(answer), "digest": json_text.digest([asked, list(answer)])}))
    return answer


def _is_answer(kept: Any) -> bool:
    return (
        isinstance(kept, dict)
        and kept.keys() == {"answer", "digest"}
        and isinstance(kept["answer"], list)
        and [type(number) for number in kept["answer"]] == [int] * len(Repeated._fields)
    )


def note(of: Repeated) -> str | None:
    """What a person should know before training; None where less than one in a hundred is found again."""
    if of.found * 100 < of.looked_at:
        return None
    part = "" if of.searched == of.documents else f" (its first {of.searched:,} of {of.documents:,} documents)"
    return (
        f"{of.found:,} of {of.looked_at:,} held-out documents that were looked at are in the training text{part}, too: a score of "
        "them says what is remembered (data.validation_source names other text)"
    )


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else np.zeros(0, np.int64)


def _sizes(tokens: np.ndarray, text_bytes: np.ndarray) -> np.ndarray:
    """One number for each pair; other pairs may share it."""
    return (tokens.astype(np.int64) << 32) ^ text_bytes.astype(np.int64)
