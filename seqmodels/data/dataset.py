"""From a config to batches: source, tokenizer, cached tokens, training order and validation text; or a synthetic task."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np

from seqmodels import failures
from seqmodels.data import atomic, fingerprint, progress
from seqmodels.data.tasks import Task, batches
from seqmodels.data.tasks.batches import TaskDataset
from seqmodels.data.text import hub, repeated, sources
from seqmodels.data.text import tokenizer as tokenizers
from seqmodels.data.text import validation as validations
from seqmodels.data.text.batches import PACKINGS, PERMUTATION, Batch, Batches, train_batches
from seqmodels.data.text.shards import TokenStream, cached_tokens, key_lock
from seqmodels.data.text.tokenizer import Tokenizer
from seqmodels.data.text.unicode import well_formed
from seqmodels.data.text.validation import ValidationSet
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.formats import json_text, tokenizer_json
from seqmodels.formats.limits import read_bytes
from seqmodels.ranges import AtLeast, AtMost, Checked, Count, CountOrZero, OneOf

TEXT: Final = "text"
STORY_PROMPT: Final = "Once upon a time"
PROMPT_WORDS: Final = 4
PROMPT_CHARACTERS: Final = 40  # where words are not parted
RECORD_NAME: Final = "data.json"
"""Of a run folder: what was read, what was held out and why, and what was not read."""


@dataclass(frozen=True)
class DataConfig(Checked, where="data"):
    """What to train on."""

    source: str = "roneneldan/TinyStories"  # a hub id, a local folder or file (parquet, txt, jsonl), or "toy"
    revision: str = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"  # of the hub id; ignored for local data and toy
    streaming: bool = False  # read the hub id over the network as tokens are made, with no copy of its text on the disk
    validation_source: str | None = None  # what is held out: a split, path or hub id (docs/data.md)
    tokenizer: str = "bpe"  # "bpe" (byte-level, trained on the train split), "bytes", or a tokenizer.json
    vocab_size: Annotated[int, AtLeast(0), AtMost(2**24)] = 4096  # tokens of the bpe tokenizer; ignored by the others
    seq_len: Count = 256  # T, tokens the model reads at once
    batch_size: Count = 16  # B, sequences per optimizer step (over all devices and accumulation steps)
    # "windows" (contiguous, no padding) or "documents" (whole, with reset marks)
    packing: Annotated[str, OneOf(PACKINGS)] = "windows"
    cache_dir: str = "~/.cache/seqmodels/data"  # where tokens are kept, written once per source and tokenizer
    max_train_documents: CountOrZero = 0  # use only the first so many documents of the train split; 0: all
    toy_documents: Annotated[Count, AtMost(10**7)] = 4000  # stories that the "toy" source generates for training
    task: str = "text"  # or a synthetic task: its name in config.data.tasks; of the above, it asks seq_len and batch_size
    tasks: tuple[tuple[str, Task], ...] = ()  # (name, options) of the task; empty for text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == TEXT and not self.source:
            raise UserError("data.source is empty: say what to train on with --config.data.source=PATH, a hub id, or toy")
        if self.tokenizer == "bpe":
            tokenizers.check_bpe_size(self.vocab_size)
        if self.synthetic_task is not None:
            batches.check(self.synthetic_task, self.seq_len, self.batch_size)

    @property
    def synthetic_task(self) -> Task | None:
        """The synthetic task, if it is one."""
        return None if self.task == TEXT else dict(self.tasks)[self.task]


@dataclass(frozen=True)
class Dataset:
    """Tokens ready to train on: ``train`` a stream that is kept in files, ``validation`` a text in fixed order."""

    name: str
    """The field of the config that says where the text is from, and its value."""
    tokenizer: Tokenizer
    train: TokenStream
    validation: ValidationSet
    train_batches: Batches
    digests: dict[str, str] = field(default_factory=dict)
    """Of the tokens that are trained on, and of those that are held out, by the name of the split."""
    record: dict[str, Any] = field(default_factory=dict)
    """What was read, held out and not read (JSON): the run folder's data.json."""

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs."""
        return self.tokenizer.vocab_size

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a training step, a pure function of (seed, step), or some rows of it: only these are read.

        ``inputs`` and ``targets`` [B, T] int32; with packed documents also ``reset`` [B, T] bool and
        ``weights`` [B, T] float32.
        """
        return self.train_batches(step, rows)

    @property
    def order(self) -> str:
        """How rows are shuffled: a run that goes on keeps it."""
        return self.train_batches.order

    def with_order(self, order: str | None) -> "Dataset":
        """The same data in the order that a checkpoint names; None, of runs made before it was named: a permutation."""
        return replace(self, train_batches=self.train_batches.with_order(order or PERMUTATION))

    @property
    def prompt(self) -> str:
        """What a sample begins with where nothing else is said: of TinyStories and toy their usual words, else a document's first."""
        source = self.name.partition("=")[2]
        if source == "toy" or "tinystories" in source.lower():
            return STORY_PROMPT
        text = self.tokenizer.decode(
            [int(token) for token in self.validation.tokens[: int(self.validation.document_ends[0])][:32]]
        )
        found = re.match(rf"\s*(?:\S+\s+){{0,{PROMPT_WORDS - 1}}}\S+", text)
        return found[0][:PROMPT_CHARACTERS] if found else STORY_PROMPT

    @property
    def rows_per_epoch(self) -> int:
        """Rows of a batch that the training text makes; after so many rows it begins again in a new order."""
        return self.train_batches.rows_per_epoch

    @property
    def train_bytes_per_token(self) -> float:
        """Bytes of training text per token, the ends of text counted as tokens."""
        return self.train.bytes_per_token

    @property
    def fingerprint(self) -> str:
        """A digest of 256 blocks spread over the training tokens, at a cost that does not grow with them."""
        tokens = self.train.tokens
        digest = hashlib.blake2b(str(len(tokens)).encode(), digest_size=16)
        for begin in np.linspace(0, max(0, len(tokens) - 4096), 256, dtype=np.int64):
            digest.update(tokens[begin : begin + 4096].tobytes())
        return digest.hexdigest()

    def mend(self, workdir: str | os.PathLike[str]) -> list[str]:
        """Write anew what `save` wrote and what is damaged now, or gone; returns a line for each file.

        The data must be those that the folder was begun with.

        Raises:
            UserError: the folder cannot be written.
        """
        mended = []
        try:
            is_whole = tokenizers.digest(tokenizers.load_tokenizer(Path(workdir) / "tokenizer.json")) == tokenizers.digest(
                self.tokenizer
            )
        except UserError:
            is_whole = False
        if not is_whole:
            self.tokenizer.save(Path(workdir) / "tokenizer.json")
            mended.append("tokenizer.json")
        try:
            is_whole = validations.load_validation(workdir, self.vocab_size).digest == self.validation.digest
        except UserError:
            is_whole = False
        if not is_whole:
            save_validation(self, workdir)
            mended.append(validations.FILE_NAME)
        return [f"{Path(workdir) / name} was damaged or gone, and is written anew" for name in mended]

    def save(self, workdir: str | os.PathLike[str]) -> None:
        """Write what eval.py and generate.py need of the data, the tokenizer and the validation tokens, and what was read.

        Raises:
            UserError: the folder cannot be written.
        """
        self.tokenizer.save(Path(workdir) / "tokenizer.json")
        save_validation(self, workdir)
        with atomic.disk_errors_as_user_errors("workdir", workdir):
            atomic.write_text(Path(workdir) / RECORD_NAME, json.dumps(self.record, indent=2) + "\n")


