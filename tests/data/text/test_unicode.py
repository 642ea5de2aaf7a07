"""Text is Unicode, and is there, before anything counts it: in every reader, prompt and tokenizer."""

import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from seqmodels import data
from seqmodels.data.text import hub, readers, sources
from seqmodels.data.text.tokenizer import BytesTokenizer, train_bpe
from seqmodels.data.text.unicode import well_formed
from seqmodels.errors import UserError
from tests.configs import tiny


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cut in half \ud83d here", "cut in half \ufffd here"),
        ("\udcff", "\ufffd"),  # a byte of a command line that is not UTF-8
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d\ud83d\ude00x", "\ufffd😀x"),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text, expected):
    assert well_formed(text) == expected


def test_random_texts_become_unicode_and_sound_ones_stay_the_same_object():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(["a", "é", "日", "😀", "\ud83d", "\udc00", "\udbff", "\udfff"], k=draw.randint(0, 8)))
        formed = well_formed(text)
        formed.encode("utf-8")
        assert well_formed(formed) is formed
        sound = [c for c in text if not "\ud800" <= c <= "\udfff"]
        assert [c for c in formed if c in sound] == [c for c in sound if c in formed]
        # A pair is one character, each of the others one too.
        pairs = sum("\ud800" <= a <= "\udbff" and "\udc00" <= b <= "\udfff" for a, b in zip(text, text[1:]))
        assert len(formed) == len(text) - pairs


def prepared(path, cache, tokenizer):
    fields = {"data.source": str(path), "data.tokenizer": tokenizer, "data.vocab_size": 270, "data.cache_dir": str(cache)}
    return data.prepare(tiny(**fields, **{"data.seq_len": 4, "data.batch_size": 1}).data, seed=0)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_half_a_surrogate_pair_in_json_is_trained_on_as_a_replacement_character(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"Story {i}. The cat sat on the mat and was happy."}) for i in range(400)]
    lines[7] = '{"text": "cut in half \\ud83d here"}'
    path.write_text("\n".join(lines) + "\n")
    made = prepared(path, tmp_path, tokenizer)
    starts, ends = [0, *made.train.document_ends], made.train.document_ends
    assert made.tokenizer.decode(made.train.tokens[starts[6] : ends[6] - 1]) == "cut in half \ufffd here"
    assert made.train.document_bytes[6] == len("cut in half \ufffd here".encode())


def test_rows_without_text_are_left_out_and_counted_in_every_format(tmp_path, capsys):
    texts = ["one", "", None, "\t", "two", None, None, "three"]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name in ("a.parquet", "a.jsonl"):
        for _ in range(2):  # the second time from the cache
            made = prepared(tmp_path / name, tmp_path / "cache", "bytes")
            assert made.train.left_out == {readers.NULL: 3, readers.BLANK: 2}
            assert "training documents without text were left out (2 blank, 3 null)" in capsys.readouterr().err
            assert made.record["left_out"] == made.train.left_out
            assert len(made.train.document_ends) + len(made.validation.document_ends) == 3


def test_a_byte_order_mark_begins_a_file_and_is_a_character_anywhere_else(tmp_path, capsys):
    texts = ["\ufeffone of many", "two\ufeff of many", *(f"document {number}" for number in range(40))]
    separator = "<|endoftext|>"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text(separator.join(texts), encoding="utf-8-sig")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8-sig")
    for name in ("x.txt", "x.jsonl", "x.parquet"):
        for _ in range(2):  # from the text, then from the cache
            made = prepared(tmp_path / name, tmp_path, "bytes")
            assert made.tokenizer.decode(made.train.tokens[: made.train.document_ends[0] - 1]) == texts[0], name
            assert made.train.marked == 1  # the second document is held out
            said = capsys.readouterr().err
            assert "data: 1 training documents have a byte order mark (U+FEFF) inside, which is kept" in said
            assert "data: 1 validation documents have a byte order mark" in said


def test_texts_of_white_space_and_empty_files_are_counted_too(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>\n<|endoftext|>  <|endoftext|>two<|endoftext|>\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").touch()
    left_out = Counter()
    source = sources.open_source(str(tmp_path), revision="", toy_documents=1)
    assert [piece.text for piece in source.train.pieces(left_out)] == ["one", "two"]
    assert left_out == {readers.BLANK: 3, readers.EMPTY_FILE: 1}


class Rows:
    """A split of the library ``datasets``, as far as it is used."""

    column_names = ("text",)

    def __init__(self, texts):
        self.texts = texts

    def select_columns(self, names):
        return self

    def iter(self, batch_size):
        yield {"text": self.texts}


def test_rows_of_the_hub_without_text_are_left_out_too(monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda name, revision: "0" * 40)
    monkeypatch.setattr(hub, "load", lambda name, revision: {"train": Rows(["one", None, "two", ""])})
    left_out = Counter()
    source = sources.open_source("some/stories", revision="", toy_documents=1)
    assert [piece.text for piece in source.train.pieces(left_out)] == ["one", "two"]
    assert left_out == {readers.NULL: 1, readers.BLANK: 1}
    monkeypatch.setattr(hub, "load", lambda name, revision: {"train": Rows([1, 2])})
    with pytest.raises(UserError, match="holds int, not strings"):
        list(sources.open_source("some/stories", revision="", toy_documents=1).train.documents())


@pytest.mark.parametrize(
    "kind",
    ["string", "large_string", "string_view", "dictionary"],
)
def test_every_form_of_a_column_of_strings_is_read(tmp_path, kind):
    types = {
        "string": pyarrow.string(),
        "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    texts = ["one", None, "zwei é", "one", "😀"] * 700  # more rows than a batch has
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).cast(types[kind])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert str(pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type) == str(types[kind])
    source = sources.open_source(str(tmp_path / "a.parquet"), revision="", toy_documents=1)
    assert list(source.train.documents()) == [text for text in texts if text]


def test_a_column_without_any_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds no text|too few documents"):
        prepared(tmp_path / "a.parquet", tmp_path / "cache", "bytes")


def test_a_number_beside_the_text_may_have_any_length(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": ' + "9" * 10_000 + ', "text": "one"}\n{"text": "two", "x": -1.5e999}')
    source = sources.open_source(str(tmp_path / "a.jsonl"), revision="", toy_documents=1)
    assert list(source.train.documents()) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": 5}')
    with pytest.raises(UserError, match="is not a string"):
        list(sources.open_source(str(tmp_path / "a.jsonl"), revision="", toy_documents=1).train.documents())


@pytest.mark.parametrize("text", ["a prompt \udcff", "\ud83d", "😀 \ud83d\ude00 \udc00"])
def test_every_tokenizer_takes_any_text(text):
    expected = well_formed(text)
    for tokenizer in (BytesTokenizer(), train_bpe([text, "words and 😀"], 270)):
        assert tokenizer.decode(tokenizer.encode(text)) == expected
        [ids] = tokenizer.encode_batch([text])
        assert ids.tolist() == tokenizer.encode(text) == tokenizer.encode(expected)
        assert tokenizer.decode(data.prompt_tokens(tokenizer, text)) == expected
