"""The cache of tokens holds what the text says, whoever writes it, is killed, races or damages it."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data.text import shards, toy
from seqmodels.data.text.shards import cached_tokens
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import BytesTokenizer
from seqmodels.errors import UserError

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
        stream = cached_tokens(
            tmp_path / str(batch_characters), split_of(TEXTS), BytesTokenizer(), label="test"
        )
        assert stream.tokens.tolist() == tokens_of(TEXTS)
        assert stream.tokens.dtype == np.uint16 and isinstance(stream.tokens, np.memmap)
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
    assert cached_tokens(tmp_path, unread(), BytesTokenizer(), label="test").tokens.tolist() == tokens_of(
        TEXTS
    )


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


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path):
    old, new = (tmp_path / "tokens" / f"key.building.{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    cached_tokens(tmp_path, split_of(TEXTS), BytesTokenizer(), label="test")
    assert not old.exists() and new.exists()


# Real processes: a child runs this file's functions and says on its standard output where it is.

CHILD = """
import sys, time
from seqmodels.data import toy
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


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_race_all_end_with_a_good_cache(tmp_path, damaged):
    if damaged:
        first = child(tmp_path, "goes on")
        assert first.communicate()[0] == expected()
        truncate(entries(tmp_path)[0] / "tokens.bin")
    racers = [child(tmp_path, "races") for _ in range(4)]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert [racer.communicate()[0] for racer in racers] == [expected()] * 4
    assert [racer.returncode for racer in racers] == [0] * 4
    (entry,) = (tmp_path / "tokens").iterdir()
    assert (entry / "manifest.json").exists()
    stream = cached_tokens(tmp_path, unread("stories"), BytesTokenizer(), label="stories")
    assert f"{len(stream)} {int(stream.tokens.sum())}\n" == expected()
