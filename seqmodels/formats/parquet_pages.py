"""How large the pages of a parquet column become, from their headers: nothing is decompressed.

A page is the part of a column that is decompressed whole. Arrow asks for as much memory as its header says, up to 2 GiB. The
headers are structs of Thrift's compact protocol, of which three numbers are wanted and all else is skipped.
"""

from typing import BinaryIO, Final, NamedTuple

MOST_HEADER: Final = 1 << 24
"""Bytes of a header, as Arrow has it."""
_LIKELY_HEADER: Final = 1 << 10
_MOST_DEPTH: Final = 16
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_SIZE, _COMPRESSED_SIZE, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of a page's header
_VALUES: Final = 1  # field of the struct in the fields above


class Page(NamedTuple):
    """What a page's header says."""

    bytes: int  # when it is decompressed
    compressed: int
    values: int  # none of a page of a dictionary


def pages(file: BinaryIO, begin: int, end: int, values: int) -> list[Page]:
    """The pages of a column's chunk, until there are so many ``values``.

    Raises:
        ValueError: they are no pages.
        OSError: the file cannot be read.
    """
    found: list[Page] = []
    while values > 0 and begin < end:
        page, size = _page(file, begin, end)
        found.append(page)
        begin += size + page.compressed
        values -= page.values
    return found


def _page(file: BinaryIO, begin: int, end: int) -> tuple[Page, int]:
    """The page that begins there, and the bytes of its header."""
    length = _LIKELY_HEADER
    while True:
        file.seek(begin)
        content = file.read(min(length, end - begin))
        try:
            reader = _Reader(content)
            fields = reader.struct(wanted=(_DATA, _DATA_V2))
            break
        except IndexError:
            if length >= MOST_HEADER or len(content) < length:
                raise ValueError("a page's header is cut off") from None
            length *= 8
    sizes = [fields.get(_SIZE), fields.get(_COMPRESSED_SIZE)]
    counts = [fields[name].get(_VALUES) for name in (_DATA, _DATA_V2) if isinstance(fields.get(name), dict)]
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in [*sizes, *counts]):
        raise ValueError("a page's header has no sizes")
    return Page(*sizes, sum(counts)), reader.place


class _Reader:
    """Values of the compact protocol; past the end of ``content`` an IndexError."""

    def __init__(self, content: bytes):
        self._content, self.place = content, 0

    def struct(self, wanted: tuple[int, ...] = (), depth: int = 0) -> dict:
        """Its whole numbers by field, and the structs that are ``wanted``."""
        if depth > _MOST_DEPTH:
            raise ValueError("a page's header is nested too deep")
        fields, field = {}, 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._number()
            value = self._value(kind & 15, depth, is_field=True)
            if isinstance(value, int) or field in wanted:
                fields[field] = value
        return fields

    def _byte(self) -> int:
        byte = self._content[self.place]
        self.place += 1
        return byte

    def _length(self) -> int:
        """An unsigned varint."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a page's header has a number of more than 64 bits")

    def _number(self) -> int:
        value = self._length()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self._content):
            raise IndexError

    def _value(self, kind: int, depth: int, *, is_field: bool = False) -> int | dict | None:
        if kind in (_TRUE, _FALSE):
            return None if is_field else self._skip(1)
        if kind in (_I16, _I32, _I64):
            return self._number()
        if kind == _STRUCT:
            return self.struct(depth=depth + 1)
        if kind in (_LIST, _SET):
            header = self._byte()
            for _ in range(header >> 4 if header >> 4 < 15 else self._length()):
                self._value(header & 15, depth)
        elif kind == _BYTE:
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._length())
        else:  # maps are in no page's header
            raise ValueError("a page's header has a value of no kind")
        return None
