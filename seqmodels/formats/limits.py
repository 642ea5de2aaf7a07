"""The bytes of a file, if it is a regular one and not too large; what all the readers raise."""

import contextlib
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from typing import BinaryIO

from seqmodels import failures
from seqmodels.errors import UserError


class Malformed(UserError):
    """What is in a file is not what its format, or its limits here, allow. The message begins with the file's name."""


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file, opened to be read. A pipe, of which one would wait for a writer, is refused at once.

    Raises:
        Malformed: it is a folder, a device, a pipe or a socket.
        OSError: the system cannot open it, or what is done inside cannot read it; it names the file.
    """
    with failures.named(path), _opened(path) as file:
        yield file


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Malformed(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class OpenFile:
    """A regular file that stays open, to be read in parts. A part of a memory map that cannot be read would end the process.

    Attributes:
        path: where it was.
        size: its bytes when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Errors as of `open_file`."""
        with failures.named(path):
            self._file = _opened(path)
            self.path, self.size = path, os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def read(self, first: int, end: int) -> bytes:
        """The bytes ``first`` to ``end``.

        Raises:
            Malformed: the file ends sooner, having been cut off since it was opened.
            OSError: the system cannot read it; it names the file.
        """
        with self._lock, failures.named(self.path):
            self._file.seek(first)
            content = self._file.read(end - first)
        if len(content) < end - first:
            raise Malformed(f"{self.path} has {first + len(content):,} bytes, and had {self.size:,}: it was cut off meanwhile")
        return content


def read_bytes(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All of a file.

    Raises:
        Malformed: it is larger than ``most_bytes``, or no regular file.
        OSError: the system cannot read it.
    """
    with open_file(path) as file:
        expected = os.fstat(file.fileno()).st_size
        content = file.read(expected + 1) if expected <= most_bytes else b""
    if max(expected, len(content)) > most_bytes:
        raise Malformed(f"{path} is larger than {size(most_bytes)}, the most that is read of such a file")
    return content


def read_text(path: str | os.PathLike[str], most_bytes: int) -> str:
    """All of a file of UTF-8.

    Raises:
        Malformed: as `read_bytes`, or it is not UTF-8.
        OSError: the system cannot read it.
    """
    try:
        return read_bytes(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start:,})") from None


def size(count: float) -> str:
    """A number of bytes for people: ``238.4 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024 or unit == "PiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def excerpt(value: object, most: int = 60) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
