"""What is held out is in no way trained on, in any layout that a person may bring, down to the tokens."""

import json
import random
import re
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seqmodels import data
from seqmodels.data.text import readers, sources
from seqmodels.errors import UserError
from tests.configs import tiny

SEPARATOR = readers.SEPARATOR


def prepared(source, cache, **overrides):
    fields = {"data.source": str(source), "data.cache_dir": str(cache), "data.batch_size": 1, "data.seq_len": 8}
    return data.prepare(tiny(**fields, **{f"data.{name}": value for name, value in overrides.items()}).data, seed=0)


def documents_of(stream):
    """The texts in a stream of tokens of the bytes tokenizer."""
    starts = [0, *stream.document_ends[:-1]]
    return [stream.tokens[a : b - 1].astype(np.uint8).tobytes().decode() for a, b in zip(starts, stream.document_ends)]


def marks(texts):
    """The documents that texts are of: every line of the text below begins with its document's."""
    return Counter(mark for text in texts for mark in re.findall(r"<(\w+)>", text))


def marked(mark, lines):
    return "".join(f"<{mark}> word{line} word.\n" for line in range(lines))


# -- layouts, drawn at random -----------------------------------------------------------------------------------


def write(path, texts, *, parted):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text(f"\n{SEPARATOR}\n".join(texts) + (f"\n{SEPARATOR}\n" if parted else ""))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def random_folder(folder, draw):
    """A folder of files of one format; returns the documents that are in it."""
    suffix = draw.choice([".txt", ".txt", ".txt", ".jsonl", ".parquet"])
    named = draw.random() < 0.3
    known = set()
    for number in range(draw.randint(2, 30)):
        parted = suffix != ".txt" or draw.random() < 0.5
        names = [f"file{number}doc{i}" for i in range(draw.randint(1, 4) if parted else 1)]
        known |= set(names)
        word = ("train", "valid")[number] if number < 2 else draw.choice(["train", "valid"])
        name = f"{word}_{number}" if named else draw.choice([f"chapter {number}", f"test_of_{number}", f"dev-{number}-notes"])
        write(folder / f"{name}{suffix}", [marked(name, draw.randint(1, 300)) for name in names], parted=parted)
    return known


