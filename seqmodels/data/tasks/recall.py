"""Tasks of looking something up in what was read: multi-query associative recall, induction, and MAD's three."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from seqmodels.data.tasks.task import Rows, Segment, Task, blank, distinct
from seqmodels.ranges import Above, AtLeast, AtMost, Count, CountOrZero, Fraction, Size


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927, as HazyResearch/zoology draws it).

    An example of length L begins with K pairs, k_1 v_1 .. k_K v_K: distinct keys of 1..V/2-1, distinct values of
    V/2..V-1. The rest is S = (L - 2 K) / 2 slots of two tokens. K different slots are drawn one after the other, slot
    i = 1..S with weight i^(a-1), and the j-th one drawn has the key k_j as its first token, with the label v_j. All other
    tokens are 0, or, with ``random_non_queries``, any token.

    Setting A of the paper (figure 2): one size, ``pairs`` and data.seq_len. Setting B (Arora et al. 2024, arXiv:2402.18668,
    figure 2): several, ``train_mix`` and ``test_mix``; a batch is of one size, the sizes come in their order.
    """

    vocab_size: Size = 8192  # V
    pairs: Count = 4  # K, with train_mix and test_mix empty
    power: Annotated[float, Above(0), AtMost(10)] = 0.01  # a: the smaller, the sooner most questions come; 1: anywhere
    random_non_queries: bool = True  # random tokens between the questions, keys and values among them; False: zeros
    train_mix: tuple[tuple[Count, Count, CountOrZero], ...] = ()  # sizes (L, K, examples) to train on; (): data.seq_len and pairs
    test_mix: tuple[tuple[Count, Count, Count], ...] = ()  # the same to be tested with

    name: ClassVar[str] = "mqar"
    difficulty_name: ClassVar[str] = "pairs"

    def segment(self, length: int, examples: int, pairs: int | None = None) -> Segment:
        pairs = self.pairs if pairs is None else pairs
        fits = length % 2 == 0 and length >= 4 * pairs
        self.require_length(fits, length, f"an even number, at least {4 * pairs}, for {pairs} pairs and as many questions")
        self.require(length < self.vocab_size, f"vocab_size={self.vocab_size} must be above the length, {length}")
        return Segment(length, pairs, examples)

    def train_segments(self, seq_len: int) -> tuple[Segment, ...]:
        return self._mix(self.train_mix) or super().train_segments(seq_len)

    def test_segments(self, seq_len: int) -> tuple[Segment, ...]:
        return self._mix(self.test_mix) or super().test_segments(seq_len)

    def _mix(self, sizes: tuple[tuple[int, int, int], ...]) -> tuple[Segment, ...]:
        return tuple(self.segment(length, examples, pairs) for length, pairs, examples in sizes)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        V, L, K = self.vocab_size, segment.length, segment.difficulty
        keys = 1 + distinct(rng, rows, K, V // 2 - 1)
        values = V // 2 + distinct(rng, rows, K, V - V // 2)
        example = blank(rows, L)
        example.inputs[:, 0 : 2 * K : 2] = keys
        example.inputs[:, 1 : 2 * K : 2] = values

        # Exponential clocks (Gumbel's trick): their order is that of draws without replacement at these rates.
        weights = np.arange(1, (L - 2 * K) // 2 + 1) ** (self.power - 1.0)
        slots = np.argsort(rng.standard_exponential((rows, len(weights))) / weights, axis=1)[:, :K]
        questions = 2 * K + 2 * slots
        np.put_along_axis(example.inputs, questions, keys, axis=1)
        np.put_along_axis(example.targets, questions, values, axis=1)
        np.put_along_axis(example.labelled, questions, True, axis=1)
        if self.random_non_queries:
            noise = rng.integers(0, V, example.inputs.shape)
            np.copyto(example.inputs, noise, where=example.inputs == 0, casting="same_kind")
        return example


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Induction heads (Gu and Dao 2023, arXiv:2312.00752, section 4.1.2).

    Random tokens, among them once, anywhere, a special one; it comes again as the last token, and is to be followed by what
    followed it before. The last position alone has a label. The paper trains at 256 tokens.
    """

    vocab_size: Annotated[Size, AtLeast(3)] = 16  # the last id is the special token
    test_lengths: tuple[Count, ...] = (64, 128, 256, 512, 1024, 2048, 4096)

    name: ClassVar[str] = "induction"

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 3, length, "at least 3")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        example, special = blank(rows, segment.length), self.vocab_size - 1
        example.inputs[:] = rng.integers(0, special, example.inputs.shape)
        every, place = np.arange(rows), rng.integers(0, segment.length - 2, rows)
        example.inputs[every, place] = example.inputs[:, -1] = special
        example.targets[:, -1] = example.inputs[every, place + 1]
        example.labelled[:, -1] = True
        return example


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
    """In-context recall of MAD (Poli et al. 2024, arXiv:2403.17844; multi-query, as athms/mad-lab draws it).

    L / 2 pairs of a key (the first half of the ids) and a value (the second half), keys drawn with replacement; a key has
    the same value each time, values may repeat. The last pair, the probe, has a key that has come before. In training every
    token is to be followed by the next one; a test's labels are the values of keys that have come before, the probe's among
    them. With noise, each pair but the probe is replaced with probability ``noise_fraction`` by two random noise ids, one
    pair at least is not.
    """

    vocab_size: Size = 16  # ids of keys, values and what the task has besides
    noise_ids: CountOrZero = 0  # the last so many ids, neither keys nor values
    noise_fraction: Fraction = 0.0  # of the pairs
    train_examples: CountOrZero = 12_800
    test_examples: Count = 1_280

    name: ClassVar[str] = "in_context_recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.noise_ids <= self.vocab_size - 2
        self.require(fits, f"noise_ids={self.noise_ids} must leave a key and a value of vocab_size={self.vocab_size}")
        has_ids = self.noise_ids > 0 or self.noise_fraction == 0
        self.require(has_ids, f"noise_fraction={self.noise_fraction} needs noise_ids of at least 1")

    def segment(self, length: int, examples: int) -> Segment:
        self.require_length(length >= 4 and length % 2 == 0, length, "an even number, at least 4")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        informative = self.vocab_size - self.noise_ids
        num_keys, pairs = informative // 2, segment.length // 2
        value_of = num_keys + rng.integers(0, informative - num_keys, (rows, num_keys))
        keys = rng.integers(0, num_keys, (rows, pairs))
        noisy = rng.random((rows, pairs)) < self.noise_fraction
        every = np.arange(rows)
        noisy[every, rng.integers(0, pairs - 1, rows)] = False
        noisy[:, -1] = False

        # The probe: one of the keys that have come, each as likely.
        is_key = (keys[:, :, None] == np.arange(num_keys)) & ~noisy[:, :, None]
        has_come = is_key[:, :-1].any(axis=1)
        keys[:, -1] = np.where(has_come, rng.random(has_come.shape), -1.0).argmax(axis=1)
        is_key[:, -1] = keys[:, -1, None] == np.arange(num_keys)

        example = blank(rows, segment.length)
        example.inputs[:, 0::2], example.inputs[:, 1::2] = keys, np.take_along_axis(value_of, keys, axis=1)
        noise = informative + rng.integers(0, max(1, self.noise_ids), example.inputs.shape)
        np.copyto(example.inputs, noise, where=np.repeat(noisy, 2, axis=1), casting="same_kind")
        example.targets[:, :-1] = example.inputs[:, 1:]
        if training:
            example.labelled[:, :-1] = True
        else:
            example.labelled[:, 0::2] = (is_key & (np.cumsum(is_key, axis=1) > 1)).any(axis=2)
        return example


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """Noisy in-context recall of MAD: the same with noise between the pairs."""

    vocab_size: Size = 32
    noise_ids: CountOrZero = 16
    noise_fraction: Fraction = 0.2

    name: ClassVar[str] = "noisy_recall"


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
    """Fuzzy in-context recall of MAD: keys and values are motifs of several tokens.

    The last id is padding, of the others the first half are keys', the second half values' tokens. A motif is up to
    ``longest_motif`` different ids in some order; its length is random, but a test's keys all have the longest. A key motif
    has the same value motif each time. Pairs follow one another while there is room; the last one repeats an earlier pair.
    Padding stands in front. In training every token is to be followed by the next one; a test's labels are the values'
    tokens of keys that have come before.
    """

    vocab_size: Size = 16  # the last id is padding
    longest_motif: Count = 3  # tokens of a key or a value at most
    train_examples: CountOrZero = 12_800
    test_examples: Count = 1_280

    name: ClassVar[str] = "fuzzy_recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.longest_motif <= (self.vocab_size - 1) // 2
        self.require(
            fits, f"longest_motif={self.longest_motif} must lie in 1..{(self.vocab_size - 1) // 2}, the ids there are for keys"
        )

    @property
    def padding(self) -> int:
        """The id in front of an example."""
        return self.vocab_size - 1

    def segment(self, length: int, examples: int) -> Segment:
        shortest = 4 * self.longest_motif
        self.require_length(length >= shortest, length, f"at least {shortest} for longest_motif={self.longest_motif}")
        return Segment(length, 0, examples)

    def draw(self, rng: np.random.Generator, rows: int, segment: Segment, *, training: bool) -> Rows:
        length, num_keys = segment.length, self.padding // 2
        num_values, most = self.padding - num_keys, length // 2  # a pair has two tokens or more
        keys = _motifs(rng, rows, most, num_keys, self.longest_motif, random_length=training)
        values = _motifs(rng, rows, most, num_values, self.longest_motif, random_length=True)
        probes = rng.random(rows)

        example = blank(rows, length, self.padding)
        for row in range(rows):
            value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
            tokens: list[int] = []
            labels: list[bool] = []
            for key, value in zip(keys[row], values[row], strict=True):
                if len(tokens) + 4 * self.longest_motif > length:  # this pair and the probe might not fit
                    break
                _append_pair(tokens, labels, key, value_of.get(key) or tuple(num_keys + v for v in value), value_of)
            probe = list(value_of)[int(probes[row] * len(value_of))]
            _append_pair(tokens, labels, probe, value_of[probe], value_of)
            example.inputs[row, length - len(tokens) :] = tokens
            # A label stands where the token before it is read.
            example.labelled[row, length - len(tokens) : length - 1] = True if training else labels[1:]
        example.targets[:, :-1] = example.inputs[:, 1:]
        return example


def _motifs(rng, rows: int, count: int, ids: int, longest: int, *, random_length: bool) -> list[list[tuple[int, ...]]]:
    """[rows][count] motifs: different ones of ``ids``, in an order of equal chance."""
    order = distinct(rng, rows * count, longest, ids)
    lengths = rng.integers(1, longest, rows * count, endpoint=True) if random_length else [longest] * (rows * count)
    motifs = [tuple(motif[:length]) for motif, length in zip(order.tolist(), lengths, strict=True)]
    return [motifs[row * count : (row + 1) * count] for row in range(rows)]


def _append_pair(tokens: list[int], labels: list[bool], key, value, value_of: dict) -> None:
    """A pair's tokens, and which of them a test asks for: the value's, of a key that has come before."""
    tokens += [*key, *value]
    labels += [*[False] * len(key), *[key in value_of] * len(value)]
    value_of[key] = value
