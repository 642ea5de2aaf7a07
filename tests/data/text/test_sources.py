"""Every source gives its documents exactly, and what is wrong with one is a single line that names it."""

import errno
import json
import sys
import time
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from seqmodels.data.text import hub, readers, sources
from seqmodels.errors import UserError

STORIES = ["Once upon a time.\nThe end.", "“It’s late,” said Tim.", " with spaces at both ends ", "café 😀"]


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)
    return path


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_text(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def opened(path):
    return sources.open_source(str(path), revision="", toy_documents=10)


def documents(split):
    return list(split.documents())


@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_json_lines, "a.jsonl"), (write_text, "a.txt")])
def test_a_file_gives_its_documents_exactly_and_again(tmp_path, write, name):
    source = opened(write(tmp_path / name, STORIES))
    assert documents(source.train) == STORIES
    assert documents(source.train) == STORIES
    assert source.validation is None


def test_the_hub_s_folder_of_parquet(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002-ab12.parquet", STORIES[:2])
    write_parquet(tmp_path / "data/train-00001-of-00002-cd34.parquet", STORIES[2:])
    write_parquet(tmp_path / "data/validation-00000-of-00001-ef56.parquet", ["held out"])
    write_text(tmp_path / "TinyStories-train.txt", ["not this one"])
    source = opened(tmp_path)
    assert documents(source.train) == STORIES
    assert documents(source.validation) == ["held out"]


def test_a_folder_of_text_with_the_names_of_the_hub(tmp_path):
    write_text(tmp_path / "TinyStories-train.txt", STORIES)
    write_text(tmp_path / "TinyStories-valid.txt", ["held out"])
    (tmp_path / "README.md").write_text("not a story")
    source = opened(tmp_path)
    assert documents(source.train) == STORIES
    assert documents(source.validation) == ["held out"]
    write_text(tmp_path / "TinyStoriesV2-GPT4-train.txt", STORIES)
    with pytest.raises(UserError, match="both versions"):
        opened(tmp_path)


def test_a_missing_validation_split_is_every_twentieth_document(tmp_path):
    texts = [f"story {i}" for i in range(50)]
    source = sources.with_validation(opened(write_json_lines(tmp_path / "a.jsonl", texts)))
    assert documents(source.validation) == ["story 1", "story 21", "story 41"]
    assert documents(source.train) == [text for text in texts if text not in documents(source.validation)]
    assert source.train.fingerprint != source.validation.fingerprint


def test_a_source_without_training_text_cannot_train(tmp_path):
    write_text(tmp_path / "validation.txt", STORIES)
    assert documents(opened(tmp_path).validation) == STORIES
    with pytest.raises(UserError, match="no training split"):
        sources.with_validation(opened(tmp_path))


def test_damaged_text_is_repaired_on_the_way(tmp_path):
    damaged = [s.replace("\n", "\n\n").encode().decode("cp1252", errors="ignore") for s in STORIES]
    source = opened(write_parquet(tmp_path / "a.parquet", [*damaged, "sound\n\ntext"]))
    # The first story has nothing but ASCII: nothing shows that its blank line is of the damage.
    assert documents(source.train) == [damaged[0], *STORIES[1:], "sound\n\ntext"]


def test_the_hub_s_own_files_lose_all_blank_lines(tmp_path):
    path = tmp_path / "data/validation-00000-of-00001-869c898b519ad725.parquet"
    write_parquet(path, ["plain\n\ntext", "itâ€™s\n\nhere"])
    assert documents(opened(tmp_path).validation) == ["plain\ntext", "it’s\nhere"]


def test_documents_of_white_space_are_left_out(tmp_path):
    source = opened(write_json_lines(tmp_path / "a.jsonl", ["one", "", " \n", "two"]))
    assert documents(source.train) == ["one", "two"]
    source = opened(write_text(tmp_path / "a.txt", ["one", "", "two", ""]))
    assert documents(source.train) == ["one", "two"]


def test_separators_and_characters_across_the_blocks_of_a_long_text(tmp_path, monkeypatch):
    texts = ["é" * 10 + f" story {i}" for i in range(40)]
    path = write_text(tmp_path / "a.txt", texts)
    for block in (1, 2, 3, 7, 64, 10_000):
        monkeypatch.setattr(readers, "_CHUNK", block)
        assert documents(opened(path).train) == texts


def test_a_separator_in_two_blocks_is_found_before_a_long_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_PIECE", 30)
    texts = ["x" * length for length in range(18, 61)]
    path = tmp_path / "a.txt"
    path.write_text(readers.SEPARATOR.join(texts))
    for block in range(1, 50):
        monkeypatch.setattr(readers, "_CHUNK", block)
        assert documents(opened(path).train) == texts


def test_a_mark_of_byte_order_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two", encoding="utf-8-sig")
    assert documents(opened(tmp_path / "a.txt").train) == ["one", "two"]


@pytest.mark.parametrize("space", ["\n", "\n\n", " ", "\r\n", "  \n "])
def test_a_long_text_is_one_document_in_bounded_pieces_cut_before_white_space(tmp_path, monkeypatch, space):
    monkeypatch.setattr(readers, "LONGEST_PIECE", 100)
    text = space.join(f"line-{i}-of-a-play" for i in range(200))
    path = tmp_path / "play.txt"
    path.write_bytes(f"\n{text}\r\n".encode())
    for block in (10, 1000, 1 << 20):
        monkeypatch.setattr(readers, "_CHUNK", block)
        train = opened(path).train
        assert documents(train) == [text]
        pieces = list(train.pieces(Counter()))
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(40 < len(piece.text) <= 100 for piece in pieces[:-1])
        assert all(piece.text.startswith(space) for piece in pieces[1:])


def test_memory_stays_bounded_on_one_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_PIECE", 1000)
    path = tmp_path / "line.txt"
    path.write_text("x" * 12_345)
    assert [len(piece.text) for piece in opened(path).train.pieces(Counter())] == [1000] * 12 + [345]


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write_text(tmp_path / "a.txt", STORIES)
    before = opened(path).train.fingerprint
    assert opened(path).train.fingerprint == before
    write_text(path, STORIES[::-1])
    assert opened(path).train.fingerprint != before


def test_the_toy_has_two_splits_that_do_not_depend_on_each_other():
    small = sources.open_source("toy", revision="", toy_documents=10)
    large = sources.open_source("toy", revision="", toy_documents=20)
    assert documents(large.train)[:10] == documents(small.train)
    assert documents(large.validation) == documents(small.validation)
    assert large.train.fingerprint != small.train.fingerprint


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"fine until here \xff\xfe", "not UTF-8 text .see byte 16"),
        ("a.txt", b"text\x00binary", "not UTF-8 text .see byte 4"),
        ("a.txt", b"half a character \xe2\x80", "not UTF-8 text"),
        ("photo.png", b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2 of"),
        ("a.jsonl", b'{"story": "no text"}\n', "line 1 of .* field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "not a string"),
        ("a.jsonl", b'["text"]\n', "line 1 of"),
        ("a.jsonl", b"\x89PNG\r\n", "not UTF-8 text .see byte 0"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "not UTF-8 text .see byte 30"),
        ("a.jsonl", b'{"text": "one\ttwo"}\n', "line 1 of .*Invalid control character"),
        ("a.jsonl", b'{"text": "one", "text": "two"}\n', "line 1 of .*'text' is there twice"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 99_999, "line 1 of .*nested too deep"),
        ("a.json", b'[{"text": "one"}, {"text": "two"}]', "line 1 of .*it is a list"),
        ("a.ndjson", b'{"content": "one"}\n', "line 1 of .*it has 'content'"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        ("a.txt", "one".encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        ("a.txt.gz", b"\x1f\x8b\x08", "is compressed.*unpack it"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x04", "is compressed.*unpack it"),
        ("a.csv", b'text\n"one, two\nthree"\n', "is a table.*save its texts as .parquet or .jsonl"),
        ("data-00000-of-00001.arrow", b"ARROW1\0\0", "save_to_disk.*to_parquet"),
        ("a.parquet", b"", "is empty"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "not a readable parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents(opened(tmp_path / name).train)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_json_line_beyond_the_limit_is_said_to_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 40)
    write_json_lines(tmp_path / "a.jsonl", ["short", "long " * 10])
    with pytest.raises(UserError, match="line 2 of .* is longer than"):
        documents(opened(tmp_path / "a.jsonl").train)


def test_json_lines_in_the_other_ways_of_writing_them(tmp_path):
    text = "".join(json.dumps({"text": story}) + "\r\n\r\n" for story in STORIES)
    for name in ("a.ndjson", "A.JSONL"):
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        assert documents(opened(tmp_path / name).train) == STORIES


@pytest.mark.parametrize(
    "error, message",
    [
        (pyarrow.ArrowMemoryError("malloc of size 9 failed"), "cannot read .*out of memory"),
        (OSError(errno.EIO, "Input/output error"), "cannot read .*input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot read .*permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "cannot read .*No such file"),
        (pyarrow.ArrowInvalid("Not a Parquet file"), "not a readable parquet file.*fetch it again"),
    ],
)
def test_a_parquet_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error, message):
    path = write_parquet(tmp_path / "a.parquet", STORIES)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    with pytest.raises(UserError, match=message) as raised:
        documents(opened(path).train)
    assert ("fetch it again" in str(raised.value)) == isinstance(error, pyarrow.ArrowInvalid)


def test_parquet_without_text_names_the_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", STORIES, column="story")
    with pytest.raises(UserError, match="no column 'text' .its columns: story"):
        documents(opened(path).train)
    path = write_parquet(tmp_path / "a.parquet", [1, 2, 3])
    with pytest.raises(UserError, match="holds int64, not strings"):
        documents(opened(path).train)
    for kind in ([["one"]], [{"inner": "one"}], [b"one"]):
        with pytest.raises(UserError, match="holds (list|struct|binary).*, not strings"):
            documents(opened(write_parquet(path, kind)).train)
    twice = pyarrow.Table.from_arrays([pyarrow.array(STORIES), pyarrow.array(STORIES[::-1])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match="has 2 columns 'text'"):
        documents(opened(path).train)


def test_a_truncated_or_overwritten_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [f"story {i} " * 50 for i in range(5000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable parquet"):
        documents(opened(path).train)
    path.write_bytes(whole[:100] + b"\xff" * 2000 + whole[2100:])
    with pytest.raises(UserError, match="damaged|not a readable"):
        documents(opened(path).train)


def test_sources_that_are_not_there(tmp_path):
    for name in ("no_such_file.txt", "/no/such/folder", "./owner/name", "a/b/c", "data/train.parquet", ""):
        with pytest.raises(UserError, match="does not exist"):
            opened(name)
    with pytest.raises(UserError, match="'~nobody-of-that-name/text.txt': there is no home folder of that name"):
        opened("~nobody-of-that-name/text.txt")
    with pytest.raises(UserError, match="cannot read .*too long"):
        opened("a text in the place of a name " * 200)
    with pytest.raises(UserError, match="holds no .parquet"):
        opened(tmp_path)


def test_without_a_network_the_hub_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub, "_import_datasets", None)  # which alone takes longer
    hub.load.cache_clear()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot reach.*local copy.*'toy'") as error:
        source = sources.open_source(hub.TINYSTORIES, revision=hub.TINYSTORIES_REVISION, toy_documents=1)
        documents(source.train)
    assert time.monotonic() - start < hub._SECONDS_TO_REACH_THE_HUB + 2
    assert "\n" not in str(error.value)


class FakeHub:
    """``datasets`` as far as we use it, with what it was asked for."""

    def __init__(self, splits):
        self.splits, self.asked = splits, []

    def load_dataset(self, name, revision):
        self.asked.append((name, revision))
        return self.splits


@pytest.fixture
def fake_hub(monkeypatch):
    import datasets

    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["itâ€™s\n\nhere", "plain\n\ntext", None, ""], "id": [0, 1, 2, 3]}),
        validation=datasets.Dataset.from_dict({"text": ["held out"], "id": [0]}),
    )
    fake = FakeHub(splits)
    hub.load.cache_clear()
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub, "commit", lambda name, revision: revision or "c" * 40)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    yield fake
    hub.load.cache_clear()


def test_the_hub_is_read_at_the_pinned_revision_and_repaired(fake_hub):
    source = sources.open_source(hub.TINYSTORIES, revision=hub.TINYSTORIES_REVISION, toy_documents=1)
    assert fake_hub.asked == [], "a run whose tokens are cached must not need the hub"
    assert documents(source.train) == ["it’s\nhere", "plain\ntext"]
    assert documents(source.validation) == ["held out"]
    assert fake_hub.asked == [(hub.TINYSTORIES, hub.TINYSTORIES_REVISION)]


def test_another_hub_id_is_read_at_its_newest(fake_hub):
    source = sources.open_source("some/stories", revision=hub.TINYSTORIES_REVISION, toy_documents=1)
    assert documents(source.train) == ["it’s\nhere", "plain\n\ntext"]
    assert fake_hub.asked == [("some/stories", "c" * 40)]
    del fake_hub.splits["validation"]
    hub.load.cache_clear()
    assert sources.open_source("some/stories", revision="", toy_documents=1).validation is None


def test_what_the_hub_refuses_is_one_line(fake_hub, monkeypatch):
    def refuse(name, revision):
        raise RuntimeError("disk quota exceeded\nand a second line")

    monkeypatch.setattr(fake_hub, "load_dataset", refuse)
    with pytest.raises(UserError, match="cannot be loaded: disk quota exceeded$"):
        sources.open_source("some/stories", revision="", toy_documents=1)


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_that_expands_beyond_all_text_is_not_read(tmp_path, monkeypatch, dictionary):
    texts = ["a" * (1 << 21), *STORIES, "b" * (1 << 21)]
    for codec in ("zstd", "gzip", "snappy"):
        path = tmp_path / f"{codec}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression=codec, use_dictionary=dictionary)
        assert documents(opened(path).train) == texts
        with monkeypatch.context() as patch:
            patch.setattr(readers, "_MOST_PAGE", 1 << 20)
            patch.setattr(readers, "_MOST_EXPANSION", 15)  # snappy: 21
            with pytest.raises(UserError, match=r"parquet' is not read: [\d,]+ bytes of it expand to [24].0 MiB$"):
                list(opened(path).train.documents())
        with monkeypatch.context() as patch:
            patch.setattr(readers, "_MOST_BATCH", 1)
            assert documents(opened(path).train) == texts, "a row at a time"


@pytest.mark.parametrize("name", ["https://example.org/a.txt", "file:///tmp/a.txt", "s3://bucket/a", "hf://datasets/a/b"])
def test_an_address_is_said_to_be_one(name):
    with pytest.raises(UserError, match="is an address, from which nothing is read: fetch it"):
        sources.open_source(name, revision="", toy_documents=1)


@pytest.mark.parametrize(
    "content, is_said",
    [
        ('{"text": "a b c"}\n' * 9, True), (('\ufeff{"text": "a", "id": ' + "9" * 5000 + "}\n"), True), ('{"text": "a"}', True),
        ('{"text": 1}\n' * 9, False), ('"text"\n' * 9, False), ("{text}\n" * 9, False), ('{"text": "a"}\nand more\n', False),
        ("[" * 9000, False), ("", False), ("\xff", False),
    ],
    ids=["lines", "long number", "one", "number", "texts", "braces", "first line", "deep", "empty", "latin 1"],
)  # fmt: skip
def test_plain_text_that_is_json_lines_is_said(tmp_path, content, is_said):
    note = noted(tmp_path, content, "latin-1" if content == "\xff" else "utf-8")
    assert bool(note) == is_said and (not is_said or "with the ending .jsonl" in note)


def noted(tmp_path, content, encoding="utf-8"):
    (tmp_path / "rows.txt").write_text(content, encoding=encoding, newline="")
    source = sources.open_source(str(tmp_path / "rows.txt"), revision="", toy_documents=1)
    return sources.plain_text_note(sources.replace(source, validation=source.train))


@pytest.mark.parametrize(
    "content, names",
    [
        ("text,label\r\nOnce upon a time,1\r\n\"He said: \"\"no\"\", and\nleft\",0\r\n", "'text', 'label'"),
        ("\ufeffid\ttext\n1\tOnce, upon\n2\ta time\n", "'id', 'text'"), ("a;b;c;d\n1;2;3;4", "'a', 'b', 'c', ..."),
        (",text,label\n0,Once,1\n", "'', 'text', 'label'"), ("id,text\n" + f'1,"{"word " * 9000}"\n' * 3, "'id', 'text'"),
        ("Well, he said,\nno, she said,\n", None), ("Once upon a time,\nthere was a cat\n", None), ("a,b\n1,2,3\n", None),
        ("a,b\n", None), ("a,a\n1,2\n", None), ('a,b\n1,"2\n', None), ("Rain; wind\nSnow; sun\n", None), ("", None),
    ],
    ids=["commas", "tabs", "semicolons", "numbered", "long", "prose", "a comma", "ragged", "row", "twice", "quote", "list", "empty"],
)  # fmt: skip
def test_plain_text_that_is_a_table_is_said(tmp_path, content, names):
    note = noted(tmp_path, content)
    assert (note is None) == (names is None) and (
        names is None or f"looks like a table ({names}) and is read as plain text" in note
    )
