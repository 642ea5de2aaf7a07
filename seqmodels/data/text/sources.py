"""What ``data.source`` names: the texts of a training and a validation split, read lazily.

* ``toy``: the built-in stories.
* the path of a file (.parquet, .jsonl, or text parted by ``<|endoftext|>``) or of a folder of such files
  (``folder`` says which of them are read, and as which split).
* a hub id such as ``roneneldan/TinyStories``.

What is held out is decided document by document, never inside one: ``data.validation_source`` if it is given; else the
source's own validation split; else the end of a text that is one document, or every 20th document. Every text passes the
repair of damaged text, except the built-in stories.
"""

import filecmp
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from seqmodels import suggest
from seqmodels.data import atomic, fingerprint
from seqmodels.data.text import folder, hub, readers, repair, toy
from seqmodels.data.text.folder import TRAIN, VALIDATION, Unread
from seqmodels.data.text.readers import Piece
from seqmodels.errors import UserError
from seqmodels.formats.limits import excerpt

TOY: Final = "toy"

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EVERY: Final = 20
"""One document in this many becomes validation where the source has none."""
_SHOWN_NAMES: Final = 3
"""So many files are named in a line; the run folder's record names all."""
_TYPICAL_BYTES: Final = 900
"""Of a document, for progress bars."""
_TYPICAL_STREAM_BYTES: Final = 1 << 32
"""Of a stream that does not say how long it is, for progress bars and for how many processes encode it."""
_PLAIN_TEXT_VERSION: Final = 2
"""Part of the key of cached tokens: raise it when plain text falls into other documents."""
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

    ``documents()`` starts reading at the first one, each time; ``fingerprint`` (JSON) is equal only for equal documents;
    ``text_bytes()`` is an estimate of their size, for progress bars. Where documents may be longer than memory,
    ``in_pieces(left_out)`` reads them so. ``label`` says what the split is; ``files`` are those it is read from.
    """

    documents: Callable[[], Iterator[str | None]]
    fingerprint: dict[str, Any]
    text_bytes: Callable[[], int]
    in_pieces: Callable[[Counter[str]], Iterator[Piece]] | None = None
    label: str = ""
    files: tuple[Path, ...] = ()
    root: Path | None = None
    """The folder that was named: its files are called by their places in it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its files, or what else it is."""
        return tuple(_place(file, self.root) for file in self.files) or (self.label,)

    def check_unchanged(self) -> None:
        """Whether the files, once read, are still those of the fingerprint.

        Raises:
            UserError: one of them was changed, or cannot be read, so that the text may mix two of its states.
        """
        for before in self.fingerprint.get("files") or ():
            try:
                changed = fingerprint.of_file(Path(before["path"])) != before
            except FileNotFoundError:
                changed = True
            except OSError as error:
                raise UserError(f"cannot read '{before['path']}': {error.strerror}") from error
            if changed:
                raise UserError(
                    f"'{before['path']}' was changed while it was read: start the same command again when it is complete"
                )

    def pieces(self, left_out: Counter[str]) -> Iterator[Piece]:
        """The documents that have text, in pieces; ``left_out`` counts the others by reason."""
        return readers.whole(self.documents(), left_out) if self.in_pieces is None else self.in_pieces(left_out)


@dataclass(frozen=True)
class Source:
    """A named source of text. A split it lacks is None.

    ``others`` are the splits that neither train nor validate, ``unread`` what beside them was found and is not read;
    ``held_out`` says why the validation split is what it is.
    """

    name: str
    train: Split | None
    validation: Split | None
    others: dict[str, Split] = field(default_factory=dict)
    unread: tuple[Unread, ...] = ()
    held_out: str = ""


def open_source(
    name: str,
    *,
    revision: str,
    toy_documents: int,
    streaming: bool = False,
    field: str = "data.source",
    commits: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """The source a name means.

    ``revision`` is the hub's, ``toy_documents`` the size of the toy's training split. The pinned revision
    of TinyStories is taken to mean no other data set: those come at their newest, or at their commit in ``commits``, which
    goes before what a revision means now. With ``streaming`` a data set of the hub
    is read over the network each time, in the same order, and is not put on the disk. ``field`` is what messages call the name.

    Raises:
        UserError: there is no such source, or it holds nothing that can be read; ``streaming`` of what is on the disk.
    """
    if streaming and not _is_on_the_hub(name):
        raise UserError(f"data.streaming is for a hub id, and data.source={name} is none: set data.streaming=False")
    if name == TOY:
        return Source(
            name,
            _toy_split(TRAIN, toy_documents),
            _toy_split(VALIDATION, toy.VALIDATION_DOCUMENTS),
            held_out="the built-in ones for validation",
        )
    path = atomic.expanded(name)
    if name and _exists(path):
        return _local(name, path, field)
    if _ADDRESS.match(name):
        raise UserError(f"{field} '{name}' is an address, from which nothing is read: fetch it, and give the path of the file")
    if _is_on_the_hub(name):
        revision = "" if name != hub.TINYSTORIES and revision == hub.TINYSTORIES_REVISION else revision
        known = name in commits and not hub.is_commit(revision)
        return _hub(name, commits[name] if known else hub.commit(name, revision), streaming=streaming)
    near = suggest.hint(name, [TOY, hub.TINYSTORIES]) or suggest.path_hint(path)
    raise UserError(f"{field} '{name}' does not exist: {near}give a file, a folder, a hub id such as {hub.TINYSTORIES}, or 'toy'")


def _is_on_the_hub(name: str) -> bool:
    path = atomic.expanded(name)
    return not (name and _exists(path)) and hub.is_hub_id(name) and path.suffix.lower() not in folder.FORMATS


def with_validation_from(
    source: Source, name: str, *, revision: str, streaming: bool = False, commits: Mapping[str, str] = MappingProxyType({})
) -> Source:
    """The source with another validation split: that of its own splits which ``name`` says, else the text it names, a path
    or a hub id, of which the validation split or else all is taken. A file of it is not in training.

    Raises:
        UserError: there is no such split or text, or training would be left without any text.
    """
    what = f"data.validation_source={name}"
    own = _splits(source)
    if name == TRAIN and TRAIN in own:
        raise UserError(f"{what} is what is trained on: name another split, a path or a hub id")
    held_out = own[name] if name in own else _named_text(name, source, revision, streaming, commits)
    unread = source.unread
    if source.validation is not None and held_out is not source.validation:
        unread += (Unread(source.validation.names, f"{what} is held out instead"),)
    others = {split: opened for split, opened in source.others.items() if split != name}
    return _without_held_out(replace(source, validation=held_out, others=others, unread=unread, held_out=what))


def _named_text(name: str, source: Source, revision: str, streaming: bool, commits: Mapping[str, str]) -> Split:
    """The text of a path, of a hub id, or of a hub id's split, ``owner/name:split``."""
    place, _, split = name.rpartition(":")
    if _exists(atomic.expanded(name)) or not hub.is_hub_id(place):
        place, split = name, ""
    try:
        streaming = streaming and _is_on_the_hub(place)
        opened = open_source(place, revision=revision, toy_documents=1, streaming=streaming, commits=commits)
    except UserError as error:
        raise UserError(
            f"data.validation_source '{name}' is neither a split that data.source has ({', '.join(_splits(source))}) nor "
            f"text ({error})"
        ) from error
    splits = _splits(opened)
    split = split or (VALIDATION if VALIDATION in splits else TRAIN)
    if split not in splits:
        raise UserError(f"data.validation_source '{name}' has no split '{split}'; it has {', '.join(splits)}")
    return splits[split]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # no permission, or a name that no file can have
        raise UserError(f"cannot read {excerpt(str(path))}: {error.strerror}") from error


