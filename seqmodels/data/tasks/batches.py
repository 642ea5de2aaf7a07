"""The data of a run on a synthetic task: training batches that are functions of (seed, step), and the test.

Examples of several sizes come in their order, a batch of one size at a time, as in the benchmarks the tasks are from. All
training batches have ``data.seq_len`` columns, so that a training step is compiled once; a causal model does not see the
padding behind an example.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from seqmodels.data.tasks import Segment, Task
from seqmodels.data.tasks.task import Rows
from seqmodels.data.text.batches import Batch
from seqmodels.errors import UserError


@dataclass(frozen=True)
class HeldOutSegment:
    """The test's examples of one size, each as long as they are."""

    task: Task
    segment: Segment

    def __len__(self) -> int:
        return self.segment.length * self.segment.examples

    def batches(self, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """All examples in order: ``inputs``, ``targets`` and ``weights``, 1 on what is labelled, all [batch_size, seq_len].

        Rows beyond the last example weigh nothing. ``max_tokens`` stops after whole batches of about so many tokens, after
        one at the earliest.
        """
        examples = self.segment.examples
        if max_tokens is not None:
            examples = min(examples, batch_size * max(1, max_tokens // (batch_size * seq_len)))
        for first in range(0, examples, batch_size):
            count = min(batch_size, examples - first)
            rows = self.task.rows(self.segment, first, count, training=False, seed=0)
            yield _batch(rows, (batch_size, seq_len), self.task.pad_id)


@dataclass(frozen=True)
class HeldOut:
    """The held-out examples of a task: segments by name, the same for every seed."""

    segments: dict[str, HeldOutSegment]

    def __len__(self) -> int:
        return sum(map(len, self.segments.values()))


def held_out(task: Task, segments: tuple[Segment, ...]) -> HeldOut:
    """The test of some sizes."""
    return HeldOut({task.label(segment): HeldOutSegment(task, segment) for segment in segments})


class TaskDataset:
    """A task's training batches and its test, behind the same names as those of a text (``seqmodels.data.Dataset``).

    Raises:
        UserError: the sizes do not fit into ``seq_len``, or there are too few examples for a batch.
    """

    tokenizer = None
    train_bytes_per_token = None
    order = None  # nothing is shuffled
    digests: Mapping[str, str] = MappingProxyType({})  # nothing is read

    def __init__(self, name: str, task: Task, *, seq_len: int, batch_size: int, seed: int):
        self.name = f"data.task={name}"
        self.vocab_size = task.vocab_size
        self.validation = held_out(task, task.test_segments(seq_len))
        self._task, self._segments, self._seed = task, check(task, seq_len, batch_size), seed
        self._shape = batch_size, seq_len
        self._batches = np.array([segment.examples // batch_size for segment in self._segments])

    def train_batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """``inputs``, ``targets`` and ``weights`` of a training step, [batch_size, seq_len], or some rows of it."""
        segment, number = self._place(step)
        batch_size, seq_len = self._shape
        first, end, _ = rows.indices(batch_size)
        drawn = self._task.rows(segment, number * batch_size + first, end - first, training=True, seed=self._seed)
        return _batch(drawn, (end - first, seq_len), self._task.pad_id)

    def with_order(self, order: None) -> "TaskDataset":
        """Itself."""
        return self

    def _place(self, step: int) -> tuple[Segment, int]:
        """The segment of a step, and which of its batches it is."""
        if not self._batches.any():  # endless ones take turns
            return self._segments[step % len(self._segments)], step // len(self._segments)
        ends = np.cumsum(self._batches)
        number = step % int(ends[-1])
        index = int(np.searchsorted(ends, number, side="right"))
        return self._segments[index], number - int(ends[index] - self._batches[index])

    @property
    def fingerprint(self) -> str:
        """A digest of the first batch: another version of the generator gives another."""
        digest = hashlib.blake2b(digest_size=16)
        for array in self.train_batch(0).values():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, workdir: str | os.PathLike[str]) -> None:
        """Nothing: the config says all of it."""

    def mend(self, workdir: str | os.PathLike[str]) -> list[str]:
        """Nothing."""
        return []


def check(task: Task, seq_len: int, batch_size: int) -> tuple[Segment, ...]:
    """The segments to train on.

    Raises:
        UserError: sizes that the task does not have, that are longer than ``seq_len``, or less than a batch.
    """
    task.test_segments(seq_len)
    segments = task.train_segments(seq_len)
    longest = max(segment.length for segment in segments)
    if longest > seq_len:
        raise UserError(f"data.seq_len is {seq_len}, but the task's training examples have up to {longest} tokens; raise it")
    endless = {segment.examples == 0 for segment in segments}
    if len(endless) > 1:
        raise UserError("data.tasks: of several sizes to train on, either all are endless (0 examples) or none is")
    fewest = min(segment.examples for segment in segments)
    if 0 < fewest < batch_size:
        raise UserError(
            f"data.tasks: {fewest} training examples are fewer than one batch; lower data.batch_size, now {batch_size}"
        )
    return segments


def _batch(rows: Rows, shape: tuple[int, int], pad_id: int) -> Batch:
    count, length = rows.inputs.shape
    batch = {
        "inputs": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    batch["inputs"][:count, :length] = rows.inputs
    batch["targets"][:count, :length] = np.where(rows.labelled, rows.targets, pad_id)
    batch["weights"][:count, :length] = rows.labelled
    return batch
