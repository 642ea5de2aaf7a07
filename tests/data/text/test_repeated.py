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


def test_the_answer_is_kept_and_counted_again_where_it_is_damaged(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jsonl").write_text(lines(DOCUMENTS[:59] * 2))
    said = prepared(tmp_path, capsys, tmp_path / "text.jsonl")
    (kept,) = (tmp_path / "cache" / "repeated").iterdir()
    whole, count, counted = kept.read_bytes(), repeated.count, []
    monkeypatch.setattr(repeated, "count", lambda *both: counted.append(both) or count(*both))
    assert prepared(tmp_path, capsys, tmp_path / "text.jsonl") == said and not counted
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 7)]
    others = [b"", b"[]", b'{"answer": [], "digest": ""}', b'{"answer": [1, 2, 3, true], "digest": 1}', whole[:-9], b"\xff"]
    for number, content in enumerate([*damaged, *others], start=1):
        kept.write_bytes(content)
        assert prepared(tmp_path, capsys, tmp_path / "text.jsonl") == said
        assert len(counted) == number and kept.read_bytes() == whole
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file in its place")  # as a cache that cannot be written
    assert prepared(tmp_path, capsys, tmp_path / "text.jsonl") == said
    (tmp_path / "text.jsonl").write_text(lines(DOCUMENTS))
    assert prepared(tmp_path, capsys, tmp_path / "text.jsonl") == []


def test_of_many_documents_some_are_looked_at_and_what_is_not_searched_is_said(monkeypatch):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 50_000, (3000, 8)).astype(np.uint16)
    ends = np.arange(8, 8 * 3000 + 1, 8)
    train = TokenStream(tokens.ravel(), ends, np.full(3000, 30))
    held_out = ValidationSet(tokens[::-1].ravel(), ends, np.full(3000, 30), 0, "x", "y", "stream")
    assert repeated.count(train, held_out) == (500, 500, 3000, 3000)
    monkeypatch.setattr(repeated, "_MOST_COMPARED", 1500)
    found = repeated.count(train, held_out)
    assert found[1:] == (500, 1500, 3000) and 240 <= found.found <= 260
    assert "in the training text (its first 1,500 of 3,000 documents), too" in repeated.note(found)