@pytest.mark.parametrize("seed", range(40))
def test_no_document_is_in_both_splits_and_none_is_lost(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    # Pieces so short that most documents are cut into several.
    longest, chunk = draw.choice([(50, 37), (1000, 37), (1000, 4096), (1 << 20, 4096)])
    monkeypatch.setattr(readers, "LONGEST_PIECE", longest)
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    known = random_folder(tmp_path / "texts", draw)
    source = sources.with_validation(sources.open_source(str(tmp_path / "texts"), revision="", toy_documents=1))
    train, held_out = (list(split.documents()) for split in (source.train, source.validation))
    assert marks(train).keys() & marks(held_out).keys() == set() and held_out
    assert marks(train).keys() | marks(held_out).keys() == known
    # And a document is one, however long it is.
    assert all(len(marks([text])) == 1 for text in train + held_out)
    assert len(train) + len(held_out) == len(known)


def test_every_validation_token_is_of_a_file_that_training_has_nothing_of(tmp_path):
    """The folder of 60 text files without separators, of whose validation pieces 20 of 21 were in training files."""
    for number in range(60):
        write(tmp_path / "texts" / f"chapter_{number:03d}.txt", [marked(f"file{number:03d}", 600)], parted=False)
    made = prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes")
    train, held_out = documents_of(made.train), documents_of(made.validation)
    files = {path.read_text().rstrip("\n"): path.name for path in (tmp_path / "texts").iterdir()}
    # Every document is a file's whole text, which matches each piece to its file.
    assert [files[text] for text in held_out] == ["chapter_001.txt", "chapter_021.txt", "chapter_041.txt"]
    assert sorted(files[text] for text in train + held_out) == sorted(files.values())


def test_of_equal_text_files_one_is_read(tmp_path):
    folder_of_chapters(tmp_path / "texts")
    for number in range(6):
        (tmp_path / "texts" / f"copy of chapter{number}.txt").write_bytes((tmp_path / f"texts/chapter{number}.txt").read_bytes())
    source = sources.with_validation(sources.open_source(str(tmp_path / "texts"), revision="", toy_documents=1))
    train, held_out = (marks(split.documents()) for split in (source.train, source.validation))
    assert train.keys() & held_out.keys() == set() and len(train) + len(held_out) == 6
    assert [unread.reason for unread in source.unread] == ["a copy of another file"] and len(source.unread[0].names) == 6


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_an_equal_copy_of_a_file_is_in_no_two_splits(tmp_path, suffix):
    texts = {name: [marked(f"{name}{i}", 5) for i in range(40)] for name in ("a", "b")}

    def both_splits(folder, files):
        for name, text in files.items():
            write(tmp_path / folder / f"{name}{suffix}", texts[text], parted=True)
        source = sources.with_validation(sources.open_source(str(tmp_path / folder), revision="", toy_documents=1))
        return source, *(marks(split.documents()) for split in (source.train, source.validation))

    # No split is named: the copy is not read.
    source, train, held_out = both_splits("copies", {"one": "a", "one (copy)": "a", "two": "b"})
    assert train.keys() & held_out.keys() == set() and len(train) + len(held_out) == 80
    assert source.unread == (((f"one{suffix}",), "a copy of another file"),)
    # The validation split is named: its copy is not trained on.
    source, train, held_out = both_splits("named", {"validation": "a", "extra": "a", "train": "b"})
    assert train.keys() & held_out.keys() == set() and len(train) == len(held_out) == 40
    assert source.unread == (((f"extra{suffix}",), "held out, and so not trained on"),)
    with pytest.raises(UserError, match="held out .by its name. is all that data.source=.* has to train on"):
        both_splits("the same", {"validation": "a", "train": "a"})


def test_files_of_one_size_and_sample_are_not_taken_for_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.fingerprint, "content_sample", lambda path: "equal")
    for name in ("train", "validation", "other"):
        write(tmp_path / f"{name}.jsonl", [marked(name[:5], 5)], parted=True)
    write(tmp_path / "copy.jsonl", [marked("valid", 5)], parted=True)
    source = sources.open_source(str(tmp_path), revision="", toy_documents=1)
    assert [file.name for file in source.train.files] == ["other.jsonl", "train.jsonl"]


