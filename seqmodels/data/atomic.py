"""Files that other processes see whole or not at all, however the writer ends."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from seqmodels.errors import UserError


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then give it that name at one stroke."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{unique()}")
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unique() -> str:
    """A part of a name that no other process, on this machine or another, chooses."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def disk_errors_as_user_errors(place: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the disk's refusal to write into a ``UserError`` that names the ``place``.

    ``place`` is what the person can change, such as ``data.cache_dir``; ``folder`` is its value.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space left in '{folder}': free some, or set another {place}"
        else:
            reason = f"cannot write in '{folder}' ({error.strerror}): set another {place}"
        raise UserError(reason) from error
