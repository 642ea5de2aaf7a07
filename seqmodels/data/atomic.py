"""Files that other processes see whole or not at all, however the writer ends."""

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from seqmodels.errors import UserError


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then give it that name at one stroke.

    A symbolic link of that name is replaced; the file it points to stays as it is.

    Raises:
        UserError: ``path`` is not the name of a file, as `check_file_name` has it.
    """
    path = check_file_name(path)
    temporary = path.with_name(f".{path.name}.{unique()}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # ahead of the name: after a power cut a named file would otherwise be empty
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file_name(path: str | os.PathLike[str], *, replaced: bool = True) -> Path:
    """The path, if a file can be written there.

    Args:
        replaced: what is there is replaced, and so must be a regular file; otherwise it is opened and written to, and may
            be a device or a pipe.

    Raises:
        UserError: a folder is named or is there, or what would be replaced is a device, a pipe or a socket.
    """
    text = os.fspath(path)
    if os.path.basename(text) in ("", os.curdir, os.pardir):
        raise UserError(f"'{text}' is the name of a folder; give the name of a file in it")
    try:
        mode = os.stat(text).st_mode
    except OSError:
        return Path(text)  # nothing is there, or a link that leads nowhere
    if stat.S_ISDIR(mode):
        raise UserError(f"'{text}' is a folder; give the name of a file in it")
    if replaced and not stat.S_ISREG(mode):
        raise UserError(f"'{text}' is {_KINDS[stat.S_IFMT(mode)]}, which is not replaced; give the name of a file")
    return Path(text)


_KINDS = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


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