def prepare(config: DataConfig, *, seed: int, begun_with: Mapping[str, Any] | None = None) -> Dataset | TaskDataset:
    """Open the source, train or load the tokenizer, tokenise what the cache has not; ready for any step.

    Of a synthetic task, the same without any of this: it has no tokenizer, and no bytes of text.

    Args:
        begun_with: the record of a run that goes on (`Dataset.record`): data sets of the hub are read at the commits that it
            names, wherever a branch, a tag or the newest is asked for.

    Raises:
        UserError: the config, the source, the tokenizer or the cache folder cannot be used.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}: it must be 0 or more")
    if config.synthetic_task is not None:
        return TaskDataset(config.task, config.synthetic_task, seq_len=config.seq_len, batch_size=config.batch_size, seed=seed)
    of_hub = {"revision": config.revision, "streaming": config.streaming, "commits": _commits(begun_with)}
    source = sources.open_source(config.source, toy_documents=config.toy_documents, **of_hub)
    if config.validation_source:
        source = sources.with_validation_from(source, config.validation_source, **of_hub)
    source = sources.with_validation(source)
    train = source.train
    if config.max_train_documents:
        train = sources.first_documents(train, config.max_train_documents)
        source = replace(source, train=train)
    line = sources.training_line(source)
    say(line)
    tokenizer = _tokenizer(config, train)
    stream = cached_tokens(config.cache_dir, train, tokenizer, label=f"training split of {_short(source.name)}")
    batches = train_batches(
        stream,
        packing=config.packing,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        end_of_text=tokenizer.end_of_text,
        seed=seed,
    )
    validation, held_out_digest = _validation_set(
        config.validation_source or source.name, source.validation, tokenizer, config.cache_dir, config.packing
    )
    _say_what_was_left_out(stream, "training")
    few = validations.few_documents(len(validation.document_ends), "held out")
    digests = {"train": stream.digest, "validation": held_out_digest}
    again = repeated.note(repeated.known(config.cache_dir, stream, validation, digests))
    for what in (few, again, sources.plain_text_note(source)):
        if what is not None:
            say(f"data: {what}")
    return Dataset(
        name=f"data.source={config.source}",
        tokenizer=tokenizer,
        train=stream,
        validation=validation,
        train_batches=batches,
        digests=digests,
        record=_record(line, source, stream, validation),
    )


def validation_from_source(
    source: str,
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str],
    revision: str = "",
    packing: str = "windows",
    trained_on: Mapping[str, Any] | None = None,
) -> ValidationSet:
    """Held-out text other than a run's own: a path, a hub id or ``toy``.

    The source's validation split where it has one, else all of its text.

    Args:
        trained_on: the record that a run keeps of its data (`Dataset.record`); that it was trained on this text is said, and
            a data set of the hub that it names is read at the same commit.

    Raises:
        UserError: there is no such source, or nothing in it.
    """
    opened = sources.open_source(source, revision=revision, toy_documents=1, field="data", commits=_commits(trained_on))
    split = opened.validation or opened.train
    if split is None:
        raise UserError(f"'{source}' has neither a validation nor a training split")
    say(sources.scoring_line(opened, split))
    if _was_trained_on(split, trained_on):
        say(f"data: the run was trained on {split.label}, on parts of it at least: the score says little of other text")
    return _validation_set(opened.name, split, tokenizer, cache_dir, packing, place="cache_dir")[0]


def read_record(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a run folder's data; None where there is none, or it is damaged, which is said.

    Raises:
        OSError: it cannot be read now.
    """
    path = Path(workdir) / RECORD_NAME
    try:
        record = json_text.read(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        say(f"{error}: what it says of the run's data is passed over")
        return None
    return record if isinstance(record, dict) else None


def _commits(record: Mapping[str, Any] | None) -> dict[str, str]:
    """The commits of the hub that a record names."""
    commits = None if record is None else record.get("commits")
    if not isinstance(commits, dict):
        return {}
    return {name: commit for name, commit in commits.items() if hub.is_commit(commit)}


def _was_trained_on(split: sources.Split, record: Mapping[str, Any] | None) -> bool:
    """Whether a file of the split, or what else it is, is among what a record says of training; copies of files count."""
    train = None if record is None else record.get("train")
    if not isinstance(train, dict):
        return False
    if not split.files:
        return train.get("what") == split.label
    known = train.get("contents")
    contents = [list(content) for content in sources.contents(split)]
    return isinstance(known, list) and any(content in known for content in contents)


def save_validation(dataset: Dataset, workdir: str | os.PathLike[str]) -> None:
    """Write the run folder's validation.npz, from which eval.py needs nothing else.

    Raises:
        UserError: the folder cannot be written.
    """
    validations.write(dataset.validation, workdir)


def _record(line: str, source: sources.Source, train: TokenStream, validation: ValidationSet) -> dict[str, Any]:
    """What data.json holds: in one line, and in full."""
    splits = {
        name: {
            "what": split.label,
            "files": [str(file) for file in split.files],
            "contents": [list(content) for content in sources.contents(split)],
            "documents": len(of.document_ends),
            "tokens": len(of),
            "bytes": int(of.document_bytes.sum()),
        }
        for name, split, of in (("train", source.train, train), ("validation", source.validation, validation))
    }
    unread = sources.unread_of(source, source.train, source.validation)
    return {
        "said": line,
        "source": source.name,
        **splits,
        "commits": sources.commits(source.train, source.validation),
        "held_out_because": source.held_out,
        "left_out": train.left_out,
        "not_read": [{"names": list(names), "reason": reason} for names, reason in unread],
    }


def _say_what_was_left_out(stream: TokenStream, split: str) -> None:
    if stream.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in stream.left_out.items())
        say(f"data: {split} documents without text were left out ({reasons})")
    if stream.marked:
        say(
            f"data: {stream.marked:,} {split} documents have a byte order mark (U+FEFF) inside, which is kept as a character: files "
            "were joined there, or saved twice"
        )


