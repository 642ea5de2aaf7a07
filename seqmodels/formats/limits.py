"""The bytes of a file, if it is a regular one and not too large; what all the readers raise."""

import contextlib
import os
import stat
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
    with failures.named(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Malformed(f"{path} is not a regular file")
            file = os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        with file:
            yield file


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
