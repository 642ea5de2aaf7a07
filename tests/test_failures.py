"""What the system refuses while a file is read is no damage: every reader says what is in the way, and of which file."""

import contextlib
import errno
import json
import os

import numpy as np
import pytest

from seqmodels import config as config_lib
from seqmodels import data, failures, run_list
from seqmodels.data.text import shards, sources
from seqmodels.data.text.tokenizer import train_bpe
from seqmodels.formats import json_text, limits, npz, yaml_texts
from seqmodels.interop import safetensors
from seqmodels.training.log import MetricsFile, SamplesFile
from tests.configs import tiny

CAUSES = {errno.EIO: "input/output error", errno.ESTALE: "does not answer", errno.EDQUOT: "no space", errno.EMFILE: "open files"}


class Folder:
    """A file of each format, and what reads it, by the file's name."""

    def __init__(self, path):
        self.path = path
        config_lib.save(tiny(), path / "config.json")
        for name, text in {
            "values.json": "{}",
            "data.json": "{}",
            "prompts.yaml": "- a",
            "samples.txt": "=== step 1\nx\n\n",
        }.items():
            (path / name).write_text(text)
        (path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0, "tokens": 1, "seconds": 1.0}\n')
        (path / "text.jsonl").write_text("".join(json.dumps({"text": f"story {number}"}) + "\n" for number in range(40)))
        np.savez(path / "arrays.npz", a=np.zeros(3))
        safetensors.write(path / "model.safetensors", {"a": np.zeros(3, np.float32)})
        train_bpe(["a story"], 257).save(path / "tokenizer.json")
        (path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        text = sources.open_source(str(path / "text.jsonl"), revision="", toy_documents=1).train
        tokenizer = data.load_tokenizer("bytes")
        shards.cached_tokens(path / "cache", text, tokenizer, label="text")
        self.readers = {
            "config.json": lambda: config_lib.load(path / "config.json"),
            "values.json": lambda: json_text.read(path / "values.json"),
            "data.json": lambda: data.read_record(path),
            "tokenizer.json": lambda: data.load_tokenizer(path / "tokenizer.json"),
            "tokenizer_config.json": lambda: data.load_tokenizer(path / "tokenizer.json"),
            "prompts.yaml": lambda: yaml_texts.read(path / "prompts.yaml"),
            "arrays.npz": lambda: npz.read(path / "arrays.npz"),
            "model.safetensors": lambda: safetensors.read(path / "model.safetensors"),
            "metrics.jsonl": lambda: MetricsFile(path / "metrics.jsonl", last_step=1).close(),
            "samples.txt": lambda: SamplesFile(path / "samples.txt", last_step=1),
            "text.jsonl": lambda: sources.open_source(str(path / "text.jsonl"), revision="", toy_documents=1),
            "manifest.json": lambda: shards.cached_tokens(path / "cache", text, tokenizer, label="text"),
        }

    def contents(self):
        return {file: file.read_bytes() for file in self.path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("folder"))


@contextlib.contextmanager
def unreadable(monkeypatch, name: str, number: int):
    """Files of this name can be opened; reading them fails."""
    opened = {}

    class Refusing:
        def __init__(self, file):
            self.file = file

        def read(self, *size):
            raise OSError(number, os.strerror(number))

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    real_open, real_descriptor, real_file = open, os.open, os.fdopen

    def descriptor(path, *rest, **options):
        found = real_descriptor(path, *rest, **options)
        opened[found] = os.fspath(path)
        return found

    def file(number, *rest, **options):
        found = real_file(number, *rest, **options)
        return Refusing(found) if str(opened.pop(number, "")).endswith(name) else found

    def by_path(path, *rest, **options):
        found = real_open(path, *rest, **options)
        return Refusing(found) if str(path).endswith(name) else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", descriptor)
        patch.setattr(os, "fdopen", file)
        patch.setattr("builtins.open", by_path)
        patch.setattr("io.open", by_path)
        yield


@pytest.mark.parametrize("number", CAUSES, ids=errno.errorcode.get)
def test_what_cannot_be_read_now_is_no_damage(folder, monkeypatch, number):
    before = folder.contents()
    for name, read in folder.readers.items():
        read()
        with unreadable(monkeypatch, name, number), pytest.raises((OSError, ValueError)) as error:
            read()
        assert not isinstance(error.value, limits.Malformed) and "damaged" not in str(error.value), name
        assert CAUSES[number] in failures.obstacle(error.value) and name in str(error.value), name
    assert folder.contents() == before


def test_a_listed_run_that_cannot_be_read_now_is_not_called_damaged(folder, monkeypatch):
    for name in ("config.json", "metrics.jsonl"):
        with unreadable(monkeypatch, name, errno.EIO):
            [listed] = run_list.read([folder.path])
        assert listed.status == "unreadable" and "input/output error" in run_list.text([listed], "table")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS, errno.ENOTCONN, errno.EFBIG])
def test_a_cause_has_one_name_by_its_number_and_in_the_text_of_a_library(number):
    by_number = failures.obstacle(OSError(number, os.strerror(number)))
    assert by_number is not None
    assert (
        failures.obstacle(ValueError(f"DATA_LOSS: Error reading 'c/0': [OS error {number}: {os.strerror(number)}]")) == by_number
    )
