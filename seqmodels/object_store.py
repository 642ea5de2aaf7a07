"""Object stores, ``gs://bucket/path`` and ``s3://bucket/path``: whole objects by name, and a lock that one process holds.

An object store has neither append nor rename nor a lock that ends with its holder. It writes an object whole or not at all, and
writes it only where it is still the one that was read (a conditional write). All here is made of these two. The client is
TensorStore's key-value store, by which Orbax writes arrays: it is always installed, and speaks both protocols, conditional writes
included. Credentials are found as the vendors' tools find them; ``AWS_ENDPOINT_URL`` names another S3 server than Amazon's.

``file:///folder`` has the same operations on a local disk; tests use it.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.formats import json_text

SCHEMES: Final = ("gs", "s3", "file")
_URL = re.compile(r"([a-zA-Z][\w+.-]*)://(.*)", re.DOTALL)
_IN_FLIGHT_BYTES: Final = 1 << 28
"""Of objects that are written at the same time."""
_FIRST_RETRIES: Final = 4
"""Of the first request, about 15 seconds; later ones have TensorStore's own patience, many minutes."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is written as a URL, and so is no path."""
    return _URL.fullmatch(os.fspath(place)) is not None


def workdir(text: str) -> Path | str:
    """The value of a --workdir: a path, or a URL as it is (`pathlib` would make one slash of two)."""
    return text if is_url(text) else atomic.expanded(text)


def local(text: str, name: str = "--workdir") -> Path:
    """The value of a flag or field of this name where only a folder of this machine will do.

    Raises:
        UserError: it is a URL.
    """
    if is_url(text):
        raise UserError(
            f"{name}={text} must be a folder of this machine; an object store is for train.py, eval.py, generate.py and export_hf.py"
        )
    return atomic.expanded(text)


class ObjectStore:
    """The objects whose names begin with those of a URL, by the rest of their names.

    Args:
        url: ``gs://bucket/path`` or ``s3://bucket/path``.

    Raises:
        UserError: it is no such URL, or the store does not answer.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._store = self._opened({})
        first = self._opened({f"{name}_request_retries": {"max_retries": _FIRST_RETRIES} for name in ("s3", "gcs")})
        with self._explained("cannot be reached"):
            first.read(Lease.NAME).result()

    def _opened(self, context: Mapping[str, Any]) -> Any:
        import tensorstore  # a quarter of a second that a local run need not pay

        scheme, place = _URL.fullmatch(self.url).groups()
        if scheme not in SCHEMES:
            raise UserError(f"{self.url}: a run folder is a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
        bucket, _, path = place.partition("/")
        if scheme == "s3":
            spec = {"driver": "s3", "bucket": bucket, "path": f"{path}/", "use_conditional_write": True, **_s3_server()}
        elif scheme == "gs":
            spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
        else:
            spec = {"driver": "file", "path": f"{place}/"}
        if not path or (scheme != "file" and not bucket):
            raise UserError(f"{self.url} must name a bucket and a folder in it: {scheme}://BUCKET/PATH")
        with self._explained("is not a place in an object store"):
            return tensorstore.KvStore.open({**spec, "context": context} if scheme != "file" else spec).result()

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects, in order.

        Raises:
            UserError: a name is none that a file below a folder can have.
        """
        import tensorstore

        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        with self._explained("cannot be listed"):
            listed = self._store.list(tensorstore.KvStore.KeyRange(prefix, end)).result()
        names = sorted(name.decode("utf-8", errors="surrogateescape") for name in listed)
        for name in names:
            parts = name.split("/")
            if {"", ".", ".."} & set(parts[:-1]) or parts[-1] in (".", "..") or re.search(r"[\0\\]", name):
                raise UserError(f"{self.url} has an object {name!r}, whose name is none that a file of a run folder has")
        return [name for name in names if not name.endswith("/")]  # what some tools make to show a folder

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """An object, None where there is none, and its generation, which the next write of it changes."""
        with self._explained(f"cannot be read ({name})"):
            found = self._store.read(name).result()
            return (found.value if found.state == "value" else None), found.stamp.generation

    def write(self, name: str, content: bytes, *, if_generation: bytes | None = None) -> bytes | None:
        """Write an object whole; the new generation, or None where it is not (any more) of the generation that is asked for."""
        with self._explained(f"cannot be written ({name})"):
            return self._store.write(name, content, if_equal=if_generation).result().generation or None

    def write_files(self, files: Iterable[tuple[str, Path]]) -> None:
        """Write objects from files, several at a time. A file that has vanished is left out."""
        waiting, size = [], 0
        with self._explained("cannot be written"):
            for name, path in files:
                with contextlib.suppress(FileNotFoundError):
                    content = path.read_bytes()
                    waiting.append(self._store.write(name, content))
                    size += len(content)
                    if size > _IN_FLIGHT_BYTES:
                        _wait(waiting)
                        waiting, size = [], 0
            _wait(waiting)

    def delete(self, names: Iterable[str], *, if_generation: bytes | None = None) -> None:
        """Delete objects; those that are not there are none the less."""
        with self._explained("cannot be written"):
            _wait([self._store.write(name, None, if_equal=if_generation) for name in names])

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of TensorStore: ValueError and others, by the store's answer
            reason = " ".join((str(error) or type(error).__name__).split())[:300]
            raise UserError(f"{self.url} {what}: {reason}") from error


