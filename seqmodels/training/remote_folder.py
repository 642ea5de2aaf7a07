"""A run folder in an object store, ``--workdir=gs://bucket/run`` or ``s3://bucket/run``.

A run works in a copy on the disk, below ``data.cache_dir``, as it works in any folder, and puts into the store what is new there:
with every checkpoint, after the first lines and at the end. When it starts, the copy is made equal to the store, so that it goes on
from there on any machine; what an earlier process had not yet put there is lost, and made again.

A checkpoint's objects are written first, then the folder's other files, whose rows it implies, and last its commit object, a list
of its files with their digests. Without it a checkpoint is not there; it is deleted first where a checkpoint is deleted. So a
process that is killed at any moment leaves a checkpoint in the store or none, as it does in a folder.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from seqmodels import object_store, processes
from seqmodels.data import atomic, fingerprint
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.formats import json_text
from seqmodels.object_store import Lease, ObjectStore

CHECKPOINTS: Final = "checkpoints"
COMMIT: Final = "committed.json"
"""Of a checkpoint, beside Orbax's files."""
_OWNER: Final = "owner"  # beside the working copy: who has worked in it last


def local_folder(url: str, cache_dir: str | os.PathLike[str], *, read: bool = False) -> Path:
    """Where a folder of a store lies on this machine: the copy that a run works in, or the one that is only read."""
    digest = fingerprint.key_of({"url": url.rstrip("/")})
    return atomic.expanded(cache_dir) / ("opened" if read else "runs") / digest / Path(url.rstrip("/")).name


@contextlib.contextmanager
def named(folder: Path, url: str) -> Iterator[None]:
    """Inside, messages name the URL in place of the copy."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).replace(str(folder), url),)
        raise


class Mirror:
    """What a run in `folder` puts into its store; the folder's files, but hidden ones and links."""

    def __init__(self, store: ObjectStore, folder: Path, lease: Lease):
        self._store, self._folder, self._lease = store, folder, lease
        self._there: set[str] = set()  # names of the store's objects
        self._as_it_is: dict[str, tuple[int, int]] = {}  # of a file that is in the store: size and time of change
        self._steps: set[int] = set()  # of the checkpoints that are both here and there
        self._publishing = threading.Lock()

    def take(self) -> None:
        """Make the folder equal to the store.

        Raises:
            UserError: the store does not answer, or none of its checkpoints is what was written.
        """
        self._there = set(self._store.names()) - {Lease.NAME}
        committed = _committed(self._there)
        plain = {name for name in self._there if not _is_of_checkpoint(name) and not _is_hidden(name)}
        for name in sorted(plain):
            _fetch(self._store, name, self._folder)
        for name, path in self._files():
            if name in plain:
                self._as_it_is[name] = _state(path)
            else:
                path.unlink()
        good = _fetch_steps(self._store, committed, self._folder)
        self._steps = set(good)
        if committed and not good:
            raise UserError(
                f"none of the checkpoints {sorted(committed)} in {self._store.url} is what was written: put a copy in their place, "
                "or train in another --workdir"
            )
        self._delete(name for name in self._there if _step(name) is not None and _step(name) not in committed)

    def publish(self, checkpoint: Path | None = None) -> None:
        """Put what is new in the folder into the store, and a checkpoint if one has been written.

        Raises:
            UserError: another process has taken over, or the store does not answer.
        """
        with self._publishing:
            self._lease.check()
            commit = {}
            if checkpoint is not None:
                self._delete_steps({int(checkpoint.name)})  # one that was damaged
                commit = self._write_step(checkpoint)
            changed = [(name, path) for name, path in self._files() if self._as_it_is.get(name) != _state(path)]
            states = {name: _state(path) for name, path in changed}
            self._store.write_files(changed)
            self._there |= set(states)
            self._as_it_is |= states
            present = {name for name, _ in self._files()}
            self._delete(name for name in self._as_it_is.keys() - present)
            if commit:
                self._lease.check()
                for name, content in commit.items():
                    self._store.write(name, content)
                    self._there.add(name)
                self._steps.add(int(checkpoint.name))
            here = {int(path.name) for path in (self._folder / CHECKPOINTS).glob("*") if path.name.isdecimal()}
            self._delete_steps(self._steps - here)  # but none that was damaged, and so has never been here
            self._steps &= here

    def _write_step(self, folder: Path) -> dict[str, bytes]:
        """Write a checkpoint's objects; returns its commit object, by its name."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(self._folder).as_posix() for path in files]
        self._store.write_files(zip(names, files, strict=True))
        self._there |= set(names)
        listed = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
        about = {"files": listed}
        about["digest"] = json_text.digest(listed)
        return {f"{CHECKPOINTS}/{folder.name}/{COMMIT}": json.dumps(about).encode()}

    def _delete_steps(self, steps: set[int]) -> None:
        self._delete(f"{CHECKPOINTS}/{step}/{COMMIT}" for step in steps)
        self._delete(name for name in self._there if _step(name) in steps)

    def _delete(self, names: Iterator[str]) -> None:
        names = sorted(set(names) & self._there)
        self._store.delete(names)
        self._there -= set(names)
        for name in names:
            self._as_it_is.pop(name, None)

    def _files(self) -> list[tuple[str, Path]]:
        """The folder's files outside of its checkpoints, by their names in the store."""
        found = []
        for parent, folders, files in os.walk(self._folder):
            here = Path(parent)
            if here == self._folder:
                folders[:] = [name for name in folders if name != CHECKPOINTS]
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (here / name for name in files if not name.startswith("."))
            found += [(path.relative_to(self._folder).as_posix(), path) for path in paths if not path.is_symlink()]
        return sorted(found)