def _splits(source: Source) -> dict[str, Split]:
    own = {TRAIN: source.train, VALIDATION: source.validation}
    return {name: split for name, split in own.items() if split is not None} | source.others


def _without_held_out(source: Source) -> Source:
    """The source without those training files that are held out, under the same name or another."""
    train, held_out = source.train, source.validation
    if train is None:
        return source
    if not train.files or not held_out.files:
        if train.fingerprint == held_out.fingerprint:
            raise UserError(f"{source.held_out} is what is trained on: name another split, a path or a hub id")
        return source
    both = _equal_to_others(train, _by_content(held_out))
    if len(both) == len(train.files):
        raise UserError(
            f"what is held out ({source.held_out}) is all that data.source={source.name} has to train on: name other text"
        )
    return _without(source, both, "held out, and so not trained on")


def _without(source: Source, files: Sequence[Path], reason: str) -> Source:
    """The source without some of its training files."""
    if not files:
        return source
    train = source.train
    names = tuple(sorted(_place(file, train.root) for file in files))
    rest = _files_split([file for file in train.files if file not in files], train.root)
    return replace(source, train=rest, unread=(*source.unread, Unread(names, reason)))


def contents(split: Split) -> list[tuple[int, str]]:
    """What tells its files from others wherever they are: the size of each, and a digest of a sample of what is in it."""
    return [(description["bytes"], description["sample"]) for description in split.fingerprint.get("files") or ()]


