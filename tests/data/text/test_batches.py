"""Training batches are pure functions of (seed, step) and show every token once an epoch."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from seqmodels.data.text.batches import PackedDocuments, ShuffledRows, Windows, feistel, pack, train_batches
from seqmodels.data.text.shards import TokenStream
from seqmodels.errors import UserError
from tests.data.text.work import Counted, most_of_a_batch

END = 999


def stream_of(lengths, start=0):
    """Documents of these many tokens, end of text not counted; every other token is a different number."""
    documents, number = [], start
    for length in lengths:
        documents.append([*range(number, number + length), END])
        number += length
    return TokenStream(
        tokens=np.array([token for document in documents for token in document], np.uint16),
        document_ends=np.cumsum([len(document) for document in documents]),
        document_bytes=np.array(lengths),
    )


def windows(count=103, seq_len=10, batch_size=3, seed=0):
    return Windows(np.arange(count, dtype=np.uint16), seq_len=seq_len, batch_size=batch_size, seed=seed)


LENGTHS = [3, 9, 1, 0, 10, 25, 4, 4, 8, 30, 2, 7, 5, 11, 20, 6] * 3


def packed(lengths=LENGTHS, seq_len=10, batch_size=4, seed=0):
    stream = stream_of(lengths)
    return PackedDocuments(stream, seq_len=seq_len, batch_size=batch_size, end_of_text=END, seed=seed)


@pytest.mark.parametrize("make", [windows, packed])
def test_a_batch_depends_on_seed_and_step_only(make):
    forwards = make()
    in_order = [forwards(step) for step in range(30)]
    fresh = make()
    for step in (29, 3, 17, 0, 29):
        for name, values in fresh(step).items():
            np.testing.assert_array_equal(values, in_order[step][name])
    assert any((make(seed=1)(step)["inputs"] != in_order[step]["inputs"]).any() for step in range(3))


@pytest.mark.parametrize("make", [windows, packed])
def test_epochs_differ_and_each_has_every_row_once(make):
    batches = make()
    rows = [tuple(row) for step in range(60) for row in batches(step)["targets"]]
    count = batches.rows_per_epoch
    first, second = rows[:count], rows[count : 2 * count]
    assert Counter(first) == Counter(second) and first != second
    assert first != sorted(first)


def test_windows_are_contiguous_and_overlap_by_the_one_token_between_them():
    batches = windows()
    assert batches.rows_per_epoch == 10
    batch = batches(0)
    assert set(batch) == {"inputs", "targets"}
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    targets = []
    for step in range(10):  # 3 epochs of 10 windows
        batch = batches(step)
        assert batch["inputs"].shape == batch["targets"].shape == (3, 10)
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        np.testing.assert_array_equal(batch["inputs"][:, 0] % 10, 0)
        targets += batch["targets"].ravel().tolist()
    assert Counter(targets) == {token: 3 for token in range(1, 101)}


def test_a_far_step_costs_no_more_than_a_near_one():
    batches = windows(count=10_001)
    assert batches(10**12)["inputs"].shape == (3, 10)
    assert packed()(10**12)["inputs"].shape == (4, 10)


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_a_batch_costs_the_same_whatever_the_number_of_documents(packing):
    """Once the order of its epoch is there: that is drawn once, and above 2^24 rows is no array."""

    def cost(documents):
        stream = TokenStream(
            tokens=np.tile(np.array([1, 2, END], np.uint16), documents),
            document_ends=np.arange(3, 3 * documents + 1, 3),
            document_bytes=np.full(documents, 7),
        )
        batches = train_batches(stream, packing=packing, seq_len=32, batch_size=8, end_of_text=END, seed=0)
        arrays = {name: Counted(value) for name, value in vars(batches).items() if isinstance(value, np.ndarray)}
        vars(batches).update(arrays)
        batches(0)
        last = batches.rows_per_epoch // 8 - 1
        return most_of_a_batch((batches(step) for step in (1, last // 2, last)), arrays.values())

    (read, allocated), (read_of_many, allocated_of_many) = cost(1_000), cost(250_000)
    assert read_of_many <= read
    assert allocated_of_many < 2 * allocated


def documents_in(batch, row):
    """The parts of a row that ``reset`` begins: pairs of inputs and targets."""
    used = int(batch["weights"][row].sum())
    starts = [*np.flatnonzero(batch["reset"][row]), used]
    return [(batch["inputs"][row, a:b].tolist(), batch["targets"][row, a:b].tolist()) for a, b in zip(starts, starts[1:])]


def test_packed_documents_are_whole_and_parted_by_reset():
    short = [length for length in LENGTHS if length < 10]
    batches = packed(short, batch_size=1)
    stream = stream_of(short)
    expected = Counter(tuple(stream.tokens[end - length - 1 : end].tolist()) for length, end in zip(short, stream.document_ends))
    seen = Counter()
    for step in range(batches.rows_per_epoch):
        batch = batches(step)
        for inputs, targets in documents_in(batch, 0):
            assert inputs == [END, *targets[:-1]]  # read from an end of text to the next
            seen[tuple(targets)] += 1
    assert seen == expected


def test_long_documents_are_cut_into_pieces_that_go_on_where_the_last_stopped():
    batches = packed([25, 3], batch_size=1)
    pieces = [piece for step in range(batches.rows_per_epoch) for piece in documents_in(batches(step), 0)]
    assert sorted(pieces, key=lambda piece: piece[1]) == [
        ([END, *range(9)], [*range(10)]),
        ([*range(9, 19)], [*range(10, 20)]),
        ([*range(19, 25)], [*range(20, 25), END]),
        ([END, 25, 26, 27], [25, 26, 27, END]),
    ]


def test_every_token_of_packed_documents_is_a_target_once_and_padding_weighs_nothing():
    batches = packed(batch_size=1)
    stream, targets = stream_of(LENGTHS), Counter()
    for step in range(batches.rows_per_epoch):
        batch = batches(step)
        assert {name: str(values.dtype) for name, values in batch.items()} == {
            "inputs": "int32",
            "targets": "int32",
            "reset": "bool",
            "weights": "float32",
        }
        weights = batch["weights"][0]
        used = int(weights.sum())
        assert weights.tolist() == [1.0] * used + [0.0] * (10 - used)
        assert batch["reset"][0, 0] and not batch["reset"][0, used:].any()
        targets.update(batch["targets"][0, :used].tolist())
    assert targets == Counter(stream.tokens.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_packing_fits_and_wastes_little(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 65, size=2000)
    order, row_ends = pack(lengths, 64)
    assert sorted(order.tolist()) == list(range(2000))
    rows = np.split(lengths[order], row_ends[:-1])
    assert all(1 <= row.sum() <= 64 for row in rows)
    assert lengths.sum() / (64 * len(rows)) > 0.97
    again, ends_again = pack(lengths, 64)
    assert (again == order).all() and (ends_again == row_ends).all()


def test_packing_of_pieces_that_cannot_share():
    order, row_ends = pack(np.array([10, 10, 10]), 10)
    assert order.tolist() == [0, 1, 2] and row_ends.tolist() == [1, 2, 3]


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_less_than_one_batch_is_an_error_that_says_how_much_there_is(packing):
    stream = stream_of([5, 5, 5])

    def batches(**sizes):
        return train_batches(stream, packing=packing, end_of_text=END, seed=0, **sizes)

    with pytest.raises(UserError, match=r"has 18 tokens.*data\.seq_len 6.*one batch of 4"):
        batches(seq_len=6, batch_size=4)
    assert batches(seq_len=6, batch_size=2)(0)["inputs"].shape == (2, 6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000, 1023])
def test_a_feistel_network_permutes(count):
    sent = feistel(np.arange(count), count, (0, 0))
    assert sorted(sent) == list(range(count))
    np.testing.assert_array_equal(feistel(np.arange(count)[::-1], count, (0, 0)), sent[::-1])


def test_another_epoch_or_seed_has_another_order_and_none_is_near_the_last():
    count = 1000
    orders = [feistel(np.arange(count), count, key) for key in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations([np.arange(count), *orders], 2):
        assert (one == other).sum() < 10  # 1 is expected
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.15


def test_an_order_of_10_to_the_8_sequences_needs_no_array():
    rows = ShuffledRows(10**8, 64, seed=0)
    assert rows.order == "feistel" and ShuffledRows(10**6, 64, seed=0).order == "permutation"
    tracemalloc.start()
    drawn = np.concatenate([rows(step) for step in (0, 1, 10**6, 10**8 // 64)])
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert len(set(drawn)) == len(drawn) and 0 <= drawn.min() and drawn.max() < 10**8


def test_a_run_keeps_its_order():
    stream = np.arange(10 * 4 + 1)
    first = Windows(stream, seq_len=4, batch_size=2, seed=0)
    other = first.with_order("feistel")
    assert (first.order, other.order) == ("permutation", "feistel")
    epochs = [np.concatenate([each(step)["inputs"] for step in range(5)]) for each in (first, other)]
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(*(np.sort(epoch, axis=0) for epoch in epochs))
    np.testing.assert_array_equal(other.with_order("permutation")(3)["inputs"], first(3)["inputs"])
