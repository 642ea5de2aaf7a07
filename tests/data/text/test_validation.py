"""The validation set: every token a target once, in order, and every byte of text counted once."""

import dataclasses

import numpy as np
import pytest

from seqmodels import data
from seqmodels.data.text import validation
from seqmodels.data.text.validation import ValidationSet
from seqmodels.errors import UserError
from tests.data.text.work import Counted, most_of_a_batch

END = 9
TOKENS = [1, 2, 3, END, END, 4, 5, 6, 7, 8, END, 1, END]
ENDS, BYTES = [4, 5, 11, 13], [10, 0, 7, 3]
PER_TARGET = [2.5] * 4 + [0.0] + [7 / 6] * 6 + [1.5] * 2


def example(packing="windows"):
    return ValidationSet(
        tokens=np.array(TOKENS, np.uint16),
        document_ends=np.array(ENDS),
        document_bytes=np.array(BYTES),
        end_of_text=END,
        tokenizer_name="bpe-10",
        source="test",
        packing=packing,
    )


@pytest.mark.parametrize("batch_size, seq_len", [(1, 1), (1, 3), (2, 3), (2, 5), (1, 13), (3, 100), (4, 4)])
def test_every_token_is_a_target_once_in_order(batch_size, seq_len):
    batches = list(example().batches(batch_size, seq_len))
    assert all(v.shape == (batch_size, seq_len) for batch in batches for v in batch.values())
    flat = {name: np.concatenate([batch[name].ravel() for batch in batches]) for name in batches[0]}
    assert set(flat) == {"inputs", "targets", "weights", "bytes"}
    count = len(TOKENS)
    assert flat["targets"][:count].tolist() == TOKENS
    assert flat["inputs"][:count].tolist() == [END, *TOKENS[:-1]]
    assert flat["weights"].tolist() == [1.0] * count + [0.0] * (len(flat["weights"]) - count)
    np.testing.assert_allclose(flat["bytes"][:count], PER_TARGET)
    assert not flat["bytes"][count:].any()
    assert flat["bytes"].sum() == pytest.approx(sum(BYTES), rel=1e-12)
    assert len(batches) == -(-count // (batch_size * seq_len))


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_a_batch_costs_the_same_whatever_the_number_of_documents(packing):
    """Every batch, wherever it lies; a search among the documents alone takes eight halvings more."""

    def cost(documents):
        arrays = {
            "tokens": Counted(np.tile(np.array([1, 2, END], np.uint16), documents)),
            "document_ends": Counted(np.arange(3, 3 * documents + 1, 3)),
            "document_bytes": Counted(np.full(documents, 7)),
        }
        held_out = dataclasses.replace(example(packing), **arrays)
        return most_of_a_batch(held_out.batches(4, 256), arrays.values())

    (read, allocated), (read_of_many, allocated_of_many) = cost(1_000), cost(250_000)
    assert read_of_many <= read + 2 * 8, "two searches"
    assert allocated_of_many < 2 * allocated


def test_documents_that_some_tokens_are_of():
    counts = {1: 1, 4: 1, 5: 2, 6: 3, 11: 3, 12: 4, 13: 4, 1000: 4, None: 4}
    assert {max_tokens: example().documents_in(max_tokens) for max_tokens in counts} == counts


def test_few_documents_are_a_warning():
    assert validation.few_documents(50, "scored") is None
    assert "scored: only 49 documents, fewer than 50" in validation.few_documents(49, "scored")
    assert "only 1 document," in validation.few_documents(1, "scored")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"tokens": np.array([*TOKENS[:-1], 10], np.uint16)}, "ids beyond the vocabulary of 10"),
        ({"document_ends": np.array([4, 5, 11, 12])}, "documents do not end where its tokens do"),
        ({"document_ends": np.array([4, 4, 11, 13])}, "documents do not end where its tokens do"),
        ({"document_bytes": np.array([10, -1, 7, 3])}, "documents do not end where its tokens do"),
        ({"document_bytes": np.array([10, 0, 7])}, "other shapes"),
    ],
)
def test_arrays_that_do_not_belong_together_are_damage(tmp_path, changes, reason):
    validation.write(dataclasses.replace(example(), **changes), tmp_path)
    with pytest.raises(UserError, match=f"is damaged .*{reason}"):
        data.load_validation(tmp_path, 10)
    validation.write(example(), tmp_path)
    data.load_validation(tmp_path, 10)


@pytest.mark.parametrize("max_tokens", [1, 5, 6, 12, 13, 1000])
def test_at_most_so_many_tokens(max_tokens):
    batches = list(example().batches(2, 3, max_tokens))
    assert sum(batch["weights"].sum() for batch in batches) == min(max_tokens, len(TOKENS))
    assert sum(batch["bytes"].sum() for batch in batches) == pytest.approx(sum(PER_TARGET[:max_tokens]))


def test_packed_documents_have_reset_where_a_document_is_read_from():
    batches = list(example("documents").batches(1, 5))
    resets = np.concatenate([batch["reset"].ravel() for batch in batches])
    assert np.flatnonzero(resets).tolist() == [0, *ENDS[:-1]]


def test_a_run_folder_keeps_all_of_it(tmp_path):
    validation.write(example("documents"), tmp_path)
    loaded = data.load_validation(tmp_path)
    for name, value in vars(example("documents")).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.bytes_per_token == example().bytes_per_token == sum(BYTES) / len(TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["validation.npz"]


def test_a_folder_without_validation_text(tmp_path):
    with pytest.raises(UserError, match="has no validation.npz"):
        data.load_validation(tmp_path)
    with pytest.raises(UserError, match="has no validation.npz"):
        data.load_validation(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_file_is_one_clear_line(tmp_path, keep):
    validation.write(example(), tmp_path)
    path = tmp_path / "validation.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is damaged") as error:
        data.load_validation(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in .*file.*workdir"):
        validation.write(example(), tmp_path / "file")