def commits(*splits: Split) -> dict[str, str]:
    """The commit at which each data set of the hub is read."""
    return {split.fingerprint["hub"]: split.fingerprint["revision"] for split in splits if "hub" in split.fingerprint}


def _by_content(split: Split) -> dict[tuple[int, str], Path]:
    """Its files by `contents`; of those that agree, the first."""
    by_content: dict[tuple[int, str], Path] = {}
    for file, content in zip(split.files, contents(split), strict=True):
        by_content.setdefault(content, file)
    return by_content


def _equal_to_others(split: Split, others: Mapping[tuple[int, str], Path]) -> list[Path]:
    """The split's files that hold the same bytes as one of the others, which may be itself under another name."""
    equal = []
    for file, content in zip(split.files, contents(split), strict=True):
        other = others.get(content)
        if other is not None and filecmp.cmp(file, other, shallow=False):
            equal.append(file)
    return equal


def with_validation(source: Source) -> Source:
    """The source with both splits; a missing validation split is taken from the training split.

    Of a single text, a file without any separator, it is the end; otherwise every 20th document.

    Raises:
        UserError: there is no training split, or too little in it.
    """
    if source.train is None:
        raise UserError(
            f"data.source '{source.name}' has no training split: name one of its files train, or give "
            "the path of the file to train on"
        )
    if source.validation is not None:
        return source
    files = source.train.files
    if len(files) == 1 and readers.is_plain_text(files[0]) and not readers.has_separator(files[0]):
        return _end_held_out(source, files[0])
    return _every_nth_held_out(source)


def _every_nth_held_out(source: Source) -> Source:
    """The second of every ``_EVERY`` documents is held out, all others are trained on."""
    train = source.train

    def others(left_out: Counter[str]) -> Iterator[Piece]:
        return (piece for number, piece in _numbered(train.pieces(left_out)) if number % _EVERY != 1)

    def held_out(left_out: Counter[str]) -> Iterator[Piece]:
        del left_out  # those without text are counted with the training split
        count = 0
        for number, piece in _numbered(train.pieces(Counter())):
            count = number + 1
            if number % _EVERY == 1:
                yield piece
        if count < 2:
            raise UserError(_too_few(source, count))

    return replace(
        source,
        train=_split(
            others,
            fingerprint=train.fingerprint | {"part": "all others", "of": _EVERY},
            text_bytes=lambda: int(train.text_bytes() * (1 - 1 / _EVERY)),
            label=train.label,
            files=train.files,
            root=train.root,
        ),
        validation=_split(
            held_out,
            fingerprint=train.fingerprint | {"part": "second", "of": _EVERY},
            text_bytes=lambda: train.text_bytes() // _EVERY,
            label=f"every {_EVERY}th of its documents",
            files=train.files,
            root=train.root,
        ),
        held_out="there is no validation split",
    )


def _too_few(source: Source, count: int) -> str:
    if not count:
        return f"data.source '{source.name}' holds no text"
    cut = f"part them by {readers.SEPARATOR}, or " if any(map(readers.is_plain_text, source.train.files)) else ""
    return (
        f"data.source '{source.name}' has too few documents, {count}, to keep some for validation: "
        f"{cut}name other text with data.validation_source"
    )


def _end_held_out(source: Source, file: Path) -> Source:
    """One text: its beginning is trained on, its end is held out, without a word that is in both."""
    size = file.stat().st_size
    cut = readers.place_to_cut(file, 1 - 1 / _EVERY)
    if not 0 < cut < size:
        raise UserError(
            f"data.source '{source.name}' is too short to hold out its end: give more text, or name other text with "
            "data.validation_source"
        )
    of = source.train.label
    return replace(
        source,
        train=_part(file, 0, cut, f"the first {cut:,} of {size:,} bytes of {of}"),
        validation=_part(file, cut, size, f"the last {size - cut:,} bytes of {of}"),
        held_out=f"it is one text without {readers.SEPARATOR}",
    )


