"""Object stores for tests: one on the disk, and one that dies after so many requests."""

import contextlib
from collections.abc import Iterator

import pytest

from seqmodels.object_store import ObjectStore


class Killed(BaseException):
    """The process has ended; nothing catches it."""


class Requests:
    """The requests that change a store, in their order; `last` of them are answered, counted from that of `since`, and then
    the process dies."""

    def __init__(self, last: int | None = None, since: str | None = None):
        self.made: list[str] = []
        self._last, self._since = last, since

    def note(self, name: str) -> None:
        counted = self.made
        if self._since is not None:
            counted = self.made[self.made.index(self._since) :] if self._since in self.made else []
        if self._last is not None and len(counted) >= self._last:
            raise Killed
        self.made.append(name)


@contextlib.contextmanager
def watched(requests: Requests) -> Iterator[None]:
    """Every object is written and deleted by a request of its own, which is noted first."""
    write, delete = ObjectStore.write, ObjectStore.delete

    def noted_write(self, name, content, **condition):
        requests.note(name)
        return write(self, name, content, **condition)

    def noted_files(self, files):
        for name, path in files:
            noted_write(self, name, path.read_bytes())

    def noted_delete(self, names, **condition):
        for name in names:
            requests.note(name)
            delete(self, [name], **condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStore, "write", noted_write)
        patch.setattr(ObjectStore, "write_files", noted_files)
        patch.setattr(ObjectStore, "delete", noted_delete)
        yield
