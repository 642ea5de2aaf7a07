"""The cache of tokens holds what the text says, whoever writes it, is killed, races or damages it."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data import atomic
from seqmodels.data.text import shards, sources, toy
from seqmodels.data.text.readers import Piece
from seqmodels.data.text.shards import cached_tokens
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import BytesTokenizer
from seqmodels.errors import UserError
from tests.places import OF_ANOTHER_KIND, in_its_place

REPOSITORY = Path(__file__).parents[3]
TEXTS = ["one", "zwei", "trois é", "x" * 1000]


def split_of(texts, name="test"):
    return Split(documents=lambda: iter(texts), fingerprint={"name": name}, text_bytes=lambda: 1000)


def unread(name="test"):
    def documents():
        raise AssertionError("the cache has these tokens; the text must not be read")

    return Split(documents=documents, fingerprint={"name": name}, text_bytes=lambda: 1000)


def tokens_of(texts):
    return [i for text in texts for i in [*text.encode(), 256]]


def entries(cache):
    return sorted(path for path in (cache / "tokens").iterdir() if ".building." not in path.name)


def test_tokens_ends_and_bytes(tmp_path, monkeypatch):
    for batch_characters in (1, 5, 1 << 20):
        monkeypatch.setattr(shards, "_BATCH_CHARACTERS", batch_characters)
        stream = cached_tokens(tmp_path / str(batch_characters), split_of(TEXTS), BytesTokenizer(), label="test")
        assert stream.tokens.tolist() == tokens_of(TEXTS)
        assert stream.tokens.dtype == np.uint16 and not stream.tokens.flags.writeable
        assert stream.document_ends.tolist() == np.cumsum([len(t.encode()) + 1 for t in TEXTS]).tolist()
        assert stream.document_bytes.tolist() == [len(t.encode()) for t in TEXTS]
        assert stream.bytes_per_token == (len(stream) - len(TEXTS)) / len(stream)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    class Large(BytesTokenizer):
        vocab_size, end_of_text = 100_001, 100_000

    stream = cached_tokens(tmp_path, split_of(TEXTS), Large(), label="test")
    assert stream.tokens.dtype == np.uint32 and stream.tokens[-1] == 100_000


def test_the_second_time_the_text_is_not_read(tmp_path):
    first = cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    again = cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test")
    assert again.tokens.tolist() == first.tokens.tolist()


def test_another_text_has_another_entry(tmp_path):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    other = cached_tokens(tmp_path, split_of(["other"], "other"), BytesTokenizer(), label="test")
    assert other.tokens.tolist() == tokens_of(["other"])
    assert len(entries(tmp_path)) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["tokens.bin", "document_ends.bin", "document_bytes.bin", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_damaged_entry_is_made_again_with_one_line_of_notice(tmp_path, capsys, file, damage):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    (entry,) = entries(tmp_path)
    damage(entry / file)
    capsys.readouterr()
    stream = cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    assert stream.tokens.tolist() == tokens_of(TEXTS)
    notices = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(notices) == 1 and str(entry) in notices[0]
    assert entries(tmp_path) == [entry] and len(list((tmp_path / "tokens").iterdir())) == 1
    assert cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
@pytest.mark.parametrize("place", ["tokens.bin", "document_ends.bin", "manifest.json", ""])
def test_what_stands_in_a_file_s_or_an_entry_s_place_is_replaced(tmp_path, kind, place):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    (entry,) = entries(tmp_path)
    OF_ANOTHER_KIND[kind](entry / place)
    assert cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)
    assert cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)
    assert len(list((tmp_path / "tokens").iterdir())) == 1


@pytest.mark.parametrize(
    "totals",
    [{"dtype": "<u1", "tokens": 2 * len(tokens_of(TEXTS))}, {"dtype": "<f2"}, {"dtype": "O"}, {"dtype": [["a", "<u2"]]},
     {"tokens": -1}, {"tokens": 2**63}, {"tokens": 0}, {"documents": 2.5}, {"documents": None}],
)  # fmt: skip
def test_a_manifest_of_other_numbers_is_not_believed_though_its_digest_is_right(tmp_path, totals):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    (entry,) = entries(tmp_path)
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["totals"] |= totals
    del manifest["digest"]
    shards._write_manifest(entry, manifest)
    assert cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)


@pytest.mark.parametrize("ends", [[-5, 9, 18, 1019], [9, 4, 18, 1019], [4, 4, 18, 1019], [0, 9, 18, 1019]])
def test_documents_that_do_not_follow_each_other_are_not_believed_though_the_digests_are_right(tmp_path, ends):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    (entry,) = entries(tmp_path)
    ends = np.array(ends, "<i8")
    assert ends[-1] == len(tokens_of(TEXTS))
    (entry / "document_ends.bin").write_bytes(ends.tobytes())
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["digests"]["document_ends.bin"] = [shards._digest(ends.tobytes())]
    del manifest["digest"]
    shards._write_manifest(entry, manifest)
    stream = cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    assert stream.document_ends.tolist() == np.cumsum([len(text.encode()) + 1 for text in TEXTS]).tolist()


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    in_its_place(os.mkfifo)(tmp_path / "locks" / f"{entry.name}.lock")
    assert cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)


@pytest.mark.parametrize(
    "change", [lambda path: path.write_text("another\n"), lambda path: path.open("a").write("more"), Path.unlink]
)
def test_tokens_of_a_file_that_is_changed_meanwhile_are_not_kept(tmp_path, monkeypatch, change):
    path = tmp_path / "text.txt"
    path.write_text("one<|endoftext|>two")
    split = sources.open_source(str(path), revision="", toy_documents=1).train
    write = shards._write

    def slow(*args, **options):
        written = write(*args, **options)
        change(path)
        return written

    monkeypatch.setattr(shards, "_write", slow)
    with pytest.raises(UserError, match=r"text.txt' was changed while it was read"):
        cached_tokens(tmp_path / "cache", split, BytesTokenizer(), label="test")
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write in .*file.*data\.cache_dir"):
        cached_tokens(tmp_path / "file", split_of(TEXTS), BytesTokenizer(), label="test")


def test_a_full_disk_names_the_cache_and_leaves_nothing(tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "open", FullDisk, raising=False)
    with pytest.raises(UserError, match=r"no space left in .*data\.cache_dir") as error:
        cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    assert str(tmp_path) in str(error.value)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_split_without_text(tmp_path):
    with pytest.raises(UserError, match="the training split of X holds no text"):
        cached_tokens(tmp_path, split_of([]), BytesTokenizer(), label="training split of X")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_an_error_in_the_text_leaves_nothing(tmp_path):
    def documents():
        yield "x" * (3 << 20)
        raise UserError("half of it is missing")

    split = Split(documents=documents, fingerprint={"name": "test"}, text_bytes=lambda: 10)
    with pytest.raises(UserError, match="half of it is missing"):
        cached_tokens(tmp_path, split, BytesTokenizer(), label="test")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("age", [-10 * 365, 0, 30])
def test_what_a_writer_left_is_removed_when_it_has_ended_whatever_the_clock_says(tmp_path, age):
    folders = {key: tmp_path / "tokens" / f"{key}.building.1-ab" for key in ("ended", "at work", "unknown")}
    locks = {key: tmp_path / "locks" / f"{folder.name}.lock" for key, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"half")
        then = time.time() - age * 24 * 3600
        os.utime(folder, (then, then))
    locks["ended"].parent.mkdir()
    locks["ended"].touch()
    with atomic.lock(locks["at work"], waiting=None) as is_held:
        assert is_held
        cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
        assert [key for key, folder in folders.items() if folder.exists()] == ["at work", "unknown"]
    cached_tokens(tmp_path, split_of(["other"], "other"), BytesTokenizer(), label="test")
    assert [key for key, folder in folders.items() if folder.exists()] == ["unknown"]
    assert not any(".building." in path.name for path in (tmp_path / "locks").iterdir())


@pytest.mark.parametrize("other", ["the same text", "another text"])
def test_a_builder_whose_key_s_lock_is_gone_is_left_alone(tmp_path, other):
    """Somebody has emptied the folder of locks: another process may now build, but removes nothing."""

    def documents():
        yield TEXTS[0]
        (entry_lock,) = (path for path in (tmp_path / "locks").iterdir() if ".building." not in path.name)
        entry_lock.unlink()
        texts, name = (TEXTS, "test") if other == "the same text" else (["other"], "other")
        assert cached_tokens(tmp_path, split_of(texts, name), BytesTokenizer(), label=other).tokens.tolist() == tokens_of(texts)
        yield from TEXTS[1:]

    split = Split(documents=documents, fingerprint={"name": "test"}, text_bytes=lambda: 1000)
    assert cached_tokens(tmp_path, split, BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)
    assert not list((tmp_path / "tokens").glob("*.building.*"))
    assert cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(TEXTS)


@pytest.mark.parametrize("batch_characters", [1, 7, 1 << 20])
def test_a_document_in_pieces_is_one_document(tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", batch_characters)
    cut = [["one"], ["zw", "ei", " é"], ["x"], ["", "y", ""], ["a" * 20, "b" * 20]]
    texts = ["".join(parts) for parts in cut]

    def pieces(left_out):
        for parts in cut:
            for i, part in enumerate(parts):
                yield Piece(part, ends=i == len(parts) - 1)

    split = Split(documents=lambda: iter(texts), fingerprint={}, text_bytes=lambda: 10, in_pieces=pieces)
    stream = cached_tokens(tmp_path, split, BytesTokenizer(), label="test")
    assert stream.tokens.tolist() == tokens_of(texts)
    assert stream.document_ends.tolist() == np.cumsum([len(t.encode()) + 1 for t in texts]).tolist()
    assert stream.document_bytes.tolist() == [len(t.encode()) for t in texts]


# -- damage -----------------------------------------------------------------------------------------------------


def long_split():
    return split_of([str(i) * 50 for i in range(2000)], "long")


def test_no_flipped_byte_passes_silently(tmp_path, monkeypatch, capsys):
    """60 flips at random places of all files of an entry: 47 passed when samples of the shards were compared."""
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 1 << 12)
    expected = cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test")
    expected = {name: np.array(getattr(expected, name)) for name in ("tokens", "document_ends", "document_bytes")}
    [entry] = entries(tmp_path)
    files, description = sorted(entry.iterdir()), json.loads((entry / "manifest.json").read_bytes())["description"]
    assert shards._opened(entry, description, 257) is not None
    ends = np.cumsum([file.stat().st_size for file in files])
    draw = random.Random(0)
    for _ in range(60):
        place = draw.randrange(int(ends[-1]))
        which = int(np.searchsorted(ends, place, side="right"))
        whole = files[which].read_bytes()
        content = bytearray(whole)
        content[place - int(ends[which])] ^= 1 << draw.randrange(8)
        files[which].write_bytes(content)
        assert shards._opened(entry, description, 257, notify=True) is None, files[which].name
        assert "are damaged" in capsys.readouterr().err
        files[which].write_bytes(whole)
    flip(entry / "tokens.bin")
    found = cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test")
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(found, name), values)


def test_an_entry_of_another_text_under_this_one_s_name_is_not_used(tmp_path, capsys):
    for name in ("test", "other"):
        cached_tokens(tmp_path / name, split_of([name], name), BytesTokenizer(), label=name)
    [entry], [other] = entries(tmp_path / "test"), entries(tmp_path / "other")
    shutil.rmtree(entry)
    other.rename(entry)
    assert cached_tokens(tmp_path / "test", split_of(["test"]), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(
        ["test"]
    )
    assert "is of another text or tokenizer" in capsys.readouterr().err


def test_a_large_shard_is_verified_as_it_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 1 << 12)
    expected = np.array(cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test").tokens)
    monkeypatch.setattr(shards, "_VERIFIED_AT_ONCE_BYTES", 0)
    [entry] = entries(tmp_path)
    size, per_block = len(expected), (1 << 12) // 2
    tokens = cached_tokens(tmp_path, unread("long"), BytesTokenizer(), label="test").tokens
    assert len(tokens) == size and tokens.dtype == np.uint16
    for key in (slice(5, 900), slice(-3, None), slice(None, None, -7), slice(9, 9), 0, -1):
        np.testing.assert_array_equal(tokens[key], expected[key])
    np.testing.assert_array_equal(np.asarray(tokens), expected)
    with pytest.raises(IndexError):
        tokens[size]

    flip(entry / "tokens.bin")  # in the last block
    tokens = cached_tokens(tmp_path, unread("long"), BytesTokenizer(), label="test").tokens
    np.testing.assert_array_equal(tokens[: size - per_block], expected[: size - per_block])
    for read in (lambda: tokens[-1], lambda: tokens[size - 2 : size], lambda: np.asarray(tokens), lambda: tokens[::-9]):
        with pytest.raises(UserError, match=r"are damaged .block \d+ of tokens.bin.*start the same command again") as error:
            read()
        assert "\n" not in str(error.value)
    again = cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test").tokens
    np.testing.assert_array_equal(again, expected)
    assert "making them again" in capsys.readouterr().err


def test_a_damaged_shard_that_cannot_be_replaced_says_so(tmp_path, monkeypatch):
    """The same command would read the same again."""
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 1 << 12)
    cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test")
    monkeypatch.setattr(shards, "_VERIFIED_AT_ONCE_BYTES", 0)
    flip(entries(tmp_path)[0] / "tokens.bin")

    def unlink(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in range(2):
        tokens = cached_tokens(tmp_path, unread("long"), BytesTokenizer(), label="test").tokens
        with pytest.raises(UserError, match=r"damaged .*cannot be replaced there .*read-only.* give another folder") as error:
            tokens[-1]
        assert "same command" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("at_once", [0, 1 << 28])
def test_a_shard_that_is_cut_off_while_it_is_read_ends_no_process(tmp_path, monkeypatch, at_once):
    """A page of a memory map that is behind the file's end is a SIGBUS, and so is one that the disk cannot read."""
    monkeypatch.setattr(shards, "_VERIFIED_AT_ONCE_BYTES", at_once)
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 1 << 12)
    stream = cached_tokens(tmp_path, long_split(), BytesTokenizer(), label="test")
    expected = np.array(stream.tokens)
    [entry] = entries(tmp_path)
    for shard in ("tokens.bin", "document_ends.bin", "document_bytes.bin"):
        os.truncate(entry / shard, 5000)
    assert stream.document_ends[-1] == len(stream) and stream.document_bytes.sum() > 0
    if at_once:
        np.testing.assert_array_equal(stream.tokens, expected)
        return
    np.testing.assert_array_equal(stream.tokens[:2000], expected[:2000])
    with pytest.raises(UserError, match=r"damaged .*cut off meanwhile.; start the same command again") as error:
        stream.tokens[-1]
    assert "\n" not in str(error.value)


