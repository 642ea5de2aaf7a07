"""What of a folder is read as which split, by the names of its files; all else is said."""

import errno
import json
import os
import random

import pytest

from seqmodels import data
from seqmodels.data.text import folder, sources
from seqmodels.errors import UserError
from tests.configs import tiny


def made(path, names):
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = f"the text of {name}"
        file.write_bytes((json.dumps({"text": text}) if name.endswith(".jsonl") else text).encode(errors="replace"))
    return path


def splits(path):
    return {split: [str(file.relative_to(path)) for file in files] for split, files in folder.layout(path).splits.items()}


@pytest.mark.parametrize(
    "names, expected",
    [
        # The hub's layout, by itself and in data/.
        (
            ["data/train-00000-of-00002-ab12.txt", "data/train-00001-of-00002.txt", "data/validation-00000-of-00001.txt"],
            {"train": 2, "validation": 1},
        ),
        (["train-00000-of-00001.txt", "test-00000-of-00001.txt", "a.txt"], {"train": 2, "test": 1}),
        (["en.validation.00000-of-00001.txt", "en.train.00000-of-00001.txt"], {"train": 1, "validation": 1}),
        # The bare word.
        (["train.txt", "dev.txt", "test.txt"], {"train": 1, "validation": 1, "test": 1}),
        (["Validation.txt", "one.txt", "two.txt"], {"train": 2, "validation": 1}),
        # A file beside it is named alike but for "train".
        (["TinyStories-train.txt", "TinyStories-valid.txt"], {"train": 1, "validation": 1}),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], {"train": 1, "validation": 1, "test": 1}),
        (["train_0.txt", "train_1.txt", "val_0.txt"], {"train": 2, "validation": 1}),
        # And otherwise a name is only a name.
        (["test_chapter.txt", "dev-notes_1.txt", "validation_ideas.txt", "train_ride.txt"], {"train": 4}),
        (["unit-test.txt", "my dev.txt", "test_1.txt", "val.1.txt", "contest.txt", "valid.notes.txt"], {"train": 6}),
        (["stories-train.txt", "poems-valid.txt", "test-ride.txt", "train-ride.txt"], {"train": 4}),
        # Subfolders, where nothing else is there to read.
        (["train/a.txt", "train/b.txt", "validation/c.txt"], {"train": 2, "validation": 1}),
        (["books/one/a.txt", "books/two/b.txt", "test results/c.txt"], {"train": 3}),
        (["Train/a.txt", "Validation/c.txt"], {"train": 1, "validation": 1}),
        (["a.TXT", "b.txt"], {"train": 2}),
        (["tales-training.txt", "tales-validation.txt"], {"train": 1, "validation": 1}),
    ],
)
def test_a_name_says_a_split_only_as_a_whole_word_in_a_layout(tmp_path, names, expected):
    found = splits(made(tmp_path, names))
    assert {split: len(files) for split, files in found.items()} == expected
    assert sorted(file for files in found.values() for file in files) == sorted(names)


def test_drawn_names_without_a_layout_are_all_trained_on(tmp_path):
    draw = random.Random(0)
    words = ["train", "valid", "validation", "val", "dev", "test", "notes", "of", "chapter", "2024"]
    for trial in range(30):
        # Three parts, a split's word first or in the middle: no shape that a split's name has.
        names = {
            f"{draw.choice(words)}{draw.choice('-_. ')}{draw.choice(words)}{draw.choice('-_. ')}{draw.choice(words[6:9])}{i}.txt"
            for i in range(8)
        }
        assert splits(made(tmp_path / str(trial), names)) == {"train": sorted(names)}


@pytest.mark.parametrize("seed", range(20))
def test_every_file_is_read_or_said(tmp_path, seed, capsys):
    draw = random.Random(seed)
    parts = ["", "data/", "raw/", "raw/deep/", "train/", "validation/"]
    stems = ["train", "valid", "test", "notes", "train-00000-of-00001", "test_1", "dev-2", ".hidden"]
    names = {draw.choice(parts) + draw.choice(stems) + draw.choice([".txt", ".jsonl", ".md", ".txt.gz"]) for _ in range(10)}
    path = made(tmp_path / "texts", names | {"story.txt"})
    layout = folder.layout(path)
    read = {str(file.relative_to(path)) for files in layout.splits.values() for file in files}
    said = [name for unread in layout.unread for name in unread.names]
    assert len(said) == len(set(said)) and not read & set(said)
    for name in names:
        # By itself, or with the folder it is in.
        assert (name in read) != any(name == each or name.startswith(f"{each}/") for each in said), name


