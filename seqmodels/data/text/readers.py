"""Read the documents of one file, parquet, text or JSON lines, in bounded memory.

Every reader is a generator of pieces of documents, as they stand in the file but for lone surrogates, which become U+FFFD
(``unicode``). A document is a row, a JSON line, the text between two separators, or a text file without any. Documents
without text (null, or white space only) are left out and counted. What is wrong with a file is one ``UserError`` line that
names it.
"""

import codecs
import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from seqmodels import failures
from seqmodels.data.text.unicode import well_formed, without_mark
from seqmodels.errors import UserError
from seqmodels.formats import parquet_pages
from seqmodels.formats.limits import excerpt, open_file, size

SEPARATOR: Final = "<|endoftext|>"
LONGEST_PIECE: Final = 1 << 20
"""Characters. A longer document of a text file comes in several pieces, so that memory stays bounded."""

NULL: Final = "null"
BLANK: Final = "blank"
EMPTY_FILE: Final = "empty file"
"""Why a document was left out: its text is null; it is white space only; its file has no byte."""

_JSON_LINES: Final = (".jsonl", ".ndjson", ".json")
_TABLE: Final = "a table, of which no column is read: save its texts as .parquet or .jsonl, in a column 'text'"
_SAVED: Final = (
    "as datasets saves it (save_to_disk), which is not read: load_from_disk(FOLDER)[SPLIT].to_parquet(FILE) makes .parquet"
)
_PACKED: Final = "compressed, and is not read so: unpack it"
_REFUSED: Final = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".feather", ".orc", ".avro"), _TABLE), ".arrow": _SAVED,
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4", ".7z", ".tar", ".tgz"), _PACKED),
}  # fmt: skip
# What a file begins with that is no UTF-8.
_BEGINNINGS: Final = (
    (b"\xff\xfe\0\0", "text in UTF-32: save it in UTF-8"), (b"\0\0\xfe\xff", "text in UTF-32: save it in UTF-8"),
    (b"\xff\xfe", "text in UTF-16: save it in UTF-8"), (b"\xfe\xff", "text in UTF-16: save it in UTF-8"),
    (b"\x1f\x8b", _PACKED), (b"\x28\xb5\x2f\xfd", _PACKED), (b"BZh", _PACKED), (b"\xfd7zXZ", _PACKED), (b"PK\3\4", _PACKED),
    (b"PAR1", "parquet: give it the ending .parquet"),
)  # fmt: skip
_CHUNK: Final = 1 << 20
_MOST_PAGE: Final = 1 << 26
_MOST_EXPANSION: Final = 64
"""Of a page of parquet that is larger: text is compressed to a third, or a tenth."""
_MOST_BATCH: Final = 1 << 28
"""Bytes of rows that are read at once, unless one row has more."""
_LONGEST_LINE: Final = 1 << 26
"""Bytes of a JSON line; a file without line ends is not read whole before it is refused."""
_NEAR: Final = 1 << 16
"""Bytes. So far from where a text is to be cut in two a paragraph's end is looked for."""
_ROWS_LOOKED_AT: Final = 20
_COLUMN: Final = re.compile(r"\w(?:[\w .()#%/:-]{0,38}[\w.)#%])?")
"""A name of a table's column: words without a comma's space before them."""
_LONGEST_CHARACTER: Final = 4
"""Bytes, in UTF-8."""


class Piece(NamedTuple):
    """A part of a document; the parts of one follow each other."""

    text: str
    ends: bool
    """Whether it is the document's last one."""