def first_documents(split: Split, count: int) -> Split:
    """The first ``count`` documents of a split."""

    def first(left_out: Counter[str]) -> Iterator[Piece]:
        numbered = _numbered(split.pieces(left_out))
        return (piece for _, piece in itertools.takewhile(lambda each: each[0] < count, numbered))

    return _split(
        first,
        fingerprint=split.fingerprint | {"first": count},
        text_bytes=lambda: min(split.text_bytes(), count * _TYPICAL_BYTES),
        label=f"the first {count:,} documents of {split.label}",
        files=split.files,
        root=split.root,
    )


def training_line(source: Source) -> str:
    """One line of a source that is trained on: what is read, what is held out and why, and what is not read."""
    return (
        f"data: training on {source.train.label}; held out: {source.validation.label} ({source.held_out}); "
        f"not read: {_unread_text(unread_of(source, source.train, source.validation))}"
        f"{_commits_text(source.train, source.validation)}"
    )


def plain_text_note(source: Source) -> str | None:
    """What a person should know of plain text that looks like rows, whose marks and names would be learnt; None: it does not."""
    for split in (source.train, source.validation):
        for file in split.files[:1]:
            found = readers.looks_like(file) if readers.is_plain_text(file) else None
            if found is not None:
                return f"'{file}' looks like {found}"
    return None


def scoring_line(source: Source, split: Split) -> str:
    """One line of a source that is scored: which split is read, and what is not read."""
    return f"data: scoring {split.label}; not read: {_unread_text(unread_of(source, split))}{_commits_text(split)}"


def unread_of(source: Source, *read: Split) -> tuple[Unread, ...]:
    """What was found of a source beside the splits that are read."""
    others = [split for split in _splits(source).values() if not any(split is one for one in read)]
    return (*(Unread(split.names, "another split") for split in others), *source.unread)


def _unread_text(unread: Iterable[Unread]) -> str:
    return ", ".join(f"{_listed(names)} ({reason})" for names, reason in unread) or "nothing"


def _commits_text(*splits: Split) -> str:
    return "".join(f"; {name} at commit {commit}" for name, commit in commits(*splits).items())