def test_one_line_says_what_is_read_and_the_run_folder_keeps_it(tmp_path, capsys):
    names = ["test_of_time.txt", "dev-notes.txt", "a.txt", "b.txt", "story.md", "more/c.txt", "rows.jsonl"]
    path = made(tmp_path / "texts", names)
    (path / "rows.jsonl").unlink()
    config = tiny(**{"data.source": str(path), "data.cache_dir": str(tmp_path), "data.batch_size": 1, "data.seq_len": 4}).data
    dataset = data.prepare(config, seed=0)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == (
        "data: training on 4 files, 'a.txt' to 'test_of_time.txt'; held out: every 20th of its documents (there is no "
        "validation split); not read: 'more' (a folder beside the files that are read), 'story.md' (not of a format that "
        "is read)"
    )
    (tmp_path / "run").mkdir()
    dataset.save(tmp_path / "run")
    kept = json.loads((tmp_path / "run/data.json").read_text())
    assert kept["said"] == line
    read = [name.rpartition("/")[2] for name in kept["train"]["files"]]
    assert read == ["a.txt", "b.txt", "dev-notes.txt", "test_of_time.txt"]
    assert (kept["train"]["documents"], kept["validation"]["documents"]) == (3, 1)
    assert [each["names"] for each in kept["not_read"]] == [["more"], ["story.md"]]


def test_a_folder_of_two_formats_is_read_in_one_and_the_other_is_said(tmp_path):
    source = sources.open_source(str(made(tmp_path, ["a.jsonl", "b.txt", "c.txt"])), revision="", toy_documents=1)
    assert list(source.train.documents()) == ["the text of a.jsonl"]
    assert source.unread == ((("b.txt", "c.txt"), "of another format than .jsonl, and one is read"),)


def test_what_a_name_holds_does_not_reach_the_terminal_raw(tmp_path):
    name = "a\x1b[31m\n\u202e\udcff.txt"
    source = sources.with_validation(sources.open_source(str(made(tmp_path, [name, "b.txt"])), revision="", toy_documents=1))
    said = sources.training_line(source)
    assert said.isprintable() and said.isascii() and r"\x1b[31m\n\u202e\udcff" in said


def test_a_folder_without_text(tmp_path):
    made(tmp_path, ["a.md", "more/b.csv", "c.csv", ".git/c.txt"])
    with pytest.raises(UserError, match="holds no .parquet, .jsonl, .txt files, neither in itself .* but 2 .csv, 1 .md: save"):
        folder.layout(tmp_path)


def test_shards_that_others_name_and_that_are_missing_are_said(tmp_path):
    there = ["train-00000-of-00003.txt", "train-00002-of-00003-ab12.txt", "validation-00000-of-00001.txt"]
    layout = folder.layout(made(tmp_path / "part", there))
    assert layout.unread == ((("train-00001-of-00003.txt",), "of the same set as the files beside, and not there"),)
    for whole in (
        ["train-00000-of-00002.txt", "train-00001-of-00002.txt"],
        ["train-00001-of-00002.txt", "train-00002-of-00002.txt"],
    ):
        assert folder.layout(made(tmp_path / whole[0], whole)).unread == ()


def test_links_that_lead_nowhere_and_pipes_are_said_to_be_so(tmp_path):
    made(tmp_path, ["a.txt"])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    [unread] = folder.layout(tmp_path).unread
    assert unread.names == ("gone.txt", "pipe.txt") and unread.reason.startswith("a link that leads nowhere, a pipe")


def test_a_subfolder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    path = made(tmp_path, ["open/a.txt", "closed/b.txt"])
    listing = os.scandir

    def scandir(place):
        if str(place).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return listing(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="cannot read '.*closed': Permission denied"):
        folder.layout(path)


def test_files_of_subfolders_are_called_by_their_places(tmp_path):
    path = made(tmp_path, ["en/train-00000-of-00001.txt", "fr/train-00000-of-00001.txt", "en/validation-00000-of-00001.txt"])
    source = sources.open_source(str(path), revision="", toy_documents=1)
    assert sources.training_line(source).startswith(
        "data: training on 'en/train-00000-of-00001.txt', 'fr/train-00000-of-00001.txt'; held out: 'en/validation-"
    )