def pieces(path: Path, left_out: Counter[str], *, begin: int = 0, end: int | None = None) -> Iterator[Piece]:
    """The documents of a file, in its order; the ending of its name says what it is: .parquet, JSON lines, a table
    of another kind, which is refused, or, any other, plain text.

    Args:
        left_out: counts the documents without text, by reason (`NULL`, `BLANK`).
        begin, end: of plain text, the bytes to read.

    Raises:
        UserError: the file is empty, damaged, not text, or has no text under ``text``.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"'{path}' is empty: it must hold text to read")
        check_ending(path)
        if is_plain_text(path):
            yield from _plain_text(path, left_out, begin, end)
        else:
            yield from whole(_parquet(path) if path.suffix.lower() == ".parquet" else _json_lines(path), left_out)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def whole(texts: Iterator[str | None], left_out: Counter[str]) -> Iterator[Piece]:
    """Documents that were read whole: those with text, well formed; the others counted."""
    for text in texts:
        if text is None:
            left_out[NULL] += 1
        elif not text or text.isspace():
            left_out[BLANK] += 1
        else:
            yield Piece(well_formed(text), ends=True)


def is_plain_text(path: Path) -> bool:
    """Whether the ending of a file's name makes it plain text."""
    return path.suffix.lower() not in (".parquet", *_JSON_LINES)


def is_empty(path: Path) -> bool:
    """Whether a file of text or JSON lines has no byte; of parquet that is damage, which its reader says.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.suffix.lower() != ".parquet" and path.stat().st_size == 0
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error


def check_ending(path: Path) -> None:
    """Raises UserError where the ending of a file's name says that it holds other than texts: rows of a table, an archive."""
    kind = _REFUSED.get(path.suffix.lower())
    if kind is not None:
        raise UserError(f"'{path}' is {kind}")


def text_bytes(path: Path) -> int:
    """About how many bytes of text the file holds, without reading it; only progress bars use it."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    metadata = _open_parquet(path).metadata
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def looks_like(path: Path) -> str | None:
    """What a plain text begins like that is none, and what to do, in words; None where it looks like text.

    JSON lines are two lines, or one alone, that are objects with a text. A table is a line of names parted by tabs, commas,
    semicolons or bars, and rows of as many values.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.read(_NEAR)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    lines = list(io.StringIO(without_mark(beginning.decode("utf-8", "replace"))))
    is_whole = len(beginning) < _NEAR
    if _are_json_lines([line for line in lines[: 2 if is_whole else min(2, len(lines) - 1)] if line.strip()]):
        return "JSON lines and is read as plain text: with the ending .jsonl, its texts are"
    names = _table_names(lines, is_whole)
    if names:
        shown = ", ".join([*map(excerpt, names[:3]), *["..."][: len(names) > 3]])
        return f"a table ({shown}) and is read as plain text: save its texts as .parquet or .jsonl, in a column 'text'"
    return None


def _are_json_lines(lines: list[str]) -> bool:
    try:
        rows = [json.loads(line, parse_int=_number) for line in lines]
    except (ValueError, RecursionError):
        return False
    return bool(rows) and all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows)


def _table_names(lines: list[str], are_whole: bool) -> list[str]:
    """The names of a table's columns, none where the lines are no table. ``are_whole``: the file has no more of them."""
    for delimiter in "\t,;|":
        rows: list[list[str]] = []
        try:
            rows += itertools.islice(csv.reader(lines, delimiter=delimiter, strict=True), _ROWS_LOOKED_AT)
            is_cut = not are_whole and len(rows) < _ROWS_LOOKED_AT
        except csv.Error as error:
            if are_whole or "end of data" not in str(error):  # of a row that is cut off inside quotation marks
                continue
            is_cut = False
        rows = [row for row in (rows[:-1] if is_cut else rows) if row]
        names = rows[0] if rows else []
        # What writes a table with the rows' numbers leaves the first name empty.
        are_names = len(set(names)) == len(names) > 1 and all(map(_COLUMN.fullmatch, names[names[0] == "" :]))
        if are_names and len(rows) > 1 and all(len(row) == len(names) for row in rows):
            return names
    return []


def has_separator(path: Path) -> bool:
    """Whether there is a ``<|endoftext|>`` anywhere in the file.

    Raises:
        UserError: the file cannot be read.
    """
    wanted, before = SEPARATOR.encode(), b""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                if wanted in before + chunk:
                    return True
                before = chunk[-len(wanted) :]
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    return False


