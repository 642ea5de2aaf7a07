"""Arrays by name, as ``numpy.savez`` writes them: a zip archive of .npy members that are not compressed.

What an archive asks for is bounded by its own size: compressed members, and members that share bytes, are refused. A
member's header is matched against the one form that numpy writes, not evaluated as Python, and an object, which only
a pickle could hold, has no place in that form.
"""

import math
import os
import re
import struct
import zipfile
from typing import BinaryIO, Final

import numpy as np

from seqmodels.formats.limits import Malformed, open_file, size

MOST_MEMBERS: Final = 10_000
MOST_DIMENSIONS: Final = 32
_MOST_HEADER_BYTES: Final = 4096
_MOST_DIRECTORY_BYTES: Final = 4 << 20
_SUFFIX: Final = ".npy"

_HEADER: Final = re.compile(
    rb"\{'descr': '([<>|][biufcUSV][0-9]{1,9})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,19}, ?)*(?:[0-9]{1,19})?)\), ?\} *\n"
)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Raises:
        Malformed: it is no such archive, is cut off or damaged (every member has a checksum), or is refused as above.
        OSError: the system cannot read it.
    """
    with open_file(path) as file:
        length = os.fstat(file.fileno()).st_size
        try:
            _check_directory(file, length)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check(path, members, length)
                return {member.filename.removesuffix(_SUFFIX): _array(archive, member) for member in members}
        except Malformed:
            raise
        except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise Malformed(f"{path} is damaged, or not an .npz file ({reason or type(error).__name__})") from None


def _check_directory(file: BinaryIO, length: int) -> None:
    """`zipfile` reads the archive's directory whole, before one can look at it: its size, from where that is written."""
    file.seek(max(0, length - 98))
    end = file.read().rjust(98, b"\0")  # 56 bytes and 20 that only a large archive has, and 22
    if end[76:80] != b"PK\5\6":
        raise ValueError("it does not end as one")
    directory_bytes = int.from_bytes(end[88:92], "little")
    if end[56:60] == b"PK\6\7":
        directory_bytes = max(directory_bytes, int.from_bytes(end[40:48], "little"))
    if directory_bytes > _MOST_DIRECTORY_BYTES:
        raise ValueError(f"a directory of {size(directory_bytes)}")


def _check(path: str | os.PathLike[str], members: list[zipfile.ZipInfo], length: int) -> None:
    names = [member.filename.removesuffix(_SUFFIX) for member in members]
    if len(names) > MOST_MEMBERS:
        raise Malformed(f"{path} is not read: it has {len(names):,} arrays, more than {MOST_MEMBERS:,}")
    if len(set(names)) != len(names):
        raise Malformed(f"{path} is damaged: an array is there twice")
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1]
    if packed:
        raise Malformed(f"{path} is not read: {packed[0][:60]!r} is compressed or encrypted; save it with numpy.savez")
    if any(not 0 <= member.header_offset < length for member in members):
        raise Malformed(f"{path} is damaged: an array begins outside the file")
    total = sum(max(member.file_size, member.compress_size) for member in members)
    if total > length:
        raise Malformed(f"{path} is damaged: its arrays are said to take {size(total)}, the file has {size(length)}")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        magic = file.read(8)
        if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
            raise ValueError(f"{member.filename[:60]!r} is no array")
        width = 2 if magic[6] == 1 else 4
        header_bytes = int.from_bytes(file.read(width), "little")
        header = file.read(min(header_bytes, _MOST_HEADER_BYTES))
        found = _HEADER.fullmatch(header)
        if found is None:
            raise ValueError(f"{member.filename[:60]!r} has no header as numpy writes it of numbers or text")
        try:
            dtype = np.dtype(found[1].decode())
        except TypeError:
            raise ValueError(f"{member.filename[:60]!r} is of a type that there is not, {found[1].decode()}") from None
        shape = tuple(int(part) for part in found[3].replace(b" ", b"").split(b",") if part)
        count = math.prod(shape) * dtype.itemsize
        rest = member.file_size - 8 - width - header_bytes
        if not dtype.itemsize:  # of which any number takes no bytes; numpy makes room for them all the same
            raise ValueError(f"{member.filename[:60]!r} holds values of no bytes")
        if len(shape) > MOST_DIMENSIONS or count != rest or max(shape, default=0) >= 1 << 62:
            raise ValueError(f"{member.filename[:60]!r} of shape {list(shape)[:8]} has {rest:,} bytes, not {count:,}")
        content = np.empty(count, np.uint8)
        view, filled = memoryview(content), 0
        while filled < count:
            read = file.readinto(view[filled:])
            if not read:
                raise EOFError("it ends too soon")
            filled += read
        if file.read(1):  # the checksum is compared at the end
            raise ValueError("it does not end where it should")
    array = content.view(dtype).reshape(shape, order="F" if found[2] == b"True" else "C") if count else np.empty(shape, dtype)
    if dtype.kind == "U" and count and not _is_unicode(content, dtype):
        raise ValueError(f"{member.filename[:60]!r} holds text that is not Unicode")
    return array


def _is_unicode(content: np.ndarray, dtype: np.dtype) -> bool:
    points = content.view(np.dtype("u4").newbyteorder(dtype.byteorder))
    return bool(np.all((points < 0xD800) | ((points > 0xDFFF) & (points <= 0x10FFFF))))
