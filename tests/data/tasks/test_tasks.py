"""Every label of a synthetic task follows from the tokens, by a reader that knows the definition and not the generator."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from seqmodels.data import tasks
from seqmodels.data.tasks.copying import Compression, Memorization, SelectiveCopying
from seqmodels.data.tasks.recall import MQAR, FuzzyRecall, InContextRecall, Induction, NoisyRecall
from seqmodels.data.tasks.state_tracking import GroupWord, ListOps, ModularArithmetic, Parity, product_table
from seqmodels.data.tasks.task import distinct
from seqmodels.errors import UserError


def examples(task, length, count=192, *, training=True, seed=0):
    return task.rows(task.segment(length, 0), 0, count, training=training, seed=seed)


def labels_of(task, length, *, training=True):
    """(tokens, {position: label}) of examples."""
    inputs, targets, labelled = examples(task, length, training=training)
    assert inputs.shape == targets.shape == labelled.shape == (192, length)
    assert 0 <= inputs.min() and inputs.max() < task.vocab_size and targets.max() < task.vocab_size
    for row in range(len(inputs)):
        where = np.flatnonzero(labelled[row]).tolist()
        yield inputs[row].tolist(), {position: int(targets[row, position]) for position in where}


# -- recall -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("V, L, K", [(64, 32, 4), (64, 16, 4), (8192, 128, 8)])
def test_mqar(V, L, K, noise):
    for tokens, labels in labels_of(MQAR(vocab_size=V, pairs=K, random_non_queries=noise), L):
        keys, values = tokens[0 : 2 * K : 2], tokens[1 : 2 * K : 2]
        assert len(set(keys)) == len(set(values)) == K
        assert all(1 <= key < V // 2 for key in keys) and all(V // 2 <= value < V for value in values)
        assert Counter(tokens[position] for position in labels) == Counter(keys), "each key is asked once"
        assert all(position >= 2 * K and position % 2 == 0 for position in labels)
        assert all(label == dict(zip(keys, values))[tokens[position]] for position, label in labels.items())
        others = [token for position, token in enumerate(tokens) if position >= 2 * K and position not in labels]
        assert any(others) == noise


@pytest.mark.parametrize("power", [0.01, 1.0, 0.5])
def test_mqar_asks_soon_after_the_pairs(power):
    """The slots of the first two keys, against the law of two draws without replacement."""
    task, N = MQAR(vocab_size=64, pairs=2, power=power), 8192
    inputs, _, labelled = examples(task, 16, N)
    slots = np.array(
        [[(np.flatnonzero(marks & (row == key))[0] - 4) // 2 for key in row[[0, 2]]] for row, marks in zip(inputs, labelled)]
    )
    weights = np.arange(1, 7) ** (power - 1)
    expected = {
        (i, j): weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
        for i, j in itertools.permutations(range(6), 2)
    }
    found = Counter(map(tuple, slots.tolist()))
    for pair, p in expected.items():
        assert abs(found[pair] - N * p) < 4.5 * math.sqrt(N * p * (1 - p)), pair


def test_induction():
    for tokens, labels in labels_of(Induction(), 24):
        assert tokens.count(15) == 2 and tokens[-1] == 15
        assert labels == {23: tokens[tokens.index(15) + 1]} and labels[23] != 15
    places = Counter(tokens.index(15) for tokens, _ in labels_of(Induction(), 8))
    assert set(places) == set(range(6))


@pytest.mark.parametrize("task", [InContextRecall(), NoisyRecall(), NoisyRecall(vocab_size=24, noise_fraction=0.8)])
@pytest.mark.parametrize("training", [True, False])
def test_in_context_recall(task, training):
    informative = task.vocab_size - task.noise_ids
    noise_pairs = 0
    for tokens, labels in labels_of(task, 32, training=training):
        value_of, expected = {}, {}
        for place in range(0, 32, 2):
            key, value = tokens[place : place + 2]
            assert (key >= informative) == (value >= informative)
            if key >= informative:
                noise_pairs += 1
                continue
            assert key < informative // 2 <= value
            if key in value_of:
                expected[place] = value_of[key]
            assert value_of.setdefault(key, value) == value
        assert 30 in expected, "the probe has come before"
        assert labels == ({place: tokens[place + 1] for place in range(31)} if training else expected)
    share = noise_pairs / (192 * 15)
    assert share == pytest.approx(task.noise_fraction * 14 / 15, abs=0.03)  # one pair never is noise


@pytest.mark.parametrize("training", [True, False])
def test_fuzzy_recall(training):
    task, lengths, starts = FuzzyRecall(), Counter(), Counter()
    for tokens, labels in labels_of(task, 32, training=training):
        start = next(place for place, token in enumerate(tokens) if token != 15)
        starts[start] += 1
        assert 15 not in tokens[start:]
        runs = [list(run) for _, run in itertools.groupby(tokens[start:], key=lambda token: token < 7)]
        assert len(runs) % 2 == 0 and all(len(run) == len(set(run)) <= 3 for run in runs)
        value_of, expected, place = {}, {}, start
        for key, value in zip(map(tuple, runs[0::2]), map(tuple, runs[1::2])):
            assert max(key) < 7 <= min(value)
            lengths[len(key)] += 1
            place += len(key)
            if key in value_of:
                expected |= {place - 1 + index: token for index, token in enumerate(value)}
            assert value_of.setdefault(key, value) == value
            place += len(value)
        assert place == 32 and 30 in expected, "it ends with a probe"
        assert labels == ({at: tokens[at + 1] for at in range(start, 31)} if training else expected)
    assert set(lengths) == ({1, 2, 3} if training else {3})
    assert max(starts) < 12


# -- copying ----------------------------------------------------------------------------------------------------------


def test_selective_copying():
    firsts = []
    for tokens, labels in labels_of(SelectiveCopying(copies=4), 32):
        before, after = tokens[:27], tokens[28:]
        data = [token for token in before if token != 14]
        assert tokens[27] == 15 and after == [14] * 4 and len(data) == 4 and max(data) < 14 and before[-1] != 14
        assert labels == dict(zip(range(28, 32), data))
        firsts.append(next(place for place, token in enumerate(before) if token != 14))
    # 23 blanks, each in front of one of 4 tokens: in front of the first binomial(23, 1/4).
    assert np.mean(firsts) == pytest.approx(23 / 4, abs=4 * math.sqrt(23 * 3 / 16 / 192))
    assert np.std(firsts) == pytest.approx(math.sqrt(23 * 3 / 16), rel=0.25)


def test_compression():
    for tokens, labels in labels_of(Compression(), 16):
        assert tokens[-1] == 15 and max(tokens[:-1]) < 15
        assert labels == dict(enumerate(tokens[:-1]))


def test_memorization():
    """One bijection between halves, in training and test alike."""
    value_of = {}
    for training in (True, False):
        for tokens, labels in labels_of(Memorization(vocab_size=33), 16, training=training):
            assert tokens[1::2] == [32] * 8 and list(labels) == list(range(1, 16, 2))
            for place, value in labels.items():
                assert value_of.setdefault(tokens[place - 1], value) == value
    assert sorted(value_of) == list(range(16)) and sorted(value_of.values()) == list(range(16, 32))
    assert value_of != {key: key + 16 for key in range(16)}


# -- state tracking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_parity(training):
    lengths = Counter()
    for tokens, labels in labels_of(Parity(), 12, training=training):
        length = tokens.index(0) + 1
        lengths[length] += 1
        assert not any(tokens[length - 1 :]) and labels == {length - 1: 1 + tokens.count(2) % 2}
    assert set(lengths) == (set(range(3, 13)) if training else {12})
    for tokens, labels in labels_of(Parity(every=True), 12, training=training):
        assert labels == {place: 1 + tokens[: place + 1].count(2) % 2 for place in range(12) if tokens[place]}


@pytest.mark.parametrize("group", ["S5", "A5"])
@pytest.mark.parametrize("training", [True, False])
def test_words_of_permutations(group, training):
    """Follow the points: after each permutation, where is it that each of them has got to?"""
    elements = [
        p for p in itertools.permutations(range(5)) if group == "S5" or np.linalg.det(np.eye(5)[list(p)]) > 0
    ]  # fmt: skip
    for tokens, labels in labels_of(GroupWord(group=group), 9, training=training):
        assert tokens[0] == len(elements)
        points = list(range(5))
        for place in labels:
            points = [elements[tokens[place]][point] for point in points]
            assert elements[labels[place]] == tuple(points)
        assert list(labels) in ([*range(1, 9)], [1, 2])


def test_words_of_z60_are_sums():
    for tokens, labels in labels_of(GroupWord(group="Z60"), 9):
        assert labels == {place: sum(tokens[1 : place + 1]) % 60 for place in labels}


@pytest.mark.parametrize("group, order, commutators", [("A5", 60, 60), ("A4xZ5", 60, 4), ("Z60", 60, 1), ("S5", 120, 60)])
def test_groups_are_groups(group, order, commutators):
    """A5 is its own commutator subgroup, so not solvable; of the others of its order one is solvable, one abelian."""
    table, every = product_table(group), np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == every).all() and (table[:, 0] == every).all(), "0 is the identity"
    assert all((np.sort(line) == every).all() for line in [*table, *table.T]), "every equation has one solution"
    assert (table[table[:, :, None], every] == table[every[:, None, None], table[None]]).all(), "associative"
    inverse = table.argmin(axis=1)
    generated = set(np.unique(table[table[inverse[:, None], inverse], table]).tolist())
    while (more := set(table[np.ix_(list(generated), list(generated))].ravel().tolist())) != generated:
        generated = more
    assert len(generated) == commutators


def test_the_words_of_a_test_are_never_trained_on():
    """Of two elements there are only 3,600 words, so that almost all turn up."""
    task = GroupWord(group="A5")

    def pairs(length, training):
        inputs, _, labelled = examples(task, length, 20_000, training=training)
        return {tuple(row[1:3]) for row, marks in zip(inputs.tolist(), labelled) if marks.sum() == 2}

    tested, trained = pairs(3, False), pairs(3, True)
    assert not tested & trained and len(tested | trained) > 3_580
    assert len(tested) == pytest.approx(720, abs=4 * math.sqrt(3600 * 0.2 * 0.8))
    among_longer = pairs(13, True)
    assert 20 < len(among_longer) < 150 and not among_longer & tested  # 3,600 of 1,003,600, drawn 20,000 times


@pytest.mark.parametrize("training", [True, False])
def test_modular_arithmetic(training):
    lengths = Counter()
    for tokens, labels in labels_of(ModularArithmetic(), 16, training=training):
        length = tokens.index(9) + 1
        lengths[length] += 1
        written = "".join({6: "+", 7: "-", 8: "*", 9: ""}.get(token) or str(token - 1) for token in tokens[: length - 1])
        assert not any(tokens[length:]) and labels == {length - 1: 1 + eval(written) % 5}
    assert set(lengths) == (set(range(4, 17, 2)) if training else {16})


def test_listops():
    """Read with a stack; the median by fractions."""
    task = ListOps(longer_than=12, max_depth=4, max_arguments=4)
    operations, deepest = Counter(), 0
    for tokens, labels in labels_of(task, 40):
        length = next((place for place, token in enumerate(tokens) if token == 15), 40)
        assert 12 < length < 40 and set(tokens[length:]) <= {15}
        stack = [[]]
        for token in tokens[:length]:
            if 10 <= token < 14:
                stack.append([token])
                deepest = max(deepest, len(stack))
            elif token == 14:
                operation, *arguments = stack.pop()
                assert 2 <= len(arguments) <= 4
                operations[operation] += 1
                ranked = sorted(arguments)
                median = Fraction(ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2], 2)
                stack[-1].append([ranked[0], ranked[-1], math.trunc(median), sum(arguments) % 10][operation - 10])
            else:
                stack[-1].append(token)
        assert len(stack) == 1 and labels == {length - 1: stack[0][0]} and len(stack[0]) == 1
    assert deepest == 4 and set(operations) == {10, 11, 12, 13}  # the outermost list is at 1, digits at most at 4


def test_listops_that_are_too_rare():
    with pytest.raises(UserError, match="none had between 900 and 1000 tokens; raise max_depth"):
        examples(ListOps(longer_than=900, max_depth=2), 1000, 1)


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tasks.TASKS)
def test_an_example_depends_on_the_seed_and_its_number_alone(name):
    task = ListOps(longer_than=8) if name == "listops" else tasks.TASKS[name]()
    segment = task.segment(40, 0)

    def rows(first, count, training=True, seed=1):
        return np.concatenate(task.rows(segment, first, count, training=training, seed=seed), axis=1)

    whole = rows(0, 150)
    for first, count in ((0, 1), (63, 2), (64, 64), (130, 20)):
        np.testing.assert_array_equal(rows(first, count), whole[first : first + count])
    for other in (rows(0, 150, seed=2), rows(150, 150), rows(0, 150, training=False)):
        assert (other != whole).any(axis=1).mean() > 0.8
    np.testing.assert_array_equal(rows(0, 20, False, seed=1), rows(0, 20, False, seed=2))


@pytest.mark.parametrize("count, below", [(2, 4), (3, 3), (1, 5)])
def test_distinct_numbers_in_every_order(count, below):
    drawn = distinct(np.random.default_rng(0), 12_000, count, below)
    found = Counter(map(tuple, drawn.tolist()))
    arrangements = list(itertools.permutations(range(below), count))
    assert set(found) == set(arrangements)
    p = 1 / len(arrangements)
    assert all(abs(number - 12_000 * p) < 4.5 * math.sqrt(12_000 * p * (1 - p)) for number in found.values())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MQAR(pairs=8).segment(30, 0), "data.task=mqar has no examples of 30 tokens: it needs an even number, at"),
        (lambda: MQAR(vocab_size=64).segment(64, 0), "data.tasks.mqar.vocab_size=64 must be above the length, 64"),
        (lambda: MQAR(power=0.0), "data.tasks.mqar.power=0.0 must be positive"),
        (lambda: MQAR(train_mix=((64, 4),)), "mqar.train_mix=((64, 4),) must hold values each of which must have 3 entries"),
        (lambda: MQAR(test_mix=((64, 4, 0),)), "data.tasks.mqar.test_mix"),
        (lambda: SelectiveCopying(copies=16).segment(32, 0), "at least 33 for copies=16"),
        (lambda: FuzzyRecall(longest_motif=8), "longest_motif=8 must lie in 1..7"),
        (lambda: NoisyRecall(noise_ids=31), "noise_ids=31 must leave a key and a value"),
        (lambda: InContextRecall(noise_fraction=0.1), "needs noise_ids of at least 1"),
        (lambda: GroupWord(group="A6"), "group='A6' is not one of A5, A4xZ5, Z60, S5"),
        (lambda: Parity().segment(2, 0), "it needs at least 3"),
        (lambda: ModularArithmetic().segment(5, 0), "data.task=modular_arithmetic has no examples of 5 tokens"),
        (lambda: ListOps().segment(51, 0), "at least 52 for longer_than=50"),
        (lambda: Memorization(test_examples=0), "data.tasks.memorization.test_examples=0 must be at least 1"),
        (lambda: tasks.load("mqra"), "there is no task 'mqra'; did you mean 'mqar'?"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)
