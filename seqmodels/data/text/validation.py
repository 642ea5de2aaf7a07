"""The validation text of a run: in a fixed order, with the bytes of text that each token stands for.

Bits per byte compare models with different tokenizers, so the bytes must be counted exactly: each
document's bytes are spread evenly over its tokens, its end of text among them. Over whole documents the
sum is the size of the text, whatever the tokenizer did.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Integer

from seqmodels.data import atomic
from seqmodels.data.text import shards
from seqmodels.data.text.batches import PACKINGS, Batch
from seqmodels.errors import UserError
from seqmodels.formats import npz
from seqmodels.formats.limits import excerpt

FILE_NAME: Final = "validation.npz"
FEW_DOCUMENTS: Final = 50
"""Of fewer documents a mean says little of other text, and no test of a difference holds."""


@dataclass(frozen=True)
class ValidationSet:
    """Held-out tokens, end of text after each document.

    ``document_ends`` and ``document_bytes`` are the index after each document's end of text, and its bytes
    of text; ``tokenizer_name`` says what the tokens are, ``source`` where the text is from. With ``packing``
    "documents" the batches carry ``reset``, as the training batches did.
    """

    tokens: Integer[np.ndarray, " tokens"]
    document_ends: Integer[np.ndarray, " documents"]
    document_bytes: Integer[np.ndarray, " documents"]
    end_of_text: int
    tokenizer_name: str
    source: str
    packing: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, the ends of text counted as tokens."""
        return float(self.document_bytes.sum()) / len(self.tokens)

    @property
    def digest(self) -> str:
        """Of its tokens and documents, ``format:digest``, as the stream of tokens that it was taken from has it."""
        return shards.digest_of(self.tokens, self.document_ends, self.document_bytes)

    def documents_in(self, max_tokens: int | None = None) -> int:
        """How many documents the first ``max_tokens`` tokens are of, or all of them."""
        count = len(self) if max_tokens is None else min(max_tokens, len(self))
        return int(np.searchsorted(self.document_ends, count - 1, side="right")) + 1

    def batches(self, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """All tokens as targets, once each and in order, in windows of ``seq_len`` that do not overlap.

        The text is read from an end of text, so that its first token is a target too. Each batch has
        ``inputs``, ``targets``, ``weights`` (0 on the padding of the last batch), ``bytes`` (of text that
        a target stands for, 0 on padding) and, for packed documents, ``reset``; all [batch_size, seq_len].
        ``max_tokens`` stops after that many targets.
        """
        count = len(self) if max_tokens is None else min(max_tokens, len(self))
        per_batch = batch_size * seq_len
        for begin in range(0, count, per_batch):
            yield self._batch(begin, min(begin + per_batch, count), (batch_size, seq_len))

    def _batch(self, begin: int, end: int, shape: tuple[int, int]) -> Batch:
        size = shape[0] * shape[1]
        inputs = np.full(size, self.end_of_text, np.int32)
        targets = np.full(size, self.end_of_text, np.int32)
        weights, text_bytes = np.zeros(size, np.float32), np.zeros(size, np.float64)
        count, skip = end - begin, 1 if begin == 0 else 0
        targets[:count] = self.tokens[begin:end]
        inputs[skip:count] = self.tokens[begin + skip - 1 : end - 1]
        weights[:count] = 1.0
        text_bytes[:count] = self._bytes_of_targets(begin, end)
        batch = {"inputs": inputs, "targets": targets, "weights": weights, "bytes": text_bytes}
        if self.packing == "documents":
            # A document is read from the end of text before it.
            batch["reset"] = (inputs == self.end_of_text) & (weights > 0)
        return {name: values.reshape(shape) for name, values in batch.items()}

    def _bytes_of_targets(self, begin: int, end: int) -> np.ndarray:
        first, last = np.searchsorted(self.document_ends, [begin, end - 1], side="right")
        here = slice(first, last + 1)  # nothing but these is read: there may be many documents
        ends = np.asarray(self.document_ends[here])
        starts = np.concatenate([self.document_ends[first - 1 : first] if first else [0], ends[:-1]])
        bytes_per_token = self.document_bytes[here] / (ends - starts)
        tokens_inside = np.minimum(ends, end) - np.maximum(starts, begin)
        return np.repeat(bytes_per_token, tokens_inside)


def write(validation: ValidationSet, workdir: str | os.PathLike[str]) -> None:
    """Write a run folder's validation.npz, whole or not at all."""
    with atomic.disk_errors_as_user_errors("workdir", workdir):
        atomic.write_whole(
            Path(workdir) / FILE_NAME,
            lambda file: np.savez(file, **{name: np.asarray(value) for name, value in vars(validation).items()}),
        )


def few_documents(count: int, what: str) -> str | None:
    """What a reader of a score should know of the number of documents it is of, called ``what``; None of enough.

    Pieces of one text are no independent sample of it, so that a text cut in many pieces is one document.
    """
    if count >= FEW_DOCUMENTS:
        return None
    return (
        f"{what}: only {count:,} document{'s' * (count != 1)}, fewer than {FEW_DOCUMENTS}: the score says little of other "
        "text (data.validation_source names more)"
    )


def load_validation(workdir: str | os.PathLike[str], vocab_size: int | None = None) -> ValidationSet:
    """The validation text saved in a run folder; its ids must be below ``vocab_size``, where that is given.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = Path(workdir) / FILE_NAME
    try:
        found = npz.read(path)
    except FileNotFoundError:
        raise UserError(f"'{workdir}' has no {FILE_NAME}: it is not the folder of a run that train.py started") from None
    except npz.Malformed as error:
        raise UserError(f"{error}; running train.py again writes it anew") from error
    try:
        numbers = {name: _array(found, name, "iu", 1) for name in ("tokens", "document_ends", "document_bytes")}
        texts = {name: str(_array(found, name, "U", 0)) for name in ("tokenizer_name", "source", "packing")}
        validation = ValidationSet(**numbers, **texts, end_of_text=int(_array(found, "end_of_text", "iu", 0)))
        _check(validation, vocab_size)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); running train.py again writes it anew") from error
    return validation


def _array(found: Mapping[str, np.ndarray], name: str, kinds: str, dimensions: int) -> np.ndarray:
    if name not in found:
        raise ValueError(f"it lacks {name}")
    if found[name].dtype.kind not in kinds or found[name].ndim != dimensions:
        raise ValueError(f"{name} is {found[name].dtype} of shape {list(found[name].shape)}")
    return found[name]


def _check(validation: ValidationSet, vocab_size: int | None) -> None:
    """Raises ValueError where the arrays do not belong together."""
    ends, text_bytes = validation.document_ends, validation.document_bytes
    if not (ends.ndim == text_bytes.ndim == validation.tokens.ndim == 1 and len(ends) == len(text_bytes) > 0):
        raise ValueError("its arrays have other shapes than were written")
    shards.check_documents(ends, text_bytes, len(validation))
    if not 0 <= validation.end_of_text < (vocab_size or 1 << 31):
        raise ValueError(f"its end of text is {validation.end_of_text}")
    if validation.packing not in PACKINGS:
        raise ValueError(f"its packing is {excerpt(validation.packing)}")
    if vocab_size is not None and not 0 <= validation.tokens.min() <= validation.tokens.max() < vocab_size:
        raise ValueError(f"it has ids beyond the vocabulary of {vocab_size}")
