"""Held-out documents that are trained on, too, are said, whatever file they come from."""

import json

import numpy as np
import pytest

from seqmodels.data.dataset import DataConfig, prepare
from seqmodels.data.text import repeated
from seqmodels.data.text.shards import TokenStream
from seqmodels.data.text.validation import ValidationSet

DOCUMENTS = [f"story {number} of the cat and the dog" for number in range(60)]
OTHERS = [f"tale {number} of a cow" for number in range(60)]
SEPARATOR = "<|endoftext|>\n"


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def prepared(tmp_path, capsys, source, **options):
    config = DataConfig(
        source=str(source), tokenizer="bytes", seq_len=16, batch_size=2, cache_dir=str(tmp_path / "cache"), **options
    )
    prepare(config, seed=0)
    return [line for line in capsys.readouterr().err.splitlines() if "are in the training text, too" in line]


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("copy.txt", "\ufeff" + SEPARATOR.join(DOCUMENTS), "60 of 60"),
        ("copy.txt", SEPARATOR.join(DOCUMENTS).replace("\n", "\r\n"), "60 of 60"),
        ("copy.jsonl", lines(DOCUMENTS), "60 of 60"),
        ("part.jsonl", lines(OTHERS + DOCUMENTS[:3]), "3 of 63"),
        ("twice.jsonl", lines([DOCUMENTS[0]] * 2 + OTHERS), "2 of 62"),
        ("others.jsonl", lines(OTHERS), None),
    ],
    ids=["mark", "line ends", "format", "part", "twice", "others"],
)
def test_a_copy_of_what_is_trained_on(tmp_path, capsys, name, content, found):
    (tmp_path / "text.txt").write_text(SEPARATOR.join(DOCUMENTS))
    (tmp_path / name).write_bytes(content.encode())
    said = prepared(tmp_path, capsys, tmp_path / "text.txt", validation_source=str(tmp_path / name))
    assert len(said) == (found is not None) and (found is None or f"data: {found} held-out documents" in said[0])


def test_documents_that_are_twice_in_one_file(tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(lines(DOCUMENTS[:59] * 2))
    assert "data: 6 of 6 held-out documents" in prepared(tmp_path, capsys, tmp_path / "text.jsonl")[0]
    (tmp_path / "text.jsonl").write_text(lines(DOCUMENTS))
    assert prepared(tmp_path, capsys, tmp_path / "text.jsonl") == []


def test_of_many_documents_some_are_looked_at_and_of_a_long_text_its_beginning(monkeypatch):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 50_000, (3000, 8)).astype(np.uint16)
    ends = np.arange(8, 8 * 3000 + 1, 8)
    train = TokenStream(tokens.ravel(), ends, np.full(3000, 30))
    held_out = ValidationSet(tokens[::-1].ravel(), ends, np.full(3000, 30), 0, "x", "y", "stream")
    assert repeated.count(train, held_out) == (500, 500)
    monkeypatch.setattr(repeated, "_MOST_TOKENS", 8 * 1500)
    found, looked_at = repeated.count(train, held_out)
    assert looked_at == 500 and 240 <= found <= 260
    monkeypatch.setattr(repeated, "_MOST_TOKENS", 7)
    assert repeated.count(train, held_out) == (0, 500)