def _wait(futures: Iterable[Any]) -> None:
    for future in futures:
        future.result()


def _s3_server() -> dict[str, Any]:
    """What the environment says of it, by the names that Amazon's tools read."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found: dict[str, Any] = {}
    if endpoint:
        found = {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        found = {"aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # said, so that TensorStore does not complain that there is no ~/.aws
        found["aws_credentials"] = {"type": "environment"}
    return found


class Lease:
    """A lock that one process holds in a store: an object with its owner, rewritten every `BEAT_SECONDS`.

    An object does not end with its owner. Another process takes it over when it has seen no new beat for `LOST_SECONDS` of its
    own clock; clocks are not compared. Taking over and beating are conditional writes, so that of two processes one wins. The
    one that lost, because it was suspended or without a network for so long, learns of it at its next beat or `check`; what it
    writes between its last check and that is not kept from the store.

    Args:
        store: where the lock lies.
        former: owner that is known to have ended; its lock is taken at once.
    """

    NAME = ".lock"
    BEAT_SECONDS = 15.0
    LOST_SECONDS = 60.0

    def __init__(self, store: ObjectStore, *, former: str = ""):
        self.owner = uuid.uuid4().hex
        self._store, self._former = store, former
        self._beats = itertools.count()
        self._generation: bytes | None = None
        self._lost = False
        self._beating = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_ended, daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lock.

        Raises:
            UserError: another process holds it.
        """
        self._generation = self._taken()
        if self._store.write(self.NAME, self._content(), if_generation=self._absent) is not None:
            say(f"{self._store.url} ignores conditional writes: nothing keeps two processes from training there at the same time")
            self._generation = self._store.read(self.NAME)[1]
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        with self._beating:
            if not self._lost:
                with contextlib.suppress(UserError):  # it runs out then
                    self._store.delete([self.NAME], if_generation=self._generation)

    def check(self) -> None:
        """Beat now.

        Raises:
            UserError: another process has taken the lock over, or the store does not answer.
        """
        with self._beating:
            if not self._lost:
                self._beat()
            if self._lost:
                raise UserError(
                    f"another process has taken over {self._store.url}, as this one gave no sign for {self.LOST_SECONDS:.0f} seconds; "
                    "this one ends"
                )

    def _taken(self) -> bytes:
        content, generation = self._store.read(self.NAME)
        if content is not None and _owner(content) != self._former:
            say(f"{self._store.url} is locked by {_about(content)}: waiting {self.LOST_SECONDS:.0f} seconds for a sign of it")
            content, generation = self._watched(content, generation)
        taken = self._store.write(self.NAME, self._content(), if_generation=generation)
        if taken is None:
            raise self._in_use(self._store.read(self.NAME)[0])
        return taken

    def _watched(self, content: bytes, generation: bytes) -> tuple[bytes | None, bytes]:
        """The lock after a time in which its holder gave no sign, or let it go."""
        until = time.monotonic() + self.LOST_SECONDS
        while time.monotonic() < until:
            time.sleep(min(5.0, self.LOST_SECONDS / 12))
            now, its_generation = self._store.read(self.NAME)
            if now is None:
                return None, its_generation
            if its_generation != generation:
                raise self._in_use(now)
        say(f"the process that held {self._store.url} gives no sign: taking over")
        return content, generation

    def _in_use(self, content: bytes | None) -> UserError:
        return UserError(f"another process is training in {self._store.url} ({_about(content)}); use another --workdir")

    @property
    def _absent(self) -> bytes:
        """The generation of an object that is not there."""
        return self._store.read(f"{self.NAME}.{self.owner}")[1]

    def _content(self) -> bytes:
        about = {"owner": self.owner, "host": platform.node(), "process": os.getpid(), "beats": next(self._beats)}
        return json.dumps(about).encode()

    def _beat(self) -> None:
        content = self._content()
        generation = self._store.write(self.NAME, content, if_generation=self._generation)
        if generation is None:  # unless it is ours: a request that was sent twice is refused the second time
            now, generation = self._store.read(self.NAME)
            self._lost = now != content
        self._generation = generation

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(self.BEAT_SECONDS):
            with self._beating, contextlib.suppress(UserError):  # the store does not answer: again, later
                if self._lost or self._ended.is_set():
                    return
                self._beat()


def _owner(content: bytes) -> str:
    return str(_fields(content).get("owner"))


def _about(content: bytes | None) -> str:
    fields = _fields(content or b"")
    return f"process {fields.get('process')} on {fields.get('host')}"


def _fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json_text.parse(content.decode("utf-8", errors="replace"), Lease.NAME)
    except UserError:
        return {}
    return fields if isinstance(fields, dict) else {}
