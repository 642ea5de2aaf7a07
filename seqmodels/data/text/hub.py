"""Texts of the Hugging Face hub, through ``datasets``, at one commit.

Without a network that is an error at once, unless ``datasets`` has that revision on disk.
"""

import functools
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse
from urllib.request import getproxies

from seqmodels.errors import UserError

TINYSTORIES: Final = "roneneldan/TinyStories"
TINYSTORIES_REVISION: Final = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECONDS_TO_REACH_THE_HUB: Final = 4.0


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name`` of the hub."""
    return _HUB_ID.fullmatch(name) is not None


def is_commit(revision: object) -> bool:
    """Whether this is the whole name of a commit."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


@functools.cache
def commit(name: str, revision: str) -> str:
    """The commit that a branch, a tag or the beginning of a commit's name means now, of a hub data set; empty is the newest.

    Without the hub, the newest is that of the copy on the disk that was made last, which ``datasets`` then opens.

    Raises:
        UserError: no network and no copy, or no such data set or revision.
    """
    if is_commit(revision):
        return revision
    if not reachable():
        copies = [] if revision else [path for path in _prepared(name, "*") if is_commit(path.name)]
        if not copies:
            raise UserError(_unreachable(name))
        return max(copies, key=lambda path: path.stat().st_mtime).name
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision or None).sha
    except Exception as error:  # as in `_loaded`
        raise UserError(_not_loaded(name, revision, error)) from error


@functools.cache
def load(name: str, revision: str) -> Any:
    """The splits of a hub data set at a commit, a ``datasets.DatasetDict``; downloads it where it is not yet here.

    Raises:
        UserError: no network and no copy, or no such data set.
    """
    online = reachable()
    if not online and not _prepared(name, revision):
        raise UserError(_unreachable(name))
    splits = _loaded(name, revision, offline=not online)
    # Without the hub, datasets opens the copy used last, whatever its revision.
    if not online and not all(revision in file["filename"] for split in splits.values() for file in split.cache_files):
        raise UserError(_unreachable(name))
    return splits


@functools.cache
def streamed(name: str, revision: str) -> Any:
    """The same as a ``datasets.IterableDatasetDict``, which is read over the network and is not put on the disk.

    Raises:
        UserError: no network, or no such data set.
    """
    if not reachable():
        raise UserError(_unreachable(name))
    return _loaded(name, revision, offline=False, streaming=True)


def _loaded(name: str, revision: str, *, offline: bool, **options: Any) -> Any:
    datasets = _import_datasets(offline=offline)
    try:
        return datasets.load_dataset(name, revision=revision, **options)
    except ConnectionError as error:
        raise UserError(_unreachable(name)) from error
    except Exception as error:  # of datasets, huggingface_hub, httpx and pyarrow, without a common base
        raise UserError(_not_loaded(name, revision, error)) from error


def _not_loaded(name: str, revision: str, error: Exception) -> str:
    return f"the hub's data set '{name}' (revision {revision or 'newest'}) cannot be loaded: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def streamed_texts(split: Any, name: str) -> Iterator[str | None]:
    """`texts` of a ``datasets.IterableDataset``.

    Raises:
        UserError: as `texts`; the network is lost for longer than ``datasets`` tries again.
    """
    try:
        yield from texts(split, name)
    except UserError:
        raise
    except Exception as error:  # as in `_loaded`
        raise UserError(
            f"the hub's data set '{name}' cannot be read to its end: {_first_line(error)}; start the same command again"
        ) from error


def texts(split: Any, name: str) -> Iterator[str | None]:
    """The texts of one split, a ``datasets.Dataset``, in its order; None where a row has none.

    Raises:
        UserError: it has no column of strings called ``text``.
    """
    columns = split.column_names
    if columns is None:  # of a stream without a description, whose first row says it
        columns = list(next(iter(split), {"text": None}))
    if "text" not in columns:
        raise UserError(f"the hub's data set '{name}' has no column 'text' (its columns: {', '.join(columns)}); choose another")
    for batch in split.select_columns(["text"]).iter(batch_size=1024):
        for text in batch["text"]:
            if not isinstance(text, str | None):
                raise UserError(f"the column 'text' of the hub's data set '{name}' holds {type(text).__name__}, not strings")
            yield text


def _unreachable(name: str) -> str:
    return (
        f"cannot reach the Hugging Face hub for '{name}': name a local copy instead (a folder with "
        "data/train-*.parquet and data/validation-*.parquet, or a .txt or .jsonl file), or 'toy' for "
        "built-in stories"
    )


def reachable() -> bool:
    """Whether the hub answers, found out in seconds: ``datasets`` itself tries for 23."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if getproxies():  # a proxy may reach what a socket cannot
        return True
    endpoint = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    address = (
        endpoint.hostname or "huggingface.co",
        endpoint.port or (80 if endpoint.scheme == "http" else 443),
    )
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=_SECONDS_TO_REACH_THE_HUB).close()
            answered.set()
        except OSError:
            pass

    # In a thread, since looking up a name has no time limit of its own.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_SECONDS_TO_REACH_THE_HUB)
    return answered.is_set()


def _prepared(name: str, revision: str) -> list[Path]:
    """The folders in which ``datasets`` has a revision on disk, in the one form that it can open without the hub."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    folder = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    owner, short_name = name.split("/")
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short_name).lower()
    return list(folder.glob(f"{owner}___{snake_case}/*/*/{revision}"))


def _import_datasets(*, offline: bool) -> Any:
    """``datasets``, told once and for all at its import that there is no network."""
    if offline and "datasets" not in sys.modules:
        before = os.environ.get("HF_HUB_OFFLINE")
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import datasets
        finally:
            if before is None:
                del os.environ["HF_HUB_OFFLINE"]
            else:
                os.environ["HF_HUB_OFFLINE"] = before
    import datasets

    return datasets
