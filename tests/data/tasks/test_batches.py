"""Batches of a synthetic task: sizes in their order, every example once, padding that weighs nothing."""

import dataclasses

import numpy as np
import pytest

from seqmodels import data
from seqmodels.data.tasks.batches import TaskDataset, held_out
from seqmodels.data.tasks.recall import MQAR
from seqmodels.data.tasks.state_tracking import Parity
from seqmodels.errors import UserError

MIX = MQAR(vocab_size=64, train_mix=((16, 2, 7), (24, 3, 4), (24, 6, 6)), test_mix=((16, 2, 5), (48, 6, 3)))


def dataset(task, *, seq_len=24, batch_size=2, seed=0):
    return TaskDataset(task.name, task, seq_len=seq_len, batch_size=batch_size, seed=seed)


def numbers(batch):
    """(pairs, rows of inputs) of a batch."""
    return int(batch["weights"].sum(axis=1)[0]), batch["inputs"].tolist()


def test_sizes_come_in_their_order_and_begin_again():
    batches = [dataset(MIX).train_batch(step) for step in range(16)]
    assert [numbers(batch)[0] for batch in batches[:8]] == [2, 2, 2, 3, 3, 6, 6, 6]
    assert [numbers(batch) for batch in batches[8:]] == [numbers(batch) for batch in batches[:8]]
    rows = [row for batch in batches[:3] for row in batch["inputs"][:, :16].tolist()]
    assert rows == MIX.rows(MIX.train_segments(24)[0], 0, 6, training=True, seed=0).inputs.tolist()


def test_endless_sizes_take_turns_and_never_repeat():
    endless = dataclasses.replace(MIX, train_mix=((16, 2, 0), (24, 3, 0)))
    batches = [dataset(endless).train_batch(step) for step in range(40)]
    assert [numbers(batch)[0] for batch in batches] == [2, 3] * 20
    assert len({tuple(row) for batch in batches for row in batch["inputs"].tolist()}) == 80


def test_a_batch_is_a_function_of_seed_and_step():
    one, again, other = (dataset(MIX, seed=seed) for seed in (1, 1, 2))
    one.train_batch(5)
    for step in (3, 0, 7):
        a, b, c = (each.train_batch(step) for each in (one, again, other))
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert not np.array_equal(a["inputs"], c["inputs"])
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_padding_weighs_nothing():
    batch = dataset(MIX, seq_len=32).train_batch(0)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "inputs": ((2, 32), np.int32), "targets": ((2, 32), np.int32), "weights": ((2, 32), np.float32),
    }  # fmt: skip
    assert not batch["weights"][:, 16:].any() and not batch["inputs"][:, 16:].any()
    assert set(batch["weights"].ravel().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_example_of_a_test_once_in_order(batch_size):
    test = held_out(MIX, MIX.test_segments(24))
    assert list(test.segments) == ["length 16, 2 pairs", "length 48, 6 pairs"] and len(test) == 5 * 16 + 3 * 48
    for segment, (length, pairs, count) in zip(test.segments.values(), ((16, 2, 5), (48, 6, 3))):
        batches = list(segment.batches(batch_size, length))
        assert all(batch["inputs"].shape == (batch_size, length) for batch in batches)
        rows = np.concatenate([batch["inputs"] for batch in batches])[:count]
        expected = MIX.rows(MIX.segment(length, count, pairs), 0, count, training=False, seed=0)
        np.testing.assert_array_equal(rows, expected.inputs)
        assert sum(batch["weights"].sum() for batch in batches) == count * pairs
    first, *others = test.segments["length 16, 2 pairs"].batches(2, 16, max_tokens=2 * 2 * 16 + 15)
    assert len(others) == 1 and first["inputs"].shape == (2, 16)
    assert len(list(test.segments["length 16, 2 pairs"].batches(2, 16, max_tokens=1))) == 1


@pytest.mark.parametrize(
    "task, sizes, message",
    [
        (MIX, {"seq_len": 16}, "data.seq_len is 16, but the task's training examples have up to 24 tokens"),
        (MIX, {"batch_size": 5}, "4 training examples are fewer than one batch; lower data.batch_size, now 5"),
        (dataclasses.replace(MIX, train_mix=((16, 2, 0), (24, 3, 4))), {}, "either all are endless"),
        (MQAR(pairs=7), {}, "data.task=mqar has no examples of 24 tokens"),
        (Parity(test_lengths=(2,)), {}, "data.task=parity has no examples of 2 tokens"),
    ],
)
def test_mistakes(task, sizes, message):
    with pytest.raises(UserError) as error:
        dataset(task, **sizes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prepare_makes_a_probe_of_a_task(tmp_path):
    config = data.DataConfig(
        source="/no/such/source", revision="", validation_source=None, tokenizer="bytes", vocab_size=300, seq_len=24,
        batch_size=2, packing="windows", cache_dir=str(tmp_path / "cache"), max_train_documents=0, toy_documents=1,
        task="mqar", tasks=(("mqar", MIX),),
    )  # fmt: skip
    made = data.prepare(config, seed=3)
    assert made.tokenizer is None and made.vocab_size == 64 and made.train_bytes_per_token is None
    np.testing.assert_array_equal(made.train_batch(4)["inputs"], dataset(MIX, seed=3).train_batch(4)["inputs"])
    assert not list(tmp_path.iterdir())