def test_an_entry_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as context:
        context.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="cannot read the cached tokens '.*manifest.json': Permission denied"):
            cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test")


@pytest.mark.parametrize("wrong", [257, 1 << 16, -1])
def test_an_id_beyond_the_vocabulary_is_not_cached(tmp_path, wrong):
    class Wrong(BytesTokenizer):
        def encode_batch(self, texts):
            return [np.array([*text.encode(), wrong]) for text in texts]

    with pytest.raises(UserError, match=rf"gives the id {wrong}, which is not in its vocabulary of 257"):
        cached_tokens(tmp_path, split_of(TEXTS), Wrong(), label="test")
    assert list((tmp_path / "tokens").iterdir()) == []


# Real processes: a child runs this file's functions and says on its standard output where it is.

CHILD = """
import sys, time
from seqmodels.data.text import toy
from seqmodels.data.text.shards import cached_tokens
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import BytesTokenizer

cache, role = sys.argv[1:]

def documents():
    yield from toy.stories("train", 300)
    if role == "hangs":
        yield "x" * (5 << 20)  # more than is held back, so that half of the tokens are on the disk
        print("half", flush=True)
        time.sleep(600)

split = Split(documents=documents, fingerprint={"name": "stories"}, text_bytes=lambda: 200_000)
print("ready", flush=True)
if role == "races":
    sys.stdin.readline()
stream = cached_tokens(cache, split, BytesTokenizer(), label="stories")
print(len(stream), int(stream.tokens.sum()), flush=True)
"""


