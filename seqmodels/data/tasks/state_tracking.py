"""Tasks of keeping track of a state that every token changes: parity, words of groups, arithmetic, ListOps."""

import functools
import itertools
import random
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import numpy as np
from jaxtyping import Bool, Int

from seqmodels.data.tasks.task import Rows, Segment, Task, blank
from seqmodels.errors import UserError
from seqmodels.ranges import Above, AtLeast, AtMost, Below, Count, CountOrZero, OneOf, Size

GROUPS: Final = ("A5", "A4xZ5", "Z60", "S5")


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Whether an even or an odd number of twos was read (Beck et al. 2024, arXiv:2405.04517, as NX-AI/xlstm has it).

    Ones and twos, each as likely, and a final 0 whose label is 1 for an even and 2 for an odd number of twos. In training the
    length, the 0 counted, is any of ``shortest`` to data.seq_len; a test is of one length (over there of 40 to 256). With
    ``every``, zoology's cumulative parity: there is no 0, and every token has the label of the twos so far.
    """

    shortest: Annotated[Count, AtLeast(2)] = 3  # tokens of a training example at least
    every: bool = False  # a label on every token, instead of the last
    test_examples: Count = 2_048
    test_lengths: tuple[Count, ...] = (40, 64, 96, 128, 192, 256)

    name: ClassVar[str] = "parity"
    vocab_size: ClassVar[int] = 3

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= self.shortest, length, f"at least {self.shortest}, data.tasks.parity.shortest")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        example = blank(rows, segment.length)
        lengths = _lengths(rng, rows, self.shortest, segment.length, training)
        bits = rng.integers(0, 2, example.inputs.shape)
        parities = np.cumsum(bits, axis=1) % 2
        read = np.arange(segment.length) < lengths[:, None] - (0 if self.every else 1)
        example.inputs[:] = np.where(read, 1 + bits, 0)
        if self.every:
            example.targets[:], example.labelled[:] = 1 + parities, read
        else:
            every, last = np.arange(rows), lengths - 1
            example.targets[every, last] = 1 + parities[every, last - 1]
            example.labelled[every, last] = True
        return example


@dataclass(frozen=True, kw_only=True)
class GroupWord(Task):
    """The product of a group's elements so far (Merrill et al. 2024, arXiv:2404.08819, as jopetty/word-problem draws it).

    Elements are tokens, identity first; a token of its own begins the word. Each element has as its label the product of the
    word up to it, left to right. Of all words a fifth, by a hash, is the test's and the rest is trained on. In training there
    are words of two elements too, as many as the union of all those and a million words of full length would have.
    """

    group: Annotated[str, OneOf(GROUPS)] = "A5"  # A5 (not solvable), A4xZ5, Z60 (abelian), of 60 elements each, or S5, of 120
    test_examples: Count = 1_024

    name: ClassVar[str] = "group_word"

    @property
    def vocab_size(self) -> int:
        """The elements and what begins a word."""
        return len(product_table(self.group)) + 1

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 3, length, "at least 3: two elements and the token that begins a word")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        table, longest = product_table(self.group), segment.length - 1
        order = len(table)
        lengths = np.full(rows, longest)
        if training:
            pairs, words = order**2, min(order**longest, 1_000_000)
            lengths[rng.random(rows) < pairs / (pairs + words)] = 2
        read = np.arange(longest) < lengths[:, None]
        elements = np.where(read, rng.integers(0, order, read.shape), 0)
        while (wrong := _is_test(elements, lengths) == training).any():
            again = rng.integers(0, order, (int(wrong.sum()), longest))
            elements[wrong] = np.where(read[wrong], again, 0)

        example = blank(rows, segment.length)
        example.inputs[:, 0], example.inputs[:, 1:] = order, elements
        product = np.zeros(rows, np.int64)
        for place in range(longest):
            product = table[product, elements[:, place]]
            example.targets[:, 1 + place] = product
        example.labelled[:, 1:] = read
        return example


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Task):
    """A sum of products modulo m, without brackets (Beck et al. 2024, arXiv:2405.04517, as NX-AI/xlstm has it).

    Numbers 0..m-1 (ids 1..m) with one of + - * (ids m+1, m+2, m+3) between any two, and = (the last id), whose label is the
    value; * binds tighter. In training there are any of two numbers to as many as data.seq_len takes.
    """

    modulus: Annotated[Size, AtLeast(2)] = 5  # m
    test_examples: Count = 2_048
    test_lengths: tuple[Count, ...] = (40, 64, 96, 128, 192, 256)

    name: ClassVar[str] = "modular_arithmetic"

    @property
    def vocab_size(self) -> int:
        """Padding, numbers, three signs and =."""
        return self.modulus + 5

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 4 and length % 2 == 0, length, "an even number (a sign follows each), at least 4")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        m, most = self.modulus, segment.length // 2
        counts = _lengths(rng, rows, 2, most, training)
        numbers, signs = rng.integers(0, m, (rows, most)), rng.integers(0, 3, (rows, most))
        value, product, sign = np.zeros(rows, np.int64), numbers[:, 0], np.ones(rows, np.int64)
        for place in range(1, most):
            used = place < counts
            times = signs[:, place - 1] == 2
            value = np.where(used & ~times, (value + sign * product) % m, value)
            sign = np.where(used & ~times, 1 - 2 * signs[:, place - 1], sign)
            product = np.where(used, np.where(times, product * numbers[:, place] % m, numbers[:, place]), product)
        value = (value + sign * product) % m

        example = blank(rows, segment.length)
        read = np.arange(most) < counts[:, None]
        example.inputs[:, 0::2] = np.where(read, 1 + numbers, 0)
        example.inputs[:, 1::2] = np.where(read, 1 + m + signs, 0)
        every, last = np.arange(rows), 2 * counts - 1
        example.inputs[every, last] = m + 4
        example.targets[every, last] = 1 + value
        example.labelled[every, last] = True
        return example


@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """Nested operations on lists of digits (Nangia and Bowman 2018; the Long Range Arena's, Tay et al. 2020, arXiv:2011.04006).

    A node is a digit with probability ``leaf_probability``, and always at depth ``max_depth`` (the root's is 1); or else MIN,
    MAX, MED (the median, rounded towards 0) or SM (the sum modulo 10) of 2..``max_arguments`` nodes. As tokens: digits are
    0..9, an operation opens with 10..13 in that order and closes with 14; 15 is padding. Kept are expressions of more than
    ``longer_than`` tokens and fewer than the length that is asked for. The last token's label is the value.

    The defaults are a small variant; the Arena has max_depth 10, max_arguments 10, longer_than 500 and a length of 2,000.
    """

    longer_than: CountOrZero = 50  # tokens, not included
    max_depth: Annotated[int, AtLeast(2), AtMost(500)] = 6  # of a tree; its root's is 1
    max_arguments: Annotated[Size, AtLeast(2)] = 5  # of an operator, which has at least 2
    leaf_probability: Annotated[float, Above(0), Below(1)] = 0.75  # that a node above max_depth is a digit

    name: ClassVar[str] = "listops"
    vocab_size: ClassVar[int] = 16
    pad_id: ClassVar[int] = 15

    def segment(self, length: int, examples: int) -> Segment:
        shortest = self.longer_than + 2
        self.require_length(length >= shortest, length, f"at least {shortest} for longer_than={self.longer_than}")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        choose = random.Random(int(rng.integers(2**63)))
        example = blank(rows, segment.length, self.pad_id)
        for row in range(rows):
            tokens, value = self._expression(choose, segment.length)
            last = len(tokens) - 1
            example.inputs[row, : last + 1] = tokens
            example.targets[row, last], example.labelled[row, last] = value, True
        return example

    def _expression(self, choose: random.Random, below: int) -> tuple[list[int], int]:
        for _ in range(_MOST_TRIES):
            tokens: list[int] = []
            # A root that is a digit is too short anyway.
            value = self._operation(choose, 1, tokens, below)
            if value is not None and len(tokens) > self.longer_than:
                return tokens, value
        raise UserError(
            f"data.tasks.listops: of {_MOST_TRIES:,} expressions none had between {self.longer_than} and {below} tokens; raise "
            "max_depth or max_arguments, or lower longer_than"
        )

    def _operation(self, choose: random.Random, depth: int, tokens: list[int], below: int) -> int | None:
        """Appends an operation at a depth; its value, or None once there are too many tokens."""
        operation = choose.randrange(4)
        tokens.append(10 + operation)
        arguments = []
        for _ in range(choose.randint(2, self.max_arguments)):
            if depth + 1 >= self.max_depth or choose.random() < self.leaf_probability:
                argument = choose.randrange(10)
                tokens.append(argument)
            else:
                argument = self._operation(choose, depth + 1, tokens, below)
            if argument is None or len(tokens) >= below:
                return None
            arguments.append(argument)
        tokens.append(14)
        return None if len(tokens) >= below else _APPLY[operation](arguments)


_MOST_TRIES: Final = 100_000


def _median(numbers: list[int]) -> int:
    ordered, middle = sorted(numbers), len(numbers) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


_APPLY: Final = (min, max, _median, lambda numbers: sum(numbers) % 10)


def _lengths(rng: np.random.Generator, rows: int, shortest: int, longest: int, training: bool) -> Int[np.ndarray, " rows"]:
    """In training any of ``shortest`` to ``longest``, each as likely; in a test the longest."""
    return rng.integers(shortest, longest, rows, endpoint=True) if training else np.full(rows, longest)


def _is_test(elements: Int[np.ndarray, "rows k"], lengths: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    """A fifth of all words, whichever they are next to."""
    digest = lengths.astype(np.uint64)
    for place, column in enumerate(elements.astype(np.uint64).T):
        mixed = (digest ^ column) * np.uint64(0x9E3779B97F4A7C15)
        digest = np.where(place < lengths, mixed ^ (mixed >> np.uint64(29)), digest)
    return digest % np.uint64(5) == 0


Permutation = tuple[int, ...]


def _permutations(n: int, *, even: bool) -> list[Permutation]:
    """Of 0..n-1 in the order of the alphabet, the identity first; all of them or the even ones."""
    chosen = list(itertools.permutations(range(n)))
    return [p for p in chosen if not even or sum(p[i] > p[j] for i in range(n) for j in range(i + 1, n)) % 2 == 0]


def _table_of_permutations(elements: list[Permutation]) -> Int[np.ndarray, "n n"]:
    """a b: first a, then b."""
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _cyclic(n: int) -> Int[np.ndarray, "n n"]:
    return np.add.outer(np.arange(n), np.arange(n)) % n


def _direct(a: Int[np.ndarray, "n n"], b: Int[np.ndarray, "m m"]) -> Int[np.ndarray, "nm nm"]:
    """The direct product: element (i, j) has number i m + j."""
    m = len(b)
    return np.kron(a, np.full((m, m), m)) + np.tile(b, a.shape)


_GROUPS: Final = {
    "A5": lambda: _table_of_permutations(_permutations(5, even=True)),
    "A4xZ5": lambda: _direct(_table_of_permutations(_permutations(4, even=True)), _cyclic(5)),
    "Z60": lambda: _cyclic(60),
    "S5": lambda: _table_of_permutations(_permutations(5, even=False)),
}


@functools.cache
def product_table(group: str) -> Int[np.ndarray, "n n"]:
    """[a, b] -> a b, by the numbers of the elements; 0 is the identity."""
    return _GROUPS[group]()