def _validation_set(
    name: str,
    split: sources.Split,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    packing: str,
    *,
    place: str = "data.cache_dir",
) -> tuple[ValidationSet, str]:
    """The tokens of a split, and their digest."""
    stream = cached_tokens(cache_dir, split, tokenizer, label=f"validation split of {_short(name)}", place=place)
    _say_what_was_left_out(stream, "validation")
    validation = ValidationSet(
        tokens=stream.tokens,
        document_ends=stream.document_ends,
        document_bytes=stream.document_bytes,
        end_of_text=tokenizer.end_of_text,
        tokenizer_name=tokenizer.name,
        source=well_formed(name),  # a file's name may hold bytes that are not UTF-8
        packing=packing,
    )
    return validation, stream.digest


def is_another(before: str | None, now: str) -> bool:
    """Whether two digests, each ``format:digest``, are known to be of different things."""
    return before is not None and before.partition(":")[0] == now.partition(":")[0] and before != now


def _short(source: str) -> str:
    return Path(source).name or source


def _tokenizer(config: DataConfig, train: sources.Split) -> Tokenizer:
    """The tokenizer of a config; a BPE is trained on the training split once and kept in the cache."""
    if config.tokenizer != "bpe":
        return tokenizers.load_tokenizer(config.tokenizer)
    description = {
        "source": train.fingerprint,
        "bpe": config.vocab_size,
        "text": tokenizers.BPE_TRAINING_BYTES,
    }
    folder, key = atomic.expanded(config.cache_dir) / "tokenizers", fingerprint.key_of(description)
    with atomic.disk_errors_as_user_errors("data.cache_dir", config.cache_dir):
        tokenizer = _cached_tokenizer(folder, key)
        if tokenizer is not None:
            return tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        with key_lock(config.cache_dir, key, "another process is training the same tokenizer: waiting for it"):
            tokenizer = _cached_tokenizer(folder, key)
            if tokenizer is not None:
                return tokenizer
            total = min(train.text_bytes(), tokenizers.BPE_TRAINING_BYTES)
            pieces = progress.over(train.pieces(Counter()), "training the BPE tokenizer", total)
            tokenizer = tokenizers.train_bpe((piece.text for piece in pieces), config.vocab_size)
            tokenizer.save(folder / f"{key}.{tokenizers.digest(tokenizer)}.json")
    return tokenizer


def _cached_tokenizer(folder: Path, key: str) -> Tokenizer | None:
    """The tokenizer of a key, whose file has a digest of it in its name; None where there is none, or it is damaged."""
    for path in folder.glob(f"{key}.*.json"):
        try:
            if path.name == f"{key}.{tokenizers.digest_of(read_bytes(path, tokenizer_json.MOST_BYTES))}.json":
                return tokenizers.load_tokenizer(path)
            reason = f"'{path}' is not what was written"
        except UserError as error:
            reason = str(error)
        except OSError as error:
            reason = f"'{path}': {error.strerror}"
            if error.errno not in failures.OF_ANOTHER_KIND:
                raise UserError(f"cannot read the cached tokenizer {reason}") from error
        say(f"the cached tokenizer is damaged and is trained again ({reason})")
        atomic.remove(path)
    return None