@contextlib.contextmanager
def mirrored(url: str | None, folder: Path, group: processes.Group) -> Iterator[Mirror | None]:
    """The mirror of a run in `folder`, which the caller has locked: the first process of the group has one, of a URL.

    Takes the store's lock, makes the folder equal to the store, and puts into it what is there at the end.

    Raises:
        UserError: another process trains there; the store does not answer.
    """
    if url is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        mirrors = []

        def open_mirror() -> None:
            store, owner = ObjectStore(url), folder.parent / _OWNER
            # Whoever has worked in this copy had its lock, which is ours now: that process has ended.
            lease = Lease(store, former=owner.read_text() if owner.exists() else "")
            stack.enter_context(lease)
            atomic.write_text(owner, lease.owner)
            mirrors.append(Mirror(store, folder, lease))
            mirrors[0].take()
            say(f"{url}: working in the copy {folder}, which is put there with every checkpoint")

        group.from_first(open_mirror)
        [mirror] = mirrors or [None]
        try:
            yield mirror
        except BaseException:
            if mirror is not None:
                try:
                    mirror.publish()
                except UserError as error:
                    say(f"not all of {folder} is in {url}: {error}")
            raise
        if mirror is not None:
            mirror.publish()


def opened(url: str, cache_dir: str | os.PathLike[str], *, step: int | None = None, report: Callable[[str], None] = say) -> Path:
    """A copy of a folder of a store to read from: its own files, and the newest checkpoint, or the one of ``step``.

    Args:
        report: called with one line where a checkpoint is not what was written; the one before it is taken then.

    Raises:
        UserError: the store does not answer, there is no checkpoint of ``step``, or none is what was written.
    """
    folder, store = local_folder(url, cache_dir, read=True), ObjectStore(url)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.lock(folder.parent / "lock", waiting=f"another process is fetching {url}: waiting for it"):
        tried: set[int] = set()
        while True:  # a run that writes there deletes its older checkpoints meanwhile
            names = store.names()
            plain = {name for name in names if "/" not in name and not _is_hidden(name)}
            for name in sorted(plain):
                _fetch(store, name, folder)
            for path in folder.iterdir():
                if path.is_file() and path.name not in plain:
                    path.unlink()
            committed = _committed(names)
            if step is not None and step not in committed:
                raise UserError(f"no checkpoint of step {step} in {url}; there are {sorted(committed) or 'none'}")
            wanted = sorted((committed if step is None else {step}) - tried)
            if not wanted:
                if tried & committed:
                    raise UserError(f"none of the checkpoints {sorted(tried & committed)} in {url} is what was written")
                return folder
            if _fetch_step(store, wanted[-1], folder, report=report):
                _keep_only(folder / CHECKPOINTS, set(map(str, committed)))
                return folder
            tried.add(wanted[-1])


