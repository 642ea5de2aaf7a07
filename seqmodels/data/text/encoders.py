"""Batches of text as numbers, by several processes where there is enough of it: the same numbers, in the same order, as by one.

This process reads the text and writes the tokens; the others turn one batch each into tokens, and each has one batch at a time, so
that memory is bounded. They are child processes that communicate through pipes: a pipe ends with whoever held its other end,
however that ended, and so do they.
"""

import contextlib
import io
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt

from seqmodels.data.text.readers import Piece
from seqmodels.data.text.tokenizer import LibraryTokenizer, Tokenizer
from seqmodels.errors import UserError

BYTES_PER_PROCESS: Final = 1 << 25
"""Of text for each process beside this one: less is done before it has started."""
MOST_PROCESSES: Final = 32
"""More wait for this one to read."""
_LENGTH: Final = struct.Struct("<Q")
_PROGRAM: Final = "from seqmodels.data.text import encoders; encoders.serve()"


class Encoded(NamedTuple):
    """A batch of n pieces of documents."""

    tokens: UInt[np.ndarray, " tokens"]
    """End of text after every piece that ends its document."""
    after: Int64[np.ndarray, " n"]
    """How many tokens there are after each piece."""
    text_bytes: Int64[np.ndarray, " n"]
    """How many bytes of text there are after each piece."""
    ends: Bool[np.ndarray, " n"]


def encode(batch: list[Piece], tokenizer: Tokenizer) -> Encoded:
    """The numbers of a batch.

    Raises:
        UserError: the tokenizer gives an id that is not in its vocabulary.
    """
    encoded = tokenizer.encode_batch([piece.text for piece in batch])
    ends = np.array([piece.ends for piece in batch])
    after = np.cumsum([len(ids) for ids in encoded] + ends, dtype="<i8")
    tokens = np.full(after[-1], tokenizer.end_of_text, np.int64)
    for ids, end in zip(encoded, after - ends, strict=True):
        tokens[end - len(ids) : end] = ids
    _check_ids(tokens, tokenizer)
    text_bytes = np.cumsum([len(piece.text.encode("utf-8")) for piece in batch], dtype="<i8")
    return Encoded(tokens.astype(dtype_of(tokenizer.vocab_size)), after, text_bytes, ends)


def dtype_of(vocab_size: int) -> str:
    """The type of tokens on the disk."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _check_ids(ids: Int64[np.ndarray, " tokens"], tokenizer: Tokenizer) -> None:
    """Ids beyond the vocabulary would be cut by the type of the shard, or read as other rows of the embedding."""
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(wrong):
        raise UserError(
            f"the tokenizer {tokenizer.name} gives the id {wrong[0]}, which is not in its vocabulary of "
            f"{tokenizer.vocab_size}: its tokenizer.json is damaged"
        )


def processes_for(text_bytes: int, tokenizer: Tokenizer) -> int:
    """How many processes beside this one are worth their start for so much text; 0 where this one does it alone."""
    if not isinstance(tokenizer, LibraryTokenizer):
        return 0  # bytes are read no faster than they are encoded
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, text_bytes // BYTES_PER_PROCESS, MOST_PROCESSES) if cores > 1 else 0


def encoded(batches: Iterable[list[Piece]], tokenizer: Tokenizer, *, processes: int) -> Iterator[Encoded]:
    """The numbers of each batch, in their order; with ``processes`` batches beyond this one read ahead.

    Raises:
        UserError: the tokenizer gives an id that is not in its vocabulary; a process was killed.
    """
    if not processes:
        for batch in batches:
            yield encode(batch, tokenizer)
        return
    with contextlib.ExitStack() as stack:
        idle = deque(stack.enter_context(_Child(tokenizer)) for _ in range(processes))
        busy: deque[_Child] = deque()
        for batch in batches:
            if not idle:
                child = busy.popleft()
                yield child.answer()
                idle.append(child)
            child = idle.popleft()
            child.ask(batch)
            busy.append(child)
        while busy:
            yield busy.popleft().answer()


class _Child:
    """Another process that encodes one batch at a time, until it is left."""

    def __init__(self, tokenizer: LibraryTokenizer):
        places = [path or os.getcwd() for path in sys.path]  # "" is the folder in which a program is typed in
        environment = {"PYTHONPATH": os.pathsep.join(places), "TOKENIZERS_PARALLELISM": "false"}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment,
            start_new_session=True,  # a Ctrl-C is for this process, which ends them
        )  # fmt: skip
        self._tokenizer = tokenizer

    def __enter__(self) -> "_Child":
        ends = np.array(self._tokenizer.ends, "<i8")
        self._send(json=np.frombuffer(self._tokenizer.to_json().encode("utf-8"), np.uint8), ends=ends)
        return self

    def __exit__(self, *_) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):  # what was in a buffer for a process that has ended
                pipe.close()

    def ask(self, batch: list[Piece]) -> None:
        """Give it a batch."""
        texts = [piece.text.encode("utf-8") for piece in batch]
        self._send(
            text=np.frombuffer(b"".join(texts), np.uint8),
            lengths=np.array([len(text) for text in texts], "<i8"),
            ends=np.array([piece.ends for piece in batch]),
        )

    def answer(self) -> Encoded:
        """The numbers of that batch, when it has them."""
        fields = _received(self._child.stdout)
        if fields is None:
            raise self._ended()
        if "error" in fields:
            raise UserError(fields["error"].tobytes().decode("utf-8"))
        return Encoded(**fields)

    def _send(self, **fields: np.ndarray) -> None:
        try:
            _send(self._child.stdin, **fields)
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> UserError:
        return UserError(
            f"a process that makes tokens has ended (status {self._child.wait()}; out of memory?); start the same command again"
        )


def serve() -> None:
    """Encode the batches on standard input until it ends: what a child does."""
    from tokenizers import Tokenizer as Library

    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    about = _received(questions)
    if about is None:
        return
    tokenizer = LibraryTokenizer(Library.from_str(about["json"].tobytes().decode("utf-8")), about["ends"].tolist())
    with contextlib.suppress(BrokenPipeError):  # the other end is closed
        while (fields := _received(questions)) is not None:
            bounds = np.concatenate([[0], np.cumsum(fields["lengths"])])
            text = fields["text"].tobytes()
            batch = [
                Piece(text[begin:end].decode("utf-8"), bool(ends))
                for begin, end, ends in zip(bounds[:-1], bounds[1:], fields["ends"], strict=True)
            ]
            try:
                _send(answers, **encode(batch, tokenizer)._asdict())
            except UserError as error:
                _send(answers, error=np.frombuffer(str(error).encode("utf-8"), np.uint8))
    sys.stdout = None  # at exit Python would write to it again


def _send(pipe: BinaryIO, **fields: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, **fields)
    content = file.getbuffer()
    pipe.write(_LENGTH.pack(len(content)))
    pipe.write(content)
    pipe.flush()


def _received(pipe: BinaryIO) -> dict[str, Any] | None:
    """What was sent; None where the other end is closed."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    [length] = _LENGTH.unpack(head)
    content = pipe.read(length)
    if len(content) < length:
        return None
    with np.load(io.BytesIO(content)) as fields:
        return dict(fields)
