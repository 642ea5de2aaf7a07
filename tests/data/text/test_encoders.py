"""Several processes make the numbers that one makes, in its order, and end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data.text import encoders, shards, toy
from seqmodels.data.text.readers import Piece
from seqmodels.data.text.shards import cached_tokens
from seqmodels.data.text.sources import Split
from seqmodels.data.text.tokenizer import BytesTokenizer, train_bpe
from seqmodels.errors import UserError

STORIES = [*toy.stories("train", 300), "é \U0001f600 größer\n\n", "a<|endoftext|>b", "x" * 3000, "日本語"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(STORIES[:100], 400)


def batches(count):
    """Of unequal sizes, of documents in one or several pieces."""
    cut = [piece for text in STORIES for piece in (Piece(text[:40], False), Piece(text[40:], True))]
    return [list(part) for part in np.array_split(np.array(cut, object), count)]


def pieces_of(batch):
    return [Piece(*piece) for piece in batch]


@pytest.mark.parametrize("count", [1, 7])
def test_the_numbers_of_one_process(tokenizer, count):
    given = [pieces_of(batch) for batch in batches(count)]
    one = list(encoders.encoded(given, tokenizer, processes=0))
    several = list(encoders.encoded(given, tokenizer, processes=3))
    assert len(one) == len(several) == count
    for here, there in zip(one, several):
        for name in encoders.Encoded._fields:
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
            assert getattr(here, name).dtype == getattr(there, name).dtype


def test_the_files_of_a_cache_are_those_of_one_process(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 20_000)
    split = Split(documents=lambda: iter(STORIES), fingerprint={}, text_bytes=lambda: 1 << 20)
    for name, number in (("one", 0), ("several", 2)):
        monkeypatch.setattr(encoders, "processes_for", lambda *_, number=number: number)
        cached_tokens(tmp_path / name, split, tokenizer, label="test")
    [one], [several] = ((tmp_path / name / "tokens").iterdir() for name in ("one", "several"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in several.iterdir()
    }


def test_memory_is_bounded_by_the_processes(tokenizer):
    taken = []

    def given():
        for batch in batches(12):
            taken.append(len(taken))
            yield pieces_of(batch)

    made = encoders.encoded(given(), tokenizer, processes=2)
    for number, _ in enumerate(made):
        assert len(taken) <= number + 3


def test_how_many_processes_are_worth_it(tokenizer, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert encoders.processes_for(1 << 24, tokenizer) == 0
    assert encoders.processes_for(1 << 28, tokenizer) == 8
    assert encoders.processes_for(1 << 40, tokenizer) == encoders.MOST_PROCESSES
    assert encoders.processes_for(1 << 40, BytesTokenizer()) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert encoders.processes_for(1 << 40, tokenizer) == 0


def test_a_mistake_in_a_child_is_one_line(tokenizer, monkeypatch):
    wrong = "from seqmodels.errors import UserError\ndef wrong(*_): raise UserError('no such id')\n"
    imports, serve = encoders._PROGRAM.split(";")
    monkeypatch.setattr(encoders, "_PROGRAM", f"{wrong}{imports}\nencoders.encode = wrong\n{serve.strip()}")
    with pytest.raises(UserError, match="^no such id$"):
        list(encoders.encoded([pieces_of(batch) for batch in batches(3)], tokenizer, processes=1))
    monkeypatch.setattr(encoders, "_PROGRAM", "import sys; sys.exit(3)")
    with pytest.raises(UserError, match="has ended .status 3"):
        list(encoders.encoded([pieces_of(batch) for batch in batches(3)], tokenizer, processes=1))


def test_who_stops_half_way_leaves_no_process(tokenizer, monkeypatch):
    children = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: children.append(popen(*args, **options)) or children[-1])
    made = encoders.encoded(map(pieces_of, batches(9)), tokenizer, processes=2)
    next(made)
    assert len(children) == 2 and all(child.poll() is None for child in children)
    made.close()
    assert all(child.poll() is not None for child in children)


PARENT = """
import subprocess, sys, time
from seqmodels.data.text import encoders
from seqmodels.data.text.readers import Piece
from seqmodels.data.text.tokenizer import train_bpe

popen = subprocess.Popen
def noted(*args, **options):
    child = popen(*args, **options)
    print(child.pid, flush=True)
    return child
subprocess.Popen = noted
made = encoders.encoded(([Piece("a b c", True)] for _ in range(9)), train_bpe(["a b c d"], 300), processes=2)
next(made)
print("made", flush=True)
time.sleep(600)
"""


def test_children_end_with_a_parent_that_is_killed():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    lines = [parent.stdout.readline() for _ in range(3)]
    assert lines[2] == "made\n"
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for pid in map(int, lines[:2]):
        until = time.monotonic() + 60
        while is_alive(pid):
            assert time.monotonic() < until
            time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
