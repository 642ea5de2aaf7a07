"""What a synthetic task is: labelled examples that are drawn instead of read.

An example is a function of the seed, the size it has (its length and difficulty) and its own number: it does not depend on the
batch it is in, nor on how many examples there are. They are drawn a block at a time, since numpy is fast on many rows.
Training examples come from the seed of the run; the test's come from none, so that runs with other seeds are judged by
the same test. The two never share a stream of random numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from seqmodels.errors import UserError
from seqmodels.ranges import Checked, Count, CountOrZero

BLOCK_ROWS: Final = 64
"""Examples drawn together. Another number draws other examples."""

_TEST, _TRAINING = 0, 1  # the first number of every seed


class Rows(NamedTuple):
    """Examples of one length."""

    inputs: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]  # anything where there is no label
    labelled: Bool[np.ndarray, "N T"]


@dataclass(frozen=True)
class Segment:
    """Examples of one size."""

    length: int
    """Tokens of an example; shorter ones are padded to it."""
    difficulty: int
    """What else makes it hard, in the task's own unit (pairs, tokens to copy); 0 where nothing does."""
    examples: int
    """How many there are; 0: as many as are asked for."""


@dataclass(frozen=True, kw_only=True)
class Task(Checked):
    """A kind of example, and how many of which sizes there are to train on and to be tested with.

    The fields are the options in ``config.data.tasks.<name>``. A subclass has a ``name``, a ``vocab_size`` (a field or a
    property) and ``draw``.
    """

    train_examples: CountOrZero = 0  # seen again in the same order when all have been; 0: never the same twice
    test_examples: Count = 1024  # of each size
    test_lengths: tuple[Count, ...] = ()  # tokens; (): the training length

    name: ClassVar[str]
    pad_id: ClassVar[int] = 0
    """The id on positions behind an example's end."""
    difficulty_name: ClassVar[str] = ""
    """What a segment's difficulty counts."""
    readout: ClassVar[str] = "each"
    """The ``model.readout`` that its labels are for."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.where = f"data.tasks.{cls.name}"

    @classmethod
    def require(cls, holds: bool, otherwise: str) -> None:
        """Raises UserError unless it holds; ``otherwise`` begins with the field's name."""
        if not holds:
            raise UserError(f"{cls.where}.{otherwise}")

    @classmethod
    def require_length(cls, holds: bool, length: int, needs: str) -> None:
        """Raises UserError, of an example's length, unless it holds; ``needs`` says what would."""
        if not holds:
            raise UserError(f"data.task={cls.name} has no examples of {length} tokens: it needs {needs}")

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        """So many examples of a segment's size. Some tasks label more of a training example than of a test's."""
        raise NotImplementedError

    def segment(self, length: int, examples: int) -> Segment:
        """Examples of a length.

        Raises:
            UserError: the task has none of this length.
        """
        return Segment(length, 0, examples)

    def train_segments(self, seq_len: int) -> tuple[Segment, ...]:
        """What to train on; ``seq_len`` is ``data.seq_len``."""
        return (self.segment(seq_len, self.train_examples),)

    def test_segments(self, seq_len: int) -> tuple[Segment, ...]:
        """What to be tested with."""
        return tuple(self.segment(length, self.test_examples) for length in self.test_lengths or (seq_len,))

    def label(self, segment: Segment) -> str:
        """A segment's name in results."""
        return f"length {segment.length}" + (f", {segment.difficulty} {self.difficulty_name}" if segment.difficulty else "")

    def rows(self, segment: Segment, first: int, count: int, *, training: bool, seed: int) -> Rows:
        """The examples first, first + 1, ... of a segment; ``seed`` decides the training examples."""
        blocks = range(first // BLOCK_ROWS, -(-(first + count) // BLOCK_ROWS))
        drawn = [self._block(segment, block, training=training, seed=seed) for block in blocks]
        skip = first - BLOCK_ROWS * blocks.start
        return Rows(*(np.concatenate(arrays)[skip : skip + count] for arrays in zip(*drawn, strict=True)))

    def _block(self, segment: Segment, block: int, *, training: bool, seed: int) -> Rows:
        part = (_TRAINING, seed) if training else (_TEST, 0)
        rng = np.random.default_rng((*part, segment.length, segment.difficulty, block))
        return self.draw(rng, BLOCK_ROWS, segment, training=training)


def blank(rows: int, length: int, pad_id: int = 0) -> Rows:
    """Examples with nothing in them yet."""
    shape = rows, length
    return Rows(np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.bool_))


def distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> Int[np.ndarray, "rows count"]:
    """In each row ``count`` different numbers of 0..below - 1, every choice and order as likely (Floyd's algorithm)."""
    chosen = np.empty((rows, count), np.int64)
    for place, largest in enumerate(range(below - count, below)):
        drawn = rng.integers(0, largest, rows, endpoint=True)
        taken = (chosen[:, :place] == drawn[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, largest, drawn)
    return rng.permuted(chosen, axis=1)