def place_to_cut(path: Path, share: float) -> int:
    """Where, in bytes, a text is cut in two: after about ``share`` of it, at the next end of a paragraph, line or word.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        size = path.stat().st_size
        target = int(size * share)
        with open(path, "rb") as file:
            file.seek(target)
            near = file.read(min(_NEAR, max((size - target) // 2, _LONGEST_CHARACTER)))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    for end in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        found = near.find(end)
        if found >= 0:
            return target + found + len(end)
    # In a line without end, at the next character: bytes 80 to BF go on with one.
    return target + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), len(near))


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _not_read(path, error, "not a readable parquet file") from error


def _not_read(path: Path, error: Exception, what: str) -> UserError:
    """Why a file of a library's is not read: something in the way now, or damage, which is called ``what``."""
    reason = failures.obstacle(error) or (os.strerror(error.errno) if isinstance(error, FileNotFoundError) else None)
    if reason is not None:
        return UserError(f"cannot read '{path}': {reason}")
    return UserError(f"'{path}' is {what} ({_first_line(error)}); fetch it again")


def _parquet(path: Path) -> Iterator[str | None]:
    import pyarrow

    file = _open_parquet(path)
    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(f"'{path}' has no column 'text' (its columns: {', '.join(names)}); rename the one to train on")
    if names.count("text") > 1:
        raise UserError(f"'{path}' has {names.count('text')} columns 'text'; rename all but the one to train on")
    kind = file.schema_arrow.field("text").type
    if not _holds_strings(kind):
        raise UserError(f"the column 'text' of '{path}' holds {kind}, not strings; convert it")
    try:
        for group in range(file.metadata.num_row_groups):
            rows = _rows_at_a_time(path, file.metadata.row_group(group))
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=["text"]):
                yield from batch.column(0).to_pylist()
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _not_read(path, error, "damaged") from error


