"""A data set of the hub that is streamed gives the documents, and so the tokens, of one that was downloaded."""

import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seqmodels import data
from seqmodels.data import DataConfig
from seqmodels.data.text import hub, sources, toy
from seqmodels.errors import UserError

NAME = "some/stories"
COMMITS = {None: "a" * 40, "main": "a" * 40, "older": "b" * 40}
TRAIN = [*toy.stories("train", 45), None, " ", "größer \U0001f600"]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Parquet shards of a folder, which `datasets` reads as it reads the hub's."""
    folder = tmp_path / "shards" / "data"
    folder.mkdir(parents=True)
    splits = {"train-00000-of-00002": TRAIN[:30], "train-00001-of-00002": TRAIN[30:], "validation-00000-of-00001": ["held out"]}
    for name, texts in splits.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(range(len(texts)))}), folder / f"{name}.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "_import_datasets", _datasets(tmp_path))
    names_commits(monkeypatch, COMMITS)
    forget()
    yield folder
    forget()


def forget():
    """As a new process begins."""
    for kept in (hub.commit, hub.load, hub.streamed):
        kept.cache_clear()


def names_commits(monkeypatch, commits: dict):
    """A hub that names these commits, by revision."""

    class Client:
        def dataset_info(self, name, *, revision):
            assert name == NAME
            return SimpleNamespace(sha=commits[revision])

    monkeypatch.setattr("huggingface_hub.HfApi", Client)


def _datasets(tmp_path):
    import datasets

    def imported(*, offline):
        class Here:
            @staticmethod
            def load_dataset(name, revision, **options):
                assert name == NAME and revision in COMMITS.values()
                return datasets.load_dataset(str(tmp_path / "shards"), cache_dir=str(tmp_path / "copies"), **options)

        return Here

    return imported


def opened(*, streaming, name=NAME):
    return sources.open_source(name, revision="", toy_documents=1, streaming=streaming)


def test_the_documents_of_a_stream(shards, tmp_path):
    source, left_out = opened(streaming=True), Counter()
    texts = [piece.text for piece in source.train.pieces(left_out)]
    assert texts == [text for text in TRAIN if text and text.strip()] and left_out == {"null": 1, "blank": 1}
    assert [piece.text for piece in source.validation.pieces(Counter())] == ["held out"]
    assert not list((tmp_path / "copies").rglob("*.arrow"))  # nothing was copied
    assert source.train.text_bytes() > 0
    downloaded = opened(streaming=False)
    assert [piece.text for piece in downloaded.train.pieces(Counter())] == texts
    assert list((tmp_path / "copies").rglob("*.arrow"))
    assert downloaded.train.fingerprint == source.train.fingerprint


def test_a_run_reads_the_same_batches_at_every_step(shards, tmp_path):
    """Tokens of a stream are cached as others are: a step's batch, and going on from it, does not depend on how text was read."""
    settings = {"source": NAME, "revision": "", "tokenizer": "bytes", "seq_len": 16, "batch_size": 4, "max_train_documents": 20}
    streamed, downloaded = (
        data.prepare(DataConfig(**settings, streaming=streaming, cache_dir=str(tmp_path / str(streaming))), seed=3)
        for streaming in (True, False)
    )
    assert streamed.fingerprint == downloaded.fingerprint and streamed.order == downloaded.order
    for step in (0, 5, 1000):
        np.testing.assert_array_equal(streamed.train_batch(step)["inputs"], downloaded.train_batch(step)["inputs"])
    assert streamed.record == downloaded.record


def test_only_the_documents_that_are_asked_for_are_read(shards):
    read = []
    stream = hub.streamed(NAME, COMMITS[None])["train"]
    first = sources.first_documents(opened(streaming=True).train, 3)
    for piece in first.pieces(Counter()):
        read.append(piece.text)
    assert read == TRAIN[:3] and stream is hub.streamed(NAME, COMMITS[None])["train"]


def test_a_run_says_and_keeps_the_commit_that_it_read(shards, tmp_path, monkeypatch, capsys):
    """And goes on with it, when a newer one is there."""
    settings = {"source": NAME, "tokenizer": "bytes", "seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}

    def prepared(revision, begun_with=None):
        forget()
        return data.prepare(DataConfig(**settings, revision=revision), seed=3, begun_with=begun_with)

    first = prepared("")
    assert f"; {NAME} at commit {'a' * 40}" in capsys.readouterr().err and f"at commit {'a' * 40}" in first.record["said"]
    record = json.loads(json.dumps(first.record))
    assert record["commits"] == {NAME: "a" * 40}
    names_commits(monkeypatch, {None: "b" * 40, "tag": "b" * 40})
    assert prepared("", record).record == record and prepared("tag", record).record == record
    assert prepared("").record["commits"] == {NAME: "b" * 40}
    assert prepared("b" * 40, record).record["commits"] == {NAME: "b" * 40}  # that is asked for by its name
    for odd in (None, {}, {"commits": [NAME]}, {"commits": {NAME: "newest"}}):
        assert prepared("", odd).record["commits"] == {NAME: "b" * 40}


def test_without_a_network_the_copy_that_was_made_last_names_the_commit(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    copies = tmp_path / "home" / "datasets" / "some___stories" / "default" / "0.0.0"
    for age, commit in enumerate("abc"):
        (copies / (commit * 40)).mkdir(parents=True)
        os.utime(copies / (commit * 40), (0, 100 - age))
    (copies / f"{'d' * 40}.incomplete").mkdir()
    assert hub.commit(NAME, "") == "a" * 40
    for revision in ("main", "tag"):  # what they mean the hub says
        with pytest.raises(UserError, match="cannot reach"):
            hub.commit(NAME, revision)


def test_a_revision_that_is_not_there_is_one_line(shards):
    with pytest.raises(UserError, match="data set 'some/stories' .revision nowhere. cannot be loaded") as error:
        sources.open_source(NAME, revision="nowhere", toy_documents=1)
    assert "\n" not in str(error.value)


def test_a_stream_without_text_or_with_an_end_is_one_line(shards):
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), shards / "test-00000-of-00001.parquet")
    for file in shards.glob("[tv][ra]*.parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), file)
    with pytest.raises(UserError, match="has no column 'text' .its columns: words"):
        list(opened(streaming=True).train.pieces(Counter()))
    hub.streamed.cache_clear()
    for file in shards.glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="data set 'some/stories'.*cannot be (read|loaded)") as error:
        list(opened(streaming=True).train.pieces(Counter()))
    assert "\n" not in str(error.value)


def test_without_a_network_there_is_no_stream(shards, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(UserError, match="cannot reach the Hugging Face hub for 'some/stories'"):
        opened(streaming=True)


@pytest.mark.parametrize("name", ["toy", "nowhere.txt"])
def test_what_is_no_hub_id_is_not_streamed(name):
    with pytest.raises(UserError, match=f"data.streaming is for a hub id, and data.source={name} is none"):
        opened(streaming=True, name=name)
