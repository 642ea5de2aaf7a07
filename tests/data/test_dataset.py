"""From a config to batches and back: what train.py and eval.py rely on."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seqmodels import data
from seqmodels.data.text import toy
from seqmodels.errors import UserError
from tests.places import OF_ANOTHER_KIND

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache):
    return data.DataConfig(
        source="toy",
        revision="",
        validation_source=None,
        tokenizer="bytes",
        vocab_size=300,
        seq_len=64,
        batch_size=4,
        packing="windows",
        cache_dir=str(cache),
        max_train_documents=0,
        toy_documents=50,
        task="text",
        tasks=(),
    )


def with_(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_streams_hold_the_stories(config, tokenizer):
    dataset = data.prepare(with_(config, tokenizer=tokenizer), seed=0)
    for split, stream, count in (
        ("train", dataset.train, 50),
        ("validation", dataset.validation, toy.VALIDATION_DOCUMENTS),
    ):
        starts = [0, *stream.document_ends[:-1]]
        texts = [dataset.tokenizer.decode(stream.tokens[a : b - 1]) for a, b in zip(starts, stream.document_ends)]
        assert texts == list(toy.stories(split, count))
        assert all(stream.tokens[end - 1] == dataset.tokenizer.end_of_text for end in stream.document_ends)
        text_bytes = sum(len(text.encode()) for text in texts)
        assert stream.bytes_per_token == pytest.approx(text_bytes / len(stream.tokens))
    assert dataset.train_bytes_per_token == dataset.train.bytes_per_token


def test_bits_per_byte_do_not_depend_on_the_tokenizer_s_cuts(config):
    """A model that gives each document one bit per byte of text scores 1.0 with any tokenizer."""
    for tokenizer in ("bytes", "bpe"):
        validation = data.prepare(with_(config, tokenizer=tokenizer), seed=0).validation
        text_bytes = sum(batch["bytes"].sum() for batch in validation.batches(3, 50))
        assert text_bytes == pytest.approx(sum(len(s) for s in toy.stories("validation", 200)), rel=1e-9)


def test_batches_resume_in_another_process(config):
    step = 1234
    here = data.prepare(config, seed=7).train_batch(step)
    program = (
        "import json, sys; from seqmodels import data\n"
        "config = data.DataConfig(**json.loads(sys.argv[1]) | {'tasks': ()})\n"  # JSON has no tuples
        f"print(json.dumps(data.prepare(config, seed=7).train_batch({step})['inputs'].tolist()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == here["inputs"].tolist()
    other_seed = data.prepare(config, seed=8).train_batch(step)
    assert (other_seed["inputs"] != here["inputs"]).any()


def test_packed_documents_reach_training_and_validation(config, tmp_path):
    dataset = data.prepare(with_(config, packing="documents"), seed=0)
    batch = dataset.train_batch(0)
    assert set(batch) == {"inputs", "targets", "reset", "weights"}
    data.save_validation(dataset, tmp_path)
    assert "reset" in next(data.load_validation(tmp_path).batches(2, 8))


def test_the_run_folder_is_all_that_evaluation_needs(config, tmp_path):
    dataset = data.prepare(with_(config, tokenizer="bpe"), seed=0)
    dataset.tokenizer.save(tmp_path / "tokenizer.json")
    data.save_validation(dataset, tmp_path)
    tokenizer, validation = data.load_tokenizer(tmp_path / "tokenizer.json"), data.load_validation(tmp_path)
    assert validation.tokenizer_name == tokenizer.name == f"bpe-{dataset.tokenizer.vocab_size}"
    assert tokenizer.decode(validation.tokens[: validation.document_ends[0]]) == next(toy.stories("validation", 1))
    np.testing.assert_array_equal(validation.tokens, dataset.validation.tokens)


def test_a_source_may_have_a_name_that_is_not_utf8(config, tmp_path):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    with open(source, "w") as file:
        file.writelines(json.dumps({"text": f"story {number}"}) + "\n" for number in range(100))
    dataset = data.prepare(with_(config, source=source, tokenizer="bytes", cache_dir=str(tmp_path)), seed=0)
    dataset.save(tmp_path)
    assert data.load_validation(tmp_path).source == f"{tmp_path}/caf\ufffd.jsonl"
    assert json.loads((tmp_path / data.RECORD_NAME).read_text())["train"]["files"] == [source]


def test_the_bpe_is_trained_on_the_training_split_once(config, monkeypatch):
    config = with_(config, tokenizer="bpe", toy_documents=60)
    first = data.prepare(config, seed=0)
    monkeypatch.setattr("seqmodels.data.text.tokenizer.train_bpe", None)
    assert data.prepare(config, seed=0).tokenizer.to_json() == first.tokenizer.to_json()


def test_a_damaged_cached_tokenizer_is_trained_again(config, tmp_path, capsys):
    config = with_(config, tokenizer="bpe", cache_dir=str(tmp_path))
    first = data.prepare(config, seed=0)
    (path,) = (tmp_path / "tokenizers").iterdir()
    damages = {"half of it": lambda path: path.write_bytes(path.read_bytes()[:1000])} | OF_ANOTHER_KIND
    for name, damage in damages.items():
        damage(path)
        assert data.prepare(config, seed=0).tokenizer.to_json() == first.tokenizer.to_json(), name
        assert len([line for line in capsys.readouterr().err.splitlines() if "damaged" in line]) == 1
        assert path.is_file() and not path.is_symlink()


def test_a_cached_tokenizer_that_cannot_be_read_now_is_not_taken_for_damaged(config, monkeypatch):
    config = with_(config, tokenizer="bpe", toy_documents=60)
    data.prepare(config, seed=0)

    def refuse(path, most_bytes):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as context, pytest.raises(UserError, match="cannot read the cached tokenizer '.*: Permission"):
        context.setattr(data.dataset, "read_bytes", refuse)
        data.prepare(config, seed=0)
    monkeypatch.setattr("seqmodels.data.text.tokenizer.train_bpe", None)
    data.prepare(config, seed=0)


def test_only_the_first_documents(config):
    few = data.prepare(with_(config, max_train_documents=20), seed=0)
    assert len(few.train.document_ends) == 20
    assert len(few.validation.document_ends) == toy.VALIDATION_DOCUMENTS


def test_a_changed_file_is_read_again(config, tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(toy.stories("train", 40)))
    before = data.prepare(with_(config, source=str(path)), seed=0)
    path.write_text("\n<|endoftext|>\n".join(toy.stories("train", 41)))
    after = data.prepare(with_(config, source=str(path)), seed=0)
    assert len(after.train.document_ends) == len(before.train.document_ends) + 1
    assert len(before.validation.document_ends) == len(after.validation.document_ends) == 2


def test_other_text_is_judged_with_the_tokenizer_of_the_run(config, cache, tmp_path):
    tokenizer = data.prepare(with_(config, tokenizer="bpe"), seed=0).tokenizer
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("Only one short text. Öl!")
    judged = data.validation_from_source(str(held_out), tokenizer, cache_dir=cache, packing="documents")
    assert tokenizer.decode(judged.tokens) == "Only one short text. Öl!"
    assert judged.document_bytes.tolist() == [25]
    assert (judged.tokenizer_name, judged.packing) == (tokenizer.name, "documents")
    toys = data.validation_from_source("toy", tokenizer, cache_dir=cache)
    np.testing.assert_array_equal(toys.tokens, data.prepare(with_(config, tokenizer="bpe"), seed=0).validation.tokens)
    with pytest.raises(UserError, match="does not exist"):
        data.validation_from_source("no_such.txt", tokenizer, cache_dir=cache)


def test_text_that_a_run_was_trained_on_is_said_where_it_is_scored(config, cache, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("trained", "other")}
    for name, file in files.items():
        file.write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(100)))
    dataset = data.prepare(with_(config, source=str(files["trained"])), seed=0)
    dataset.save(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere/copy.jsonl"
    copy.write_bytes(files["trained"].read_bytes())
    said = {}
    for file in (files["trained"], copy, files["other"]):
        capsys.readouterr()
        record = data.read_record(tmp_path)
        data.validation_from_source(str(file), dataset.tokenizer, cache_dir=cache, trained_on=record)
        said[file.name] = "the run was trained on" in capsys.readouterr().err
    assert said == {"trained.jsonl": True, "copy.jsonl": True, "other.jsonl": False}
    for odd in ("[]", '{"train": 1}', '{"train": {"contents": {}}}', "{"):
        (tmp_path / data.RECORD_NAME).write_text(odd)
        record = data.read_record(tmp_path)
        data.validation_from_source(str(files["trained"]), dataset.tokenizer, cache_dir=cache, trained_on=record)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 0}, r"data\.seq_len=0 must be at least 1"),
        ({"batch_size": 0}, r"data\.batch_size=0 must"),
        ({"toy_documents": 0}, r"data\.toy_documents=0 must"),
        ({"max_train_documents": -1}, r"data\.max_train_documents=-1 must"),
        ({"packing": "window"}, r"data\.packing='window' is not one of windows, documents"),
        ({"tokenizer": "bpe", "vocab_size": 100}, r"data\.vocab_size is 100"),
        ({"tokenizer": "no/such/tokenizer.json"}, r"no tokenizer at 'no/such"),
        ({"source": "no_such.parquet"}, r"data\.source 'no_such.parquet' does not exist"),
        ({"seq_len": 10_000}, r"tokens.*fewer than one batch"),
        ({"cache_dir": "/dev/null/cache"}, r"cannot write in '/dev/null/cache'.*data\.cache_dir"),
        ({"cache_dir": "/dev/null/cache", "tokenizer": "bpe"}, r"cannot write in .*data\.cache_dir"),
    ],
)
def test_a_person_s_mistake_is_one_clear_line(config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        data.prepare(with_(config, **changes), seed=0)
    assert "\n" not in str(error.value)


def test_a_negative_seed(config):
    with pytest.raises(UserError, match="seed is -1"):
        data.prepare(config, seed=-1)


def test_one_document_is_not_enough_for_two_splits(config, tmp_path):
    (tmp_path / "one.txt").write_text("Once upon a time. " * 100 + "<|endoftext|>")
    with pytest.raises(UserError, match="one.txt.* has too few documents, 1, to keep"):
        data.prepare(with_(config, source=str(tmp_path / "one.txt")), seed=0)


def test_importing_the_data_is_cheap():
    program = (
        "import sys, seqmodels.data\n"
        "heavy = {'jax', 'datasets', 'pyarrow', 'tokenizers', 'rich', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