def _rows_at_a_time(path: Path, group: Any) -> int:
    """How many rows of a row group are read at once, so that memory is bounded by what the file has, whatever it expands to: each row
    may need a page of its own, or a value of the dictionary.

    Raises:
        UserError: a page expands beyond all text.
        ValueError: its pages are damaged.
    """
    column = next(found for found in map(group.column, range(group.num_columns)) if found.path_in_schema == "text")
    begin = min(place for place in (column.dictionary_page_offset, column.data_page_offset) if place)
    with open_file(path) as file:
        # Arrow reads so much further in files of an older writer, which left the dictionary's header out of the size.
        pages = parquet_pages.pages(file, begin, begin + column.total_compressed_size + 100, column.num_values)
    largest = 1
    for page in pages:
        if page.bytes > max(_MOST_PAGE, _MOST_EXPANSION * page.compressed):
            raise UserError(f"'{path}' is not read: {page.compressed:,} bytes of it expand to {size(page.bytes)}")
        largest = max(largest, page.bytes)
    return max(1, min(1024, _MOST_BATCH // largest))


def _holds_strings(kind: Any) -> bool:
    """Whether an Arrow type is one of its forms of strings, or a column without any value."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(kind) for test in tests)


def _json_lines(path: Path) -> Iterator[str | None]:
    with open(path, "rb") as file:
        lines, position = iter(lambda: file.readline(_LONGEST_LINE), b""), 0
        for number, line in enumerate(lines, start=1):
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                raise UserError(
                    f"line {number} of '{path}' is longer than {_LONGEST_LINE >> 20} MiB: part it, or save it as .parquet"
                )
            try:
                # A lone surrogate may stand as three bytes, too.
                content = line.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise UserError(_not_text(path, position + error.start)) from error
            position += len(line)
            content = without_mark(content) if number == 1 else content
            if not content or content.isspace():
                continue
            try:
                text = _text_in(json.loads(content, parse_int=_number, object_pairs_hook=_fields))
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
                raise UserError(
                    f"line {number} of '{path}' is not a JSON object with a field 'text' ({reason}): "
                    'each line must be like {"text": "Once upon a time ..."}'
                ) from error
            if not isinstance(text, str | None):
                raise UserError(f"the field 'text' on line {number} of '{path}' is not a string")
            yield text


def _text_in(row: Any) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}")
    if "text" not in row:
        raise ValueError(f"it has {', '.join(map(excerpt, list(row)[:5])) or 'no field'}")
    return row["text"]


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of whose texts none takes another's place."""
    row = dict(pairs)
    if len(row) != len(pairs) and [name for name, _ in pairs].count("text") > 1:
        raise ValueError("'text' is there twice in one object")
    return row


def _number(digits: str) -> int:
    """In place of a number beside the text, which is not used: Python refuses those of more than 4,300 digits."""
    return 0


def _plain_text(path: Path, left_out: Counter[str], begin: int, end: int | None) -> Iterator[Piece]:
    """Texts parted by ``<|endoftext|>``, without the newlines around them; a text of white space only is none."""
    rest, is_new = "", True  # what is not yet given of the text that is being read; whether that is all of it
    is_parted = False  # by a separator, behind the last of which there need be no text

    def given(text: str, ends: bool) -> Iterator[Piece]:
        nonlocal is_new
        if is_new:
            text = text.lstrip("\r\n")
        if ends:
            text = text.rstrip("\r\n")
        if not is_new or (text and not text.isspace()):
            yield Piece(text, ends)
            is_new = ends
        elif ends:
            left_out[BLANK] += 1

    for chunk in _decoded(path, begin, end):
        *texts, rest = (rest + chunk).split(SEPARATOR)
        for text in texts:
            while len(text) > LONGEST_PIECE:
                piece, text = _cut(text)
                yield from given(piece, ends=False)
            yield from given(text, ends=True)
            is_parted = True
        # What is kept back is longer than a separator, whose first half may end this chunk.
        while len(rest) > LONGEST_PIECE + len(SEPARATOR):
            piece, rest = _cut(rest)
            yield from given(piece, ends=False)
    while len(rest) > LONGEST_PIECE:
        piece, rest = _cut(rest)
        yield from given(piece, ends=False)
    if not (is_parted and is_new and (not rest or rest.isspace())):
        yield from given(rest, ends=True)


def _cut(text: str) -> tuple[str, str]:
    """A piece of a text, and the rest: before the white space at the end of a line or of a word, where there is one.

    There a byte-level tokenizer that splits text as GPT-2's does has a boundary anyway: the pieces' tokens are the text's.
    """
    for space in "\n ":
        found = text.rfind(space, LONGEST_PIECE // 2, LONGEST_PIECE)
        end = len(text[: max(found, 0)].rstrip())
        if end:
            return text[:end], text[end:]
    return text[:LONGEST_PIECE], text[LONGEST_PIECE:]


def _decoded(path: Path, begin: int, end: int | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = begin
    with open(path, "rb") as file:
        file.seek(begin)
        while True:
            chunk = file.read(_CHUNK if end is None else min(_CHUNK, end - position))
            start = position - len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(_not_text(path, start + error.start)) from error
            if "\0" in text:
                raise UserError(_not_text(path, start + len(text[: text.index("\0")].encode())))
            yield text if position else without_mark(text)
            position += len(chunk)
            if not chunk:
                return


def _not_text(path: Path, position: int) -> str:
    with open(path, "rb") as file:
        beginning = file.read(8)
    kind = next((kind for bytes_, kind in _BEGINNINGS if beginning.startswith(bytes_)), None)
    if kind is not None:
        return f"'{path}' is {kind}"
    return f"'{path}' is not UTF-8 text (see byte {position:,}): data is .parquet, .jsonl, or text parted by {SEPARATOR}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