def fetch_checkpoints(url: str, folder: Path) -> None:
    """Make a folder's checkpoints equal to the store's, for a process that does not see the copy that the run works in.

    Raises:
        UserError: the store does not answer.
    """
    store = ObjectStore(url)
    _fetch_steps(store, _committed(store.names()), folder)


def keep(place: str | os.PathLike[str], path: Path) -> None:
    """Put a file that was made in an opened copy into the store that ``place`` names; nothing where that is a folder.

    Raises:
        UserError: the store does not answer.
    """
    if object_store.is_url(place):
        ObjectStore(os.fspath(place)).write(path.name, path.read_bytes())


def _fetch(store: ObjectStore, name: str, folder: Path) -> None:
    """Get a file whose content is another, or that is not there."""
    content, _ = store.read(name)
    path = folder / name
    if content is None or (path.is_file() and not path.is_symlink() and path.read_bytes() == content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_whole(path, lambda file: file.write(content))


def _fetch_steps(store: ObjectStore, committed: set[int], folder: Path) -> list[int]:
    """Get these checkpoints and remove all others; the steps of those that are what was written."""
    good = [step for step in sorted(committed) if _fetch_step(store, step, folder)]
    _keep_only(folder / CHECKPOINTS, set(map(str, good)))
    return good


def _fetch_step(store: ObjectStore, step: int, folder: Path, *, report: Callable[[str], None] = say) -> bool:
    """Get a checkpoint, unless it is there; whether it is what was written."""
    place, prefix = folder / CHECKPOINTS / str(step), f"{CHECKPOINTS}/{step}/"
    content, _ = store.read(prefix + COMMIT)
    files = _files_of(content)
    if files is not None and _is_there(place, files):
        return True
    damaged = COMMIT if files is None else None
    fetching = place.with_name(f".{step}")
    shutil.rmtree(fetching, ignore_errors=True)
    for name in files or ():
        content, _ = store.read(prefix + name)
        if content is None or _digest_of(content) != files[name]:
            damaged = name
            break
        path = fetching / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if damaged is not None:
        report(f"checkpoint {store.url}/{prefix[:-1]} is not what was written ({damaged}), and is left out")
        shutil.rmtree(fetching, ignore_errors=True)
        return False
    shutil.rmtree(place, ignore_errors=True)
    atomic.rename_folder(fetching, place)
    return True


def _files_of(content: bytes | None) -> Mapping[str, Any] | None:
    """The digests of a checkpoint's files that its commit object lists; None where that is damaged, or gone."""
    try:
        about = json_text.parse((content or b"").decode("utf-8", errors="replace"), COMMIT)
        files = about["files"]
        good = about["digest"] == json_text.digest(files) and isinstance(files, dict)
        return files if good and files and not any({"", ".", ".."} & set(name.split("/")) for name in files) else None
    except (UserError, KeyError, TypeError):
        return None


def _is_there(place: Path, files: Mapping[str, Any]) -> bool:
    there = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return there.keys() == files.keys() and all(_digest(path) == files[name] for name, path in there.items())


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove the checkpoints of other names, and what a killed process left."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _committed(names: set[str] | list[str]) -> set[int]:
    """The steps whose checkpoints are whole."""
    return {_step(name) for name in names if _step(name) is not None and name.split("/")[2:] == [COMMIT]}


def _is_of_checkpoint(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _step(name: str) -> int | None:
    """Which checkpoint an object is of; None: of none."""
    found = re.match(rf"{CHECKPOINTS}/(0|[1-9][0-9]{{0,17}})/", name)
    return None if found is None else int(found[1])


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
