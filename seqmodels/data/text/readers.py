"""Read the documents of one file, parquet, text or JSON lines, in bounded memory.

Every reader is a generator of texts, exactly as they stand in the file; texts of white space only
are left out. What is wrong with a file is one ``UserError`` line that names it.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from seqmodels.errors import UserError

SEPARATOR: Final = "<|endoftext|>"
LONGEST_DOCUMENT: Final = 1 << 20
"""Characters. A longer text is read as several documents, so that memory stays bounded."""
UNPARTED_DOCUMENT: Final = 1 << 13
"""Characters. A text file without any separator is read as documents of about this length."""

_CHUNK: Final = 1 << 20
_LONGEST_LINE: Final = 1 << 26
"""Bytes of a JSON line; a file without line ends is not read whole before it is refused."""


def documents(path: Path) -> Iterator[str]:
    """The texts of a file, in its order; the ending of its name says what it is, any other than
    .parquet, .jsonl and .json is plain text.

    Raises:
        UserError: the file is empty, damaged, not text, or has no text under ``text``.
    """
    if path.stat().st_size == 0:
        raise UserError(f"'{path}' is empty: it must hold text to read")
    read = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json_lines}
    texts = read[path.suffix.lower()](path) if path.suffix.lower() in read else _plain_text(path)
    try:
        yield from (text for text in texts if text and not text.isspace())
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def text_bytes(path: Path) -> int:
    """About how many bytes of text the file holds, without reading it; only progress bars use it."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    metadata = _open_parquet(path).metadata
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"'{path}' is not a readable parquet file ({_first_line(error)}); fetch it again"
        ) from error


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow

    file = _open_parquet(path)
    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(
            f"'{path}' has no column 'text' (its columns: {', '.join(names)}); rename the one to train on"
        )
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"the column 'text' of '{path}' holds {kind}, not strings; convert it")
    try:
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged ({_first_line(error)}); fetch it again") from error


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"line {number} of '{path}' is not a JSON object with a field 'text': "
                    'each line must be like {"text": "Once upon a time ..."}'
                ) from error
            if not isinstance(text, str):
                raise UserError(f"the field 'text' on line {number} of '{path}' is not a string")
            yield text


def _plain_text(path: Path) -> Iterator[str]:
    """Texts parted by ``<|endoftext|>``, without the newlines around them."""
    limit = LONGEST_DOCUMENT if _has_separator(path) else UNPARTED_DOCUMENT
    rest = ""
    for chunk in _decoded(path):
        *whole, rest = (rest + chunk).split(SEPARATOR)
        for text in whole:
            while len(text) > limit:
                piece, text = _cut(text, limit)
                yield piece
            yield text.strip("\r\n")
        # What is kept back is longer than a separator, whose first half may end this chunk.
        while len(rest) > limit + len(SEPARATOR):
            piece, rest = _cut(rest, limit)
            yield piece
    while len(rest) > limit:
        piece, rest = _cut(rest, limit)
        yield piece
    yield rest.strip("\r\n")


def _cut(text: str, limit: int) -> tuple[str, str]:
    """The first ``limit`` characters or somewhat less, to the end of a line or of a word; and the rest."""
    end = max(text.rfind("\n", limit // 2, limit), 0) or max(text.rfind(" ", limit // 2, limit), 0) or limit
    return text[:end].strip("\r\n"), text[end:]


def _has_separator(path: Path) -> bool:
    with open(path, "rb") as file:
        return SEPARATOR.encode() in file.read(4 * _CHUNK)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            begin = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(_not_text(path, begin + error.start)) from error
            if "\0" in text:
                raise UserError(_not_text(path, begin + len(text[: text.index("\0")].encode())))
            yield text if position else text.removeprefix("\ufeff")
            position += len(chunk)
            if not chunk:
                return


def _not_text(path: Path, position: int) -> str:
    return (
        f"'{path}' is not UTF-8 text (see byte {position:,}): data is .parquet, .jsonl, or text parted by "
        f"{SEPARATOR}"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