def child(cache, role):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(cache), role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def expected():
    tokens = tokens_of(toy.stories("train", 300))
    return f"{len(tokens)} {sum(tokens)}\n"


def test_a_writer_killed_half_way_leaves_nothing_that_is_believed(tmp_path):
    victim = child(tmp_path, "hangs")
    assert victim.stdout.readline() == "half\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    (left,) = (tmp_path / "tokens").iterdir()
    assert (left / "tokens.bin").stat().st_size > 1 << 20, "it was killed before it wrote anything"
    assert entries(tmp_path) == []
    survivor = child(tmp_path, "goes on")
    assert survivor.communicate()[0] == expected()
    assert survivor.returncode == 0
    assert len(entries(tmp_path)) == 1 and not left.exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_race_all_end_with_a_good_cache(tmp_path, damaged):
    if damaged:
        first = child(tmp_path, "goes on")
        assert first.communicate()[0] == expected()
        truncate(entries(tmp_path)[0] / "tokens.bin")
    racers = [child(tmp_path, "races") for _ in range(3)]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    ended = [racer.communicate() for racer in racers]
    assert [out for out, _ in ended] == [expected()] * 3
    assert sum("tokenising stories" in err for _, err in ended) == 1  # the others waited, or found them there
    assert [racer.returncode for racer in racers] == [0] * 3
    (entry,) = (tmp_path / "tokens").iterdir()
    assert (entry / "manifest.json").exists()
    stream = cached_tokens(tmp_path, unread("stories"), BytesTokenizer(), label="stories")
    assert f"{len(stream)} {int(stream.tokens.sum())}\n" == expected()
