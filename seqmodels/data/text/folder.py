"""Which files of a folder are read, as which split, and which are not: decided by its layout, and said.

Read are the files of one format, in the folder's ``data/`` or else in itself; where neither has any, those of its
subfolders. A name says a split in two cases only, as a whole word: in the hub's layout (``validation-00000-of-00001``,
or the bare word, ``validation``), and where a file beside it is named alike but for ``train`` (``stories-train`` and
``stories-valid``). Any other file, ``test_of_time`` or ``dev-notes``, is text to train on.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from seqmodels import failures
from seqmodels.errors import UserError

FORMATS: Final = (".parquet", ".jsonl", ".txt")
"""Endings of the files that a folder is read for; the first that is there is the one that is read."""

TRAIN, VALIDATION, TEST = "train", "validation", "test"

_SPLITS: Final = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "test": TEST,
}  # fmt: skip
_MOST_SHARDS: Final = 10_000
# A prefix, a split's word, and the number of a shard, "-of-" and how many there are, and a digest.
_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[-_.])?(?P<word>{'|'.join(_SPLITS)})"
    r"(?P<shard>[-_.](?P<number>\d+)(?P<of>-of-(?P<count>\d+))?(?:-[0-9a-f]+)?)?"
)


class Unread(NamedTuple):
    """Files or folders that are not read, and why."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Layout:
    """The files of a folder that have text, by split (`TRAIN`, `VALIDATION`, `TEST`), each in the order of names."""

    splits: dict[str, tuple[Path, ...]]
    unread: tuple[Unread, ...]


def layout(folder: Path) -> Layout:
    """What of a folder is read.

    Raises:
        UserError: it holds no file of a format that is read, or cannot be listed.
    """
    try:
        with failures.named(folder):
            files = _files(folder)
            splits: dict[str, list[Path]] = {}
            for file, split in zip(files, _splits_of(files, folder), strict=True):
                splits.setdefault(split, []).append(file)
            unread = (*_unread(folder, files), *_missing_shards(folder, files))
            return Layout({split: tuple(of) for split, of in splits.items()}, unread)
    except OSError as error:
        raise UserError(f"cannot read '{error.filename}': {error.strerror}") from error


def _files(folder: Path) -> list[Path]:
    """The files of the first format found in the first place that has any, in the order of names."""
    places = (_in(folder / "data"), _in(folder), _below(folder))
    for place in places:
        found = [path for path in place if not _is_hidden(path, folder) and path.is_file()]
        for ending in FORMATS:
            files = sorted(path for path in found if path.suffix.lower() == ending)
            if files:
                return files
    others = Counter(path.suffix.lower() for path in found if path.suffix)
    there = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(3))
    raise UserError(
        f"the folder '{folder}' holds no {', '.join(FORMATS)} files, neither in itself nor in its subfolders"
        + (f", but {there}: save their texts as .parquet or .jsonl, in a column 'text'" if there else "")
    )


def _in(folder: Path) -> Iterator[Path]:
    """What is in a folder, nothing where there is none. (`Path.glob` finds nothing in one that may not be listed.)

    Raises:
        OSError: it cannot be listed.
    """
    if folder.is_dir():
        yield from folder.iterdir()


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder.

    Raises:
        OSError: a folder among them cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            yield Path(place, name)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _splits_of(files: list[Path], folder: Path) -> list[str]:
    """The split that each file's name says, or that of the subfolder it is in; training text where none is said."""
    names = [_NAME.fullmatch(file.stem.lower()) for file in files]
    beside_training = {_without_word(file, name) for file, name in zip(files, names) if name and _SPLITS[name["word"]] == TRAIN}
    splits = []
    for file, name in zip(files, names):
        if name and (name["of"] or (not name["prefix"] and not name["shard"]) or _without_word(file, name) in beside_training):
            splits.append(_SPLITS[name["word"]])
        else:
            subfolders = [part for part in map(str.lower, file.relative_to(folder).parts[:-1]) if part in _SPLITS]
            splits.append(_SPLITS[subfolders[-1]] if subfolders else TRAIN)
    return splits


def _without_word(file: Path, name: re.Match[str]) -> tuple:
    return file.parent, name["prefix"], bool(name["shard"])


def _unread(folder: Path, files: list[Path]) -> tuple[Unread, ...]:
    """What else is in the folder and in the folders of the files that are read; a subfolder without any as one thing."""
    read, parents = set(files), {parent for file in files for parent in file.parents}
    ending = files[0].suffix.lower()
    by_reason: dict[str, list[str]] = {}
    for place in sorted({folder, *(parent for parent in parents if parent.is_relative_to(folder))}):
        for path in sorted(place.iterdir()):
            if path in read or path in parents:
                continue
            by_reason.setdefault(_why_unread(path, folder, ending), []).append(str(path.relative_to(folder)))
    return tuple(Unread(tuple(names), reason) for reason, names in by_reason.items())


def _why_unread(path: Path, folder: Path, ending: str) -> str:
    if _is_hidden(path, folder):
        return "hidden"
    if path.is_dir():
        return "a folder beside the files that are read"
    if not path.is_file():
        return "a link that leads nowhere, a pipe, a socket or a device"
    if path.suffix.lower() not in FORMATS:
        return "not of a format that is read"
    if path.suffix.lower() != ending:
        return f"of another format than {ending}, and one is read"
    return "beside the folder that is read"


def _missing_shards(folder: Path, files: list[Path]) -> tuple[Unread, ...]:
    """What ``-of-00003`` in the names of the files says that there is, and there is not: a copy of a part of a data set."""
    sets: dict[tuple, dict[int, Path]] = {}
    for file in files:
        name = _NAME.fullmatch(file.stem.lower())
        if name and name["of"]:
            sets.setdefault((file.parent, name["prefix"], name["word"], name["count"]), {})[int(name["number"])] = file
    missing = []
    for (parent, _, word, count), there in sets.items():
        if len(there) >= int(count):  # counted from 1
            continue
        example = next(iter(there.values()))
        absent = [number for number in range(min(int(count), _MOST_SHARDS)) if number not in there]
        missing += [
            str((parent / f"{word}-{number:0{len(count)}d}-of-{count}{example.suffix}").relative_to(folder)) for number in absent
        ]
    return (Unread(tuple(missing), "of the same set as the files beside, and not there"),) if missing else ()
