"""Files and folders that other processes see whole or not at all, however the writer ends, and locks that end with it."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from seqmodels import failures
from seqmodels.errors import UserError
from seqmodels.escape import say


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then give it that name at one stroke.

    A symbolic link of that name is replaced; the file it points to stays as it is.

    Raises:
        UserError: ``path`` is not the name of a file, as `check_file_name` has it.
    """
    path = check_file_name(path)
    temporary = path.with_name(f".{path.name[:40]}.{unique()}")  # a name may be as long as names can be
    try:
        with failures.named(path):
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # ahead of the name: after a power cut a named file would otherwise be empty
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_whole` of a text, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def rename_folder(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a folder that is complete the name ``path``, at one stroke, when all that is in it has reached the disk.

    Raises:
        OSError: there is such a folder, and it is not empty.
    """
    sync_folder(folder)
    os.rename(folder, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Return when all that is in a folder has reached the disk, the names of its files included."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def remove(path: Path) -> None:
    """Remove a folder, or the file or link in its place; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Return when a file's content, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with failures.named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a folder, on file systems that do not know it
            raise
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: str | os.PathLike[str], *, waiting: str | None = "") -> Iterator[bool]:
    """Hold the lock of a file, which is made if it is not there; yields whether it is held.

    The system keeps the lock: it ends with the process that holds it, however that ends, and with nothing else, so that
    neither a clock nor a long time can break it. On a file system without locks it is not held, and there is no waiting.

    Args:
        waiting: said on stderr before waiting for another holder; None: do not wait, it is not held then.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _locked(descriptor, waiting)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, waiting: str | None) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False  # a file system without locks
    if waiting is None:
        return False
    say(waiting)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    return False


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


def own_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is added to. A symbolic link of that name is replaced by a copy, as `write_whole` replaces one: what
    it points to stays as it is.

    Raises:
        UserError: a folder, a device, a pipe or a socket is there.
    """
    path = check_file_name(path)
    if path.is_symlink():
        content = path.read_bytes() if path.exists() else b""
        write_whole(path, lambda file: file.write(content))
    return path


def check_own_folder(path: str | os.PathLike[str]) -> None:
    """Raise UserError where a folder that will be written in is a symbolic link, through which that would be done elsewhere, or no
    folder; where nothing is there, it can be made."""
    if os.path.islink(path):
        raise UserError(
            f"'{path}' is a symbolic link, and what is written there would be written elsewhere; put a folder in its place"
        )
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"'{path}' is not a folder; remove it, or rename it")


def open_own(path: str, flags: int) -> int:
    """An ``opener`` of `open` for a file that no symbolic link leads to; a link is the OSError ELOOP."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


_KINDS = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ELOOP,
)  # fmt: skip


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path that a person gave, with the home folder in place of ``~``.

    Raises:
        UserError: the home folder of ``~`` is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{os.fspath(path)}': there is no home folder of that name; give the whole path") from None


def unique() -> str:
    """A part of a name that no other process, on this machine or another, chooses."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def disk_errors_as_user_errors(place: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the disk's refusal to write into a ``UserError`` that names the ``place``, or what else is in the way.

    ``place`` is what the person can change, such as ``data.cache_dir``; ``folder`` is its value.
    """
    try:
        yield
    except OSError as error:
        raise UserError(_explanation(error, place, os.fspath(folder))) from error


def _explanation(error: OSError, place: str, folder: str) -> str:
    if failures.is_no_space(error):
        return f"no space left in '{folder}': free some, or set another {place}"
    elsewhere = isinstance(error.filename, str) and Path(folder).absolute() not in Path(error.filename).absolute().parents
    if elsewhere and Path(error.filename).absolute() != Path(folder).absolute():
        return f"'{error.filename}': {failures.obstacle(error) or error.strerror}"
    if error.errno in _REFUSALS:
        return f"cannot write in '{folder}' ({error.strerror}): set another {place}"
    # Neither the folder nor its permissions: another place would not help.
    return f"'{error.filename or folder}': {failures.obstacle(error) or error.strerror or error}"