# -- one text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n", " ", ""])
@pytest.mark.parametrize("size", [200, 5000, 300_000])
def test_of_one_text_the_end_is_held_out_in_one_part(tmp_path, line_end, size):
    words = [f"wörd{i}" for i in range(size // 8)]
    text = line_end.join(words)
    path = tmp_path / "play.txt"
    path.write_bytes(text.encode())
    source = sources.with_validation(sources.open_source(str(path), revision="", toy_documents=1))
    [train], [held_out] = (list(split.documents()) for split in (source.train, source.validation))
    assert text.startswith(train) and text.endswith(held_out)
    between = text[len(train) : len(text) - len(held_out)]
    assert between in ("", line_end)  # nothing in both, nothing lost
    share = len(held_out.encode()) / len(text.encode())
    assert 0.02 < share <= 0.07
    if line_end:
        assert held_out.split(line_end)[0] in words  # no word is cut
    assert source.train.fingerprint != source.validation.fingerprint


def test_one_text_is_one_document_of_tokens(tmp_path, capsys):
    path = tmp_path / "play.txt"
    path.write_text(marked("play", 500))
    made = prepared(path, tmp_path / "cache", tokenizer="bytes")
    assert len(made.train.document_ends) == len(made.validation.document_ends) == 1
    assert made.train.document_bytes[0] == len(made.train) - 1
    assert "only 1 document, fewer than 50" in capsys.readouterr().err


def test_a_text_too_short_for_two_parts(tmp_path):
    for text in ("x", "short", " \n\n "):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(UserError, match="too short|holds no text|fewer than one batch") as error:
            prepared(tmp_path / "a.txt", tmp_path / "cache", tokenizer="bytes")
        assert "\n" not in str(error.value)


def test_a_first_separator_beyond_the_beginning_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 64)
    write(tmp_path / "a.txt", [marked("a", 200), marked("b", 5)], parted=False)
    source = sources.with_validation(sources.open_source(str(tmp_path / "a.txt"), revision="", toy_documents=1))
    assert marks(source.train.documents()).keys() == {"a"} and marks(source.validation.documents()).keys() == {"b"}


def test_pieces_have_the_tokens_of_the_whole_text(tmp_path, monkeypatch):
    """Where a text is cut, to bound memory, a byte-level BPE has a boundary anyway."""
    draw = random.Random(0)
    words = ["the", "cat's", "sat", "123", "¿qué?", "日本語", "\n", "\n\n", "  ", "\t", "don't", "!", "x" * 30]
    text = "A " + " ".join(draw.choices(words, k=3000)) + " end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens = {}
    for longest in (100, 1 << 20):
        monkeypatch.setattr(readers, "LONGEST_PIECE", longest)
        made = prepared(tmp_path / "a.txt", tmp_path / str(longest), tokenizer="bpe", vocab_size=300)
        tokens[longest] = made.train.tokens.tolist()
        assert made.tokenizer.decode(made.train.tokens[:-1]) == next(
            sources.with_validation(sources.open_source(str(tmp_path / "a.txt"), revision="", toy_documents=1)).train.documents()
        )
    assert tokens[100] == tokens[1 << 20]


# -- data.validation_source -------------------------------------------------------------------------------------


def folder_of_chapters(folder, count=6):
    for number in range(count):
        write(folder / f"chapter{number}.txt", [marked(f"c{number}", 20)], parted=False)


def splits_of(made):
    return marks(documents_of(made.train)).keys(), marks(documents_of(made.validation)).keys()


def test_a_path_to_validate_on_and_all_of_the_source_is_trained_on(tmp_path):
    folder_of_chapters(tmp_path / "texts")
    write(tmp_path / "held out.txt", [marked("other", 20)], parted=False)
    made = prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source=str(tmp_path / "held out.txt"))
    assert splits_of(made) == ({f"c{number}" for number in range(6)}, {"other"})
    assert made.validation.source == str(tmp_path / "held out.txt")


def test_a_file_of_the_source_to_validate_on_is_not_trained_on(tmp_path, capsys):
    folder_of_chapters(tmp_path / "texts")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "texts/chapter2.txt").read_bytes())
    (tmp_path / "link.txt").symlink_to(tmp_path / "texts/chapter2.txt")
    for name in ("texts/chapter2.txt", "copy.txt", "link.txt"):
        made = prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source=str(tmp_path / name))
        assert splits_of(made) == ({"c0", "c1", "c3", "c4", "c5"}, {"c2"})
        assert "'chapter2.txt' (held out, and so not trained on)" in capsys.readouterr().err
    for name in ("texts", "texts/../texts"):
        with pytest.raises(UserError, match="is all that data.source=.* has to train on"):
            prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source=str(tmp_path / name))


def test_a_split_of_the_source_to_validate_on(tmp_path, capsys):
    for split in ("train", "validation", "test"):
        write(tmp_path / "texts" / f"{split}-00000-of-00001.parquet", [marked(split, 9)], parted=True)
    for name in ("test", "validation", None):
        made = prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source=name)
        held_out = name or "validation"
        assert splits_of(made) == ({"train"}, {held_out})
        other = {"test": "validation", "validation": "test"}[held_out]
        said = capsys.readouterr().err.splitlines()[0]
        assert f"held out: '{held_out}-0" in said and f"'{other}-0" in said.split("not read: ")[1]
    with pytest.raises(UserError, match="validation_source=train is what is trained on"):
        prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source="train")
    with pytest.raises(UserError, match="neither a split that data.source has .train, validation, test. nor text"):
        prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source="tests")


def test_the_toy_can_be_validated_on(tmp_path):
    folder_of_chapters(tmp_path / "texts")
    made = prepared(tmp_path / "texts", tmp_path / "cache", tokenizer="bytes", validation_source="toy")
    assert len(made.validation.document_ends) == 200 and len(made.train.document_ends) == 6
