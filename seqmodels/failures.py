"""What a failed read or write means: an obstacle outside the data, which may pass, or something wrong with the data."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OF_ANOTHER_KIND = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Nothing is there, or a file where a folder should be, or a link that leads nowhere: damage, whenever one looks."""

_PERMISSION = "permission denied"
_OPEN_FILES = "too many open files: raise the limit with ulimit -n"
_MEMORY = "out of memory"
_DISK = "the disk reports an input/output error"
_AWAY = "the file system does not answer"
_FULL = "no space left"
_READ_ONLY = "the file system is read-only"
_TOO_LARGE = "the file is larger than the system allows: raise the limit with ulimit -f"

_NAMES = {
    _PERMISSION: "EACCES EPERM",
    _FULL: "ENOSPC EDQUOT",
    _READ_ONLY: "EROFS",
    _TOO_LARGE: "EFBIG",
    _OPEN_FILES: "EMFILE ENFILE",
    _MEMORY: "ENOMEM",
    _DISK: "EIO EREMOTEIO EUCLEAN EBADMSG",
    _AWAY: "ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN ENODEV ENXIO ENETUNREACH ENETDOWN EHOSTUNREACH ECONNREFUSED ECONNRESET ECONNABORTED",
}
_BY_NUMBER = {
    getattr(errno, name): reason
    for reason, names in _NAMES.items()
    for name in names.split()
    if hasattr(errno, name)  # macOS lacks some
}

# What C++ libraries (tensorstore, XLA) put into the text of an exception of no particular type: the system's words, or their own.
_BY_TEXT = (
    *((re.escape(os.strerror(number)), reason) for number, reason in _BY_NUMBER.items()),
    (r"PERMISSION_DENIED", _PERMISSION),
    (r"[Oo]ut of memory|std::bad_alloc", _MEMORY),
    (r"UNAVAILABLE:|DEADLINE_EXCEEDED:", _AWAY),
)


def obstacle(error: BaseException) -> str | None:
    """Why a read or a write cannot be done now, whatever the data are: permission, memory, open files, the disk.

    None: the error says nothing of the kind, so what was read is damaged, absent or of another format. Causes and contexts
    count too, for libraries wrap what the system said.
    """
    for each in _chain(error):
        if isinstance(each, MemoryError):
            return _MEMORY
        if isinstance(each, OSError) and each.errno in _BY_NUMBER:
            name = f" ({each.filename})" if each.filename else ""
            return f"{_BY_NUMBER[each.errno]}{name}"
    for each in _chain(error):
        for pattern, reason in _BY_TEXT:
            if re.search(pattern, str(each)):
                return reason
    return None


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of the system that names no file, as none of a read or a write does, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def is_no_space(error: BaseException) -> bool:
    """Whether the disk is full, or its quota used up."""
    return any(
        isinstance(each, OSError) and each.errno in NO_SPACE
        or re.search("RESOURCE_EXHAUSTED.*(space|quota)|No space left on device|Disk quota exceeded", str(each))
        for each in _chain(error)
    )  # fmt: skip


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen, waiting = set(), [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
