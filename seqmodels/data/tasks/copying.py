"""MAD's tasks of giving tokens back: selective copying, compression, memorization (Poli et al. 2024, arXiv:2403.17844)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from seqmodels.data.tasks.task import Rows, Segment, Task, blank
from seqmodels.ranges import AtLeast, Count, CountOrZero, Size


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Copy n tokens that blanks stand between.

    n random tokens with L - 2 n - 1 blanks strewn in front of them (each before a token of equal chance, so that the last
    token comes last), the copy token, and n blanks whose labels are the tokens in their order.
    """

    vocab_size: Annotated[Size, AtLeast(3)] = 16  # the last id is the copy token, the one before it the blank
    copies: Count = 16  # n
    train_examples: CountOrZero = 12_800
    test_examples: Count = 1_280

    name: ClassVar[str] = "selective_copying"
    difficulty_name: ClassVar[str] = "tokens to copy"

    def segment(self, length: int, examples: int) -> Segment:
        shortest = 2 * self.copies + 1
        self.require_length(length >= shortest, length, f"at least {shortest} for copies={self.copies}")
        return Segment(length, self.copies, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        n, copy, void = segment.difficulty, self.vocab_size - 1, self.vocab_size - 2
        tokens = rng.integers(0, void, (rows, n))
        voids_before = rng.multinomial(segment.length - 2 * n - 1, np.full(n, 1.0 / n), size=rows)
        example = blank(rows, segment.length, void)
        np.put_along_axis(example.inputs, np.cumsum(voids_before + 1, axis=1) - 1, tokens, axis=1)
        example.inputs[:, -n - 1] = copy
        example.targets[:, -n:] = tokens
        example.labelled[:, -n:] = True
        return example


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Tell every token from what the model holds at the last one.

    L - 1 random tokens and a closing one. The label of a position is its own token, but a model does not see it there:
    ``model.readout="last"`` gives all positions the last one's vector, and their number.
    """

    vocab_size: Annotated[Size, AtLeast(2)] = 16  # the last id is the closing token
    train_examples: CountOrZero = 12_800
    test_examples: Count = 1_280

    name: ClassVar[str] = "compression"
    readout: ClassVar[str] = "last"

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 2, length, "at least 2")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        example, closing = blank(rows, segment.length), self.vocab_size - 1
        example.inputs[:] = rng.integers(0, closing, example.inputs.shape)
        example.inputs[:, -1] = closing
        example.targets[:] = example.inputs
        example.labelled[:, :-1] = True
        return example


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Memorize a fixed dictionary: the example does not contain the answer.

    Keys (the first half of the ids but the last) and values (the second half) belong together by one permutation, the same
    in all data. Every other token is a random key, those between are the last id; there the label is the key's value.
    """

    vocab_size: Annotated[Size, AtLeast(3)] = 256  # the last id is between keys
    train_examples: CountOrZero = 256
    test_examples: Count = 1_280

    name: ClassVar[str] = "memorization"

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 2 and length % 2 == 0, length, "an even number, at least 2")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        num_keys = (self.vocab_size - 1) // 2
        value_of = num_keys + np.random.default_rng(self.vocab_size).permutation(num_keys)
        keys = rng.integers(0, num_keys, (rows, segment.length // 2))
        example = blank(rows, segment.length)
        example.inputs[:, 0::2], example.inputs[:, 1::2] = keys, self.vocab_size - 1
        example.targets[:, 1::2] = value_of[keys]
        example.labelled[:, 1::2] = True
        return example
