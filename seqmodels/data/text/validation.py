"""The validation text of a run: in a fixed order, with the bytes of text that each token stands for.

Bits per byte compare models with different tokenizers, so the bytes must be counted exactly: each
document's bytes are spread evenly over its tokens, its end of text among them. Over whole documents the
sum is the size of the text, whatever the tokenizer did.
"""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Integer

from seqmodels.data import atomic
from seqmodels.data.text.batches import Batch
from seqmodels.errors import UserError

FILE_NAME: Final = "validation.npz"


@dataclass(frozen=True)
class ValidationSet:
    """Tokens to judge a model by, end of text after each document.

    ``document_ends`` and ``document_bytes`` are the index after each document's end of text, and its bytes
    of text; ``tokenizer_name`` says what the tokens are, ``source`` where the text is from. With ``packing``
    "documents" the batches carry ``reset``, as the training batches did.
    """

    tokens: Integer[np.ndarray, "tokens"]
    document_ends: Integer[np.ndarray, "documents"]
    document_bytes: Integer[np.ndarray, "documents"]
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
        ends = np.asarray(self.document_ends)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        here = slice(first, last + 1)
        starts = np.concatenate([[0], ends])[here]
        bytes_per_token = self.document_bytes[here] / (ends[here] - starts)
        tokens_inside = np.minimum(ends[here], end) - np.maximum(starts, begin)
        return np.repeat(bytes_per_token, tokens_inside)


def write(validation: ValidationSet, workdir: str | os.PathLike[str]) -> None:
    """Write a run folder's validation.npz, whole or not at all."""
    with atomic.disk_errors_as_user_errors("workdir", workdir):
        atomic.write_whole(
            Path(workdir) / FILE_NAME,
            lambda file: np.savez(
                file, **{name: np.asarray(value) for name, value in vars(validation).items()}
            ),
        )


def load_validation(workdir: str | os.PathLike[str]) -> ValidationSet:
    """The validation text saved in a run folder.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = Path(workdir) / FILE_NAME
    try:
        with np.load(path, allow_pickle=False) as saved:
            return ValidationSet(
                tokens=saved["tokens"],
                document_ends=saved["document_ends"],
                document_bytes=saved["document_bytes"],
                end_of_text=int(saved["end_of_text"]),
                tokenizer_name=str(saved["tokenizer_name"]),
                source=str(saved["source"]),
                packing=str(saved["packing"]),
            )
    except FileNotFoundError:
        raise UserError(
            f"'{workdir}' has no {FILE_NAME}: it is not the folder of a run that train.py started"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is damaged ({error}); running train.py again writes it anew") from error
