"""What ``data.source`` names: the texts of a training and a validation split, read lazily.

* ``toy``: the built-in stories.
* the path of a file (.parquet, .jsonl, or text parted by ``<|endoftext|>``) or of a folder of such
  files, by themselves or in its ``data/``; names with ``train`` and ``valid`` say which split they are.
* a hub id such as ``roneneldan/TinyStories``.

A source without a validation split gives up every 20th document for one. Every text passes the repair
of damaged text, except the built-in stories.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from seqmodels.data import fingerprint
from seqmodels.data.text import hub, readers, repair, toy
from seqmodels.errors import UserError

TOY: Final = "toy"

_EVERY: Final = 20
"""One document in this many becomes validation where the source has none."""
_TYPICAL_BYTES: Final = 900
"""Of a document, for progress bars."""
_FORMATS: Final = (".parquet", ".jsonl", ".txt")
_SPLIT_WORDS: Final = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# The hub's damaged files, by the digests in their names: all of their blank lines are of the damage.
_DAMAGED_HUB_FILES: Final = {
    "train-00000-of-00004-2d5a1467fff1081b.parquet",
    "train-00001-of-00004-5852b56a2bd28fd9.parquet",
    "train-00002-of-00004-a26307300439e943.parquet",
    "train-00003-of-00004-d243063613e5a057.parquet",
    "validation-00000-of-00001-869c898b519ad725.parquet",
}


@dataclass(frozen=True)
class Split:
    """The documents of one split.

    ``documents()`` starts reading at the first one, each time; ``fingerprint`` (JSON) is equal only for
    equal documents; ``text_bytes()`` is an estimate of their size, for progress bars.
    """

    documents: Callable[[], Iterator[str]]
    fingerprint: dict[str, Any]
    text_bytes: Callable[[], int]


@dataclass(frozen=True)
class Source:
    """A named source of text. A split it lacks is None."""

    name: str
    train: Split | None
    validation: Split | None


def open_source(name: str, *, revision: str, toy_documents: int) -> Source:
    """The source a name means.

    ``revision`` is the hub's, ``toy_documents`` the size of the toy's training split. The pinned revision
    of TinyStories is taken to mean no other data set: those come at their newest.

    Raises:
        UserError: there is no such source, or it holds nothing that can be read.
    """
    if name == TOY:
        return Source(
            name, _toy_split("train", toy_documents), _toy_split("validation", toy.VALIDATION_DOCUMENTS)
        )
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(name, path)
    if hub.is_hub_id(name) and path.suffix.lower() not in _FORMATS:
        return _hub(
            name, "" if name != hub.TINYSTORIES and revision == hub.TINYSTORIES_REVISION else revision
        )
    raise UserError(
        f"data.source '{name}' does not exist: give a file, a folder, a hub id such as {hub.TINYSTORIES}, "
        "or 'toy'"
    )


def with_validation(source: Source) -> Source:
    """The source with both splits; a missing validation split is every 20th document of the training split.

    Raises:
        UserError: there is no training split.
    """
    if source.train is None:
        raise UserError(
            f"data.source '{source.name}' has no training split: name one of its files train-something"
        )
    if source.validation is not None:
        return source
    train = source.train

    def validation_documents() -> Iterator[str]:
        count = 0
        for i, text in enumerate(train.documents()):
            count += 1
            if i % _EVERY == 1:
                yield text
        if count < 2:
            raise UserError(
                f"data.source '{source.name}' has too few documents, {count}, to keep some for validation: "
                f"part them by {readers.SEPARATOR}, or give a folder with a train and a valid file"
            )

    return replace(
        source,
        train=Split(
            documents=lambda: (text for i, text in enumerate(train.documents()) if i % _EVERY != 1),
            fingerprint=train.fingerprint | {"part": "all others", "of": _EVERY},
            text_bytes=lambda: int(train.text_bytes() * (1 - 1 / _EVERY)),
        ),
        validation=Split(
            documents=validation_documents,
            fingerprint=train.fingerprint | {"part": "second", "of": _EVERY},
            text_bytes=lambda: train.text_bytes() // _EVERY,
        ),
    )


def first_documents(split: Split, count: int) -> Split:
    """The first ``count`` documents of a split."""
    return Split(
        documents=lambda: itertools.islice(split.documents(), count),
        fingerprint=split.fingerprint | {"first": count},
        text_bytes=lambda: min(split.text_bytes(), count * _TYPICAL_BYTES),
    )


def _toy_split(split: str, count: int) -> Split:
    return Split(
        documents=lambda: toy.stories(split, count),
        fingerprint={"toy": split, "stories": count, "version": toy.VERSION},
        text_bytes=lambda: count * toy.MEAN_BYTES,
    )


def _local(name: str, path: Path) -> Source:
    if path.is_file():
        return Source(name, train=_files_split([path]), validation=None)
    if not path.is_dir():
        raise UserError(
            f"data.source '{name}' is neither a file nor a folder: it must be read more than once"
        )
    files = _text_files(path)
    by_split: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for file in files:
        by_split[_split_of(file)].append(file)
    _refuse_two_versions(by_split["train"])
    train, validation = by_split["train"], by_split["validation"]
    return Source(
        name, _files_split(train) if train else None, _files_split(validation) if validation else None
    )


def _text_files(folder: Path) -> list[Path]:
    """The files of the first format found, in ``data/`` or else the folder itself, in the order of names."""
    for place in (folder / "data", folder):
        for ending in _FORMATS:
            files = sorted(file for file in place.glob(f"*{ending}") if file.is_file())
            if files:
                return files
    raise UserError(
        f"the folder '{folder}' holds no {', '.join(_FORMATS)} files, neither in itself nor in data/"
    )


def _split_of(file: Path) -> str:
    """The split that the words of a file's name say; a name that says none is training text."""
    for word in re.split(r"[^a-z]+", file.stem.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return "train"


def _refuse_two_versions(files: list[Path]) -> None:
    """TinyStories has two versions as text side by side, of which a run means one."""
    if {"TinyStories-train.txt", "TinyStoriesV2-GPT4-train.txt"} <= {file.name for file in files}:
        raise UserError(
            f"'{files[0].parent}' holds both versions of TinyStories: set data.source to the file of one"
        )


def _files_split(files: list[Path]) -> Split:
    def documents() -> Iterator[str]:
        for file in files:
            mend = _mend_hub_text if file.name in _DAMAGED_HUB_FILES else repair.repair
            yield from map(mend, readers.documents(file))

    try:
        fingerprints = [fingerprint.of_file(file) for file in files]
    except OSError as error:
        raise UserError(f"cannot read '{error.filename}': {error.strerror}") from error
    return Split(
        documents=documents,
        fingerprint={"files": fingerprints, "repair": repair.VERSION},
        text_bytes=lambda: sum(readers.text_bytes(file) for file in files),
    )


def _hub(name: str, revision: str) -> Source:
    if name == hub.TINYSTORIES and revision == hub.TINYSTORIES_REVISION:
        # Its splits are known, so that a run whose tokens are cached needs neither datasets nor a network.
        return Source(name, _hub_split(name, revision, "train"), _hub_split(name, revision, "validation"))
    splits = hub.load(name, revision)
    if "train" not in splits and "validation" not in splits:
        raise UserError(
            f"the hub's data set '{name}' has neither a split 'train' nor 'validation' ({', '.join(splits)})"
        )
    return Source(
        name,
        *(
            _hub_split(name, revision, split) if split in splits else None
            for split in ("train", "validation")
        ),
    )


def _hub_split(name: str, revision: str, split: str) -> Split:
    def documents() -> Iterator[str]:
        mend = _mend_hub_text if name == hub.TINYSTORIES else repair.repair
        return map(mend, hub.texts(hub.load(name, revision)[split], name))

    return Split(
        documents=documents,
        fingerprint={"hub": name, "revision": revision, "split": split, "repair": repair.VERSION},
        text_bytes=lambda: hub.load(name, revision)[split].info.splits[split].num_bytes or 0,
    )


def _mend_hub_text(text: str) -> str:
    return repair.collapse_blank_lines(repair.repair(text))
