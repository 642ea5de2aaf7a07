"""The order of training: batches as pure functions of (seed, step), so that resuming needs only the step.

Plain numpy over the stream. Grain's ``ds[step]`` would do the same for windows at a tenth of the
speed (STACK: 11 against 150 million tokens/s), and its packing iterators must be checkpointed where
ours is a plan one can jump into; of many processes each reads its own rows of the same batch.

A batch is a dict of arrays, ``B`` rows of ``T`` = seq_len positions: ``inputs`` and ``targets``, the
token that follows each input; with packed documents also ``reset``, True where a document or a piece of
one starts, and ``weights``, 0 on padding and 1 elsewhere.
"""

import copy
from functools import lru_cache
from typing import Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer

from seqmodels.data.text.shards import TokenStream
from seqmodels.errors import UserError
from seqmodels.formats.limits import excerpt

Batch = dict[str, np.ndarray]

PACKINGS: Final = ("windows", "documents")


@runtime_checkable
class Batches(Protocol):
    """A training order."""

    rows_per_epoch: int
    order: str

    def with_order(self, order: str) -> "Batches":
        """The same rows in another order, one of ORDERS."""
        ...

    def __call__(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or some rows of it; any step, at the same cost."""
        ...


def train_batches(stream: TokenStream, *, packing: str, seq_len: int, batch_size: int, end_of_text: int, seed: int) -> Batches:
    """The training order of a token stream.

    Raises:
        UserError: the stream does not fill one batch.
    """
    if packing == "documents":
        return PackedDocuments(stream, seq_len=seq_len, batch_size=batch_size, end_of_text=end_of_text, seed=seed)
    return Windows(stream.tokens, seq_len=seq_len, batch_size=batch_size, seed=seed)


class Windows:
    """Contiguous windows of seq_len + 1 tokens, one after the other, shuffled anew each epoch.

    Windows overlap by the one token that is the last target of one and the first input of the next, so
    an epoch has each token as a target once, but for the first and the incomplete last window.
    """

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], *, seq_len: int, batch_size: int, seed: int):
        self.rows_per_epoch = max(len(tokens) - 1, 0) // seq_len
        _check_one_batch(self.rows_per_epoch, batch_size, seq_len, len(tokens))
        self._tokens, self._seq_len = tokens, seq_len
        self._rows = ShuffledRows(self.rows_per_epoch, batch_size, seed)

    @property
    def order(self) -> str:
        """How rows are shuffled."""
        return self._rows.order

    def with_order(self, order: str) -> "Windows":
        """The same rows in another order."""
        return _in_order(self, order)

    def __call__(self, step: int, rows: slice = slice(None)) -> Batch:
        length = self._seq_len
        windows = np.stack([self._tokens[row * length : row * length + length + 1] for row in self._rows(step)[rows]])
        windows = windows.astype(np.int32)
        return {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


class PackedDocuments:
    """Whole documents side by side in rows of seq_len, parted by ``reset``.

    A document is read from an end of text: its first input is that, its last target as well, and every
    token of it is a target once. A document too long for a row is cut into pieces of seq_len; a piece
    starts afresh (``reset``) like a document, with the token before it as its first input. Which pieces
    share a row is decided once (best fit, the longest first), as it does not matter to a model that
    obeys ``reset``; the rows are shuffled anew each epoch.
    """

    def __init__(self, stream: TokenStream, *, seq_len: int, batch_size: int, end_of_text: int, seed: int):
        self._tokens, self._seq_len, self._end_of_text = stream.tokens, seq_len, end_of_text
        starts, lengths = _pieces(np.asarray(stream.document_ends), seq_len)
        order, self._row_ends = pack(lengths, seq_len)
        self._starts, self._lengths = starts[order], lengths[order]
        self.rows_per_epoch = len(self._row_ends)
        _check_one_batch(self.rows_per_epoch, batch_size, seq_len, len(stream))
        self._rows = ShuffledRows(self.rows_per_epoch, batch_size, seed)

    @property
    def order(self) -> str:
        """How rows are shuffled."""
        return self._rows.order

    def with_order(self, order: str) -> "PackedDocuments":
        """The same rows in another order."""
        return _in_order(self, order)

    def __call__(self, step: int, rows: slice = slice(None)) -> Batch:
        chosen = self._rows(step)[rows]
        shape = (len(chosen), self._seq_len)
        batch = {
            "inputs": np.full(shape, self._end_of_text, np.int32),
            "targets": np.full(shape, self._end_of_text, np.int32),
            "reset": np.zeros(shape, np.bool_),
            "weights": np.zeros(shape, np.float32),
        }
        for b, row in enumerate(chosen.tolist()):
            self._fill(batch, b, row)
        return batch

    def _fill(self, batch: Batch, b: int, row: int) -> None:
        first = self._row_ends[row - 1] if row else 0
        column = 0
        for piece in range(first, self._row_ends[row]):
            start, length = self._starts[piece], self._lengths[piece]
            here = slice(column, column + length)
            batch["targets"][b, here] = self._tokens[start : start + length]
            # Before the first token of a document stands the end of the document before it, except at 0,
            # where the array has an end of text already.
            skip = 1 if start == 0 else 0
            batch["inputs"][b, column + skip : column + length] = self._tokens[start + skip - 1 : start + length - 1]
            batch["reset"][b, column] = True
            batch["weights"][b, here] = 1.0
            column += length


PERMUTATION, FEISTEL = ORDERS = ("permutation", "feistel")
MOST_PERMUTED: Final = 1 << 24
"""Rows, up to which the order is an array (128 MiB for each of two epochs); above it is a function."""


class ShuffledRows:
    """An endless sequence of row numbers, each epoch a new permutation, cut into batches.

    Args:
        order: one of ORDERS; None: that of a new run on so many rows. A run keeps the one it was begun with.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, order: str | None = None):
        self._count, self._batch_size, self._seed = rows, batch_size, seed
        self.order = order or (PERMUTATION if rows <= MOST_PERMUTED else FEISTEL)

        @lru_cache(maxsize=2)  # a batch may lie across two epochs
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(rows)

        self._permutation = permutation

    def in_order(self, order: str) -> "ShuffledRows":
        """The same rows, shuffled otherwise.

        Raises:
            UserError: there is no such order here.
        """
        if order not in ORDERS:
            raise UserError(f"rows in the order {excerpt(order)} are not known here, only {', '.join(ORDERS)}: update seqmodels")
        return ShuffledRows(self._count, self._batch_size, self._seed, order)

    def __call__(self, step: int) -> Int[np.ndarray, " B"]:
        epochs, places = np.divmod(step * self._batch_size + np.arange(self._batch_size), self._count)
        return np.concatenate([self._shuffled(int(epoch), places[epochs == epoch]) for epoch in np.unique(epochs)])

    def _shuffled(self, epoch: int, places: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        if self.order == PERMUTATION:
            return self._permutation(epoch)[places]
        return feistel(places, self._count, (self._seed, epoch))


def feistel(places: Int[np.ndarray, " b"], count: int, key: tuple[int, ...]) -> Int[np.ndarray, " b"]:
    """Where a pseudo-random permutation of 0..``count`` - 1 sends some places, at a cost that does not depend on ``count``.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even number of bits, at most 4 times as many as wanted;
    what falls outside is sent on until it falls inside (cycle walking: Black and Rogaway 2002).
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.default_rng(key).integers(0, 1 << 64, 6, dtype=np.uint64)
    sent = places.astype(np.uint64)
    outside = np.ones(len(sent), np.bool_)
    while outside.any():
        left, right = sent[outside] >> half, sent[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        sent[outside] = left << half | right
        outside = sent >= np.uint64(count)
    return sent.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _in_order(batches, order: str):
    other = copy.copy(batches)
    other._rows = batches._rows.in_order(order)
    return other


def pack(lengths: Integer[np.ndarray, " pieces"], capacity: int) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " rows"]]:
    """Best-fit decreasing: pieces of 1..``capacity`` into as few rows as that gives.

    Returns the pieces in the order of their rows, and for each row the end of its pieces in that order.
    """
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    row_of_piece = np.empty(len(lengths), np.int64)
    rows = 0
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room left
    rooms = 0  # bit r is set where open_rows[r] is not empty
    for piece, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_of_piece[piece] = row
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return np.argsort(row_of_piece, kind="stable"), np.cumsum(np.bincount(row_of_piece, minlength=rows))


def _pieces(document_ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths, in the stream, of documents cut into pieces of at most ``seq_len``."""
    document_starts = np.concatenate([[0], document_ends[:-1]])
    document_lengths = document_ends - document_starts
    pieces = -(-document_lengths // seq_len)
    first_piece = np.cumsum(pieces) - pieces
    offsets = (np.arange(pieces.sum()) - np.repeat(first_piece, pieces)) * seq_len
    starts = np.repeat(document_starts, pieces) + offsets
    return starts, np.minimum(seq_len, np.repeat(document_ends, pieces) - starts)


def _check_one_batch(rows: int, batch_size: int, seq_len: int, tokens: int) -> None:
    if rows < batch_size:
        raise UserError(
            f"the training text has {tokens:,} tokens, which make {rows:,} sequences of data.seq_len "
            f"{seq_len:,}: fewer than one batch of {batch_size:,}; use more text, or lower data.seq_len or "
            "data.batch_size"
        )
