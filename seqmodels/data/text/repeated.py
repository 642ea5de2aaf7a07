"""Held-out documents that are in the training text, too: a score of them says how well a model remembers.

Files that hold the same bytes are found before they are read (`sources`). Here documents are compared by their tokens, wherever
they come from: the same text as JSON lines and as plain text, with other line ends, or twice in one file.
"""

from typing import Final

import numpy as np

from seqmodels.data.text.shards import TokenStream
from seqmodels.data.text.validation import ValidationSet

_LOOKED_AT: Final = 500
"""Held-out documents, evenly spread."""
_MOST_TOKENS: Final = 1 << 26
"""Of the training text, from its beginning: 0.5 s where they are on the disk."""
_MOST_COMPARED: Final = 100_000
"""Training documents that have as many tokens and bytes as one of those looked at."""


def count(train: TokenStream, held_out: ValidationSet) -> tuple[int, int]:
    """How many held-out documents are known to be in the training text, and of how many that were looked at."""
    documents = len(held_out.document_ends)
    wanted: dict[bytes, int] = {}
    starts = _starts(held_out.document_ends)
    chosen = np.unique(np.linspace(0, documents - 1, min(documents, _LOOKED_AT)).astype(np.int64))
    for number in chosen:
        tokens = np.asarray(held_out.tokens[starts[number] : held_out.document_ends[number]])
        key = tokens.astype(np.uint32).tobytes()
        wanted[key] = wanted[key] + 1 if key in wanted else 1
    ends = np.asarray(train.document_ends)
    ends = ends[ends <= _MOST_TOKENS]
    begins = _starts(ends)
    sizes = _sizes(ends - begins, np.asarray(train.document_bytes)[: len(ends)])
    alike = np.isin(sizes, _sizes((held_out.document_ends - starts)[chosen], held_out.document_bytes[chosen]))
    found: set[bytes] = set()
    for number in np.flatnonzero(alike)[:_MOST_COMPARED]:
        key = np.asarray(train.tokens[int(begins[number]) : int(ends[number])]).astype(np.uint32).tobytes()
        if key in wanted:
            found.add(key)
    return sum(wanted[key] for key in found), len(chosen)


def note(train: TokenStream, held_out: ValidationSet) -> str | None:
    """What a person should know before training; None where less than one in a hundred is found again."""
    found, looked_at = count(train, held_out)
    if found * 100 < looked_at:
        return None
    return (
        f"{found:,} of {looked_at:,} held-out documents that were looked at are in the training text, too: a score of them says what "
        "is remembered (data.validation_source names other text)"
    )


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else np.zeros(0, np.int64)


def _sizes(tokens: np.ndarray, text_bytes: np.ndarray) -> np.ndarray:
    """One number for each pair; other pairs may share it."""
    return (tokens.astype(np.int64) << 32) ^ text_bytes.astype(np.int64)