def _listed(names: Iterable[str]) -> str:
    """A few names; quoted with Python's escapes, since a name may hold anything."""
    names = list(names)
    shown = [repr(name) for name in names[:_SHOWN_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")


def _numbered(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    """Each piece with the number of its document."""
    number = 0
    for piece in pieces:
        yield number, piece
        number += piece.ends


def _split(pieces: Callable[[Counter[str]], Iterator[Piece]], **fields: Any) -> Split:
    """A split that is read in pieces."""

    def documents() -> Iterator[str]:
        parts: list[str] = []
        for piece in pieces(Counter()):
            parts.append(piece.text)
            if piece.ends:
                yield "".join(parts)
                parts.clear()

    return Split(documents=documents, in_pieces=pieces, **fields)


def _toy_split(split: str, count: int) -> Split:
    return Split(
        documents=lambda: toy.stories(split, count),
        fingerprint={"toy": split, "stories": count, "version": toy.VERSION},
        text_bytes=lambda: count * toy.MEAN_BYTES,
        label=f"{count:,} built-in stories",
    )


def _local(name: str, path: Path, field: str) -> Source:
    if path.is_file():
        readers.check_ending(path)
        return Source(name, train=_files_split([path]), validation=None)
    if not path.is_dir():
        raise UserError(f"{field} '{name}' is neither a file nor a folder: it must be read more than once")
    layout = folder.layout(path)
    _refuse_two_versions(layout.splits.get(TRAIN) or ())
    splits = {split: _files_split(files, path) for split, files in layout.splits.items()}
    source = Source(
        name,
        splits.get(TRAIN),
        splits.get(VALIDATION),
        others={split: of for split, of in splits.items() if split not in (TRAIN, VALIDATION)},
        unread=layout.unread,
        held_out="by its name" if VALIDATION in splits else "",
    )
    if source.train is None:
        return source
    if source.validation is not None:
        return _without_held_out(source)
    # Of two equal documents one may be held out, and the other trained on.
    first = _by_content(source.train)
    copies = [file for file in _equal_to_others(source.train, first) if file not in first.values()]
    return _without(source, copies, "a copy of another file")


def _refuse_two_versions(files: Iterable[Path]) -> None:
    """TinyStories has two versions as text side by side, of which a run means one."""
    files = list(files)
    if {"TinyStories-train.txt", "TinyStoriesV2-GPT4-train.txt"} <= {file.name for file in files}:
        raise UserError(f"'{files[0].parent}' holds both versions of TinyStories: set data.source to the file of one")


def _place(file: Path, root: Path | None) -> str:
    """What a file is called: its place in the folder that was named."""
    return str(file.relative_to(root)) if root is not None and file.is_relative_to(root) else file.name


def _files_split(files: Iterable[Path], root: Path | None = None) -> Split:
    files = tuple(files)
    names = [_place(file, root) for file in files]

    def pieces(left_out: Counter[str]) -> Iterator[Piece]:
        for file in files:
            if len(files) > 1 and readers.is_empty(file):
                left_out[readers.EMPTY_FILE] += 1
                continue
            yield from _mended(readers.pieces(file, left_out), file.name in _DAMAGED_HUB_FILES)

    return _split(
        pieces,
        fingerprint=_fingerprint(files),
        text_bytes=lambda: sum(readers.text_bytes(file) for file in files),
        label=_listed(names) if len(files) <= _SHOWN_NAMES else f"{len(files):,} files, {names[0]!r} to {names[-1]!r}",
        files=files,
        root=root,
    )


def _part(file: Path, begin: int, end: int, label: str) -> Split:
    """The bytes ``begin`` to ``end`` of a text file."""
    return _split(
        lambda left_out: _mended(readers.pieces(file, left_out, begin=begin, end=end), False),
        fingerprint=_fingerprint([file]) | {"begin": begin, "end": end},
        text_bytes=lambda: end - begin,
        label=label,
        files=(file,),
    )


def _fingerprint(files: Iterable[Path]) -> dict[str, Any]:
    try:
        described = {"files": [fingerprint.of_file(file) for file in files], "repair": repair.VERSION}
    except OSError as error:
        raise UserError(f"cannot read '{error.filename}': {error.strerror}") from error
    return described | ({"plain text": _PLAIN_TEXT_VERSION} if any(map(readers.is_plain_text, files)) else {})


def _mended(pieces: Iterable[Piece], is_damaged: bool) -> Iterator[Piece]:
    mend = _mend_hub_text if is_damaged else repair.repair
    return (Piece(mend(piece.text), piece.ends) for piece in pieces)


def _hub(name: str, revision: str, *, streaming: bool = False) -> Source:
    """A data set of the hub at a commit."""
    if name == hub.TINYSTORIES and revision == hub.TINYSTORIES_REVISION:
        # Its splits are known, so that a run whose tokens are cached needs neither datasets nor a network.
        splits = (TRAIN, VALIDATION)
    else:
        splits = tuple(hub.streamed(name, revision) if streaming else hub.load(name, revision))
    if TRAIN not in splits and VALIDATION not in splits:
        raise UserError(f"the hub's data set '{name}' has neither a split 'train' nor 'validation' ({', '.join(splits)})")
    return Source(
        name,
        *(_hub_split(name, revision, split, streaming) if split in splits else None for split in (TRAIN, VALIDATION)),
        others={split: _hub_split(name, revision, split, streaming) for split in splits if split not in (TRAIN, VALIDATION)},
        held_out="by its name" if VALIDATION in splits else "",
    )


def _hub_split(name: str, revision: str, split: str, streaming: bool) -> Split:
    """``streaming`` is no part of the fingerprint: the documents are the same."""

    def pieces(left_out: Counter[str]) -> Iterator[Piece]:
        if streaming:
            texts = hub.streamed_texts(hub.streamed(name, revision)[split], name)
        else:
            texts = hub.texts(hub.load(name, revision)[split], name)
        return _mended(readers.whole(texts, left_out), name == hub.TINYSTORIES)

    def text_bytes() -> int:
        described = (hub.streamed if streaming else hub.load)(name, revision)[split].info.splits
        known = described[split].num_bytes if described and split in described else None
        return known or (_TYPICAL_STREAM_BYTES if streaming else 0)

    return _split(
        pieces,
        fingerprint={"hub": name, "revision": revision, "split": split, "repair": repair.VERSION},
        text_bytes=text_bytes,
        label=f"the hub's {name}, split {split!r}",
    )


def _mend_hub_text(text: str) -> str:
    return repair.collapse_blank_lines(repair.repair(text))
