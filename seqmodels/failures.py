"""What a failed read or write means: an obstacle outside the data, which may pass, or something wrong with the data."""

import errno
import re
from collections.abc import Iterator

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

_PERMISSION = "permission denied"
_OPEN_FILES = "too many open files: raise the limit with ulimit -n"
_MEMORY = "out of memory"
_DISK = "the disk reports an input/output error"
_AWAY = "the file system does not answer"

_BY_NUMBER = {
    errno.EACCES: _PERMISSION, errno.EPERM: _PERMISSION,
    errno.EMFILE: _OPEN_FILES, errno.ENFILE: _OPEN_FILES,
    errno.ENOMEM: _MEMORY, errno.EIO: _DISK,
    errno.ESTALE: _AWAY, errno.ETIMEDOUT: _AWAY, errno.ENOTCONN: _AWAY, errno.EHOSTDOWN: _AWAY, errno.ENODEV: _AWAY,
    errno.ENXIO: _AWAY,
}  # fmt: skip

# What C++ libraries (tensorstore, XLA) put into the text of an exception of no particular type.
_BY_TEXT = (
    (r"PERMISSION_DENIED|Permission denied|Operation not permitted", _PERMISSION),
    (r"Too many open files", _OPEN_FILES),
    (r"RESOURCE_EXHAUSTED: Out of memory|Out of memory|out of memory|Cannot allocate memory|std::bad_alloc", _MEMORY),
    (r"Input/output error", _DISK),
    (r"Stale file handle|Connection timed out|UNAVAILABLE:|DEADLINE_EXCEEDED:", _AWAY),
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
