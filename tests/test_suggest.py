"""What is not there is refused with the nearest name that is: of a flag, a field, a layer, a file, a folder."""

import argparse
import os

import pytest

from seqmodels import run_list, suggest
from seqmodels.command_line import output_file
from seqmodels.data.text import sources, tokenizer
from seqmodels.decoding import session
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint
from seqmodels.training import run_folder


@pytest.fixture
def place(tmp_path):
    """A folder far below, so that what all paths have in common is most of them."""
    place = tmp_path / "_".join(["a_long_name"] * 8)
    for name in ("gla", "mamba"):
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text("{}")
    (place / "stories.txt").write_text("Once upon a time.")
    return place


@pytest.mark.parametrize(
    ("refuse", "asked", "near"),
    [
        (run_folder.read_config, "gls", "gla"),
        (run_folder.read_config, "storys.txt", None),  # no run folder
        (lambda path: run_list.find([path]), "mambo/seed0", "mamba"),
        (lambda path: sources.open_source(str(path), revision="", toy_documents=1), "storys.txt", "stories.txt"),
        (lambda path: tokenizer.load_tokenizer(str(path)), "mamba/config.jsn", "mamba/config.json"),
        (lambda path: session.load(path, None, None, params_fingerprint=""), "story.txt", "stories.txt"),
        (lambda path: session.load(str(path), None, None, params_fingerprint=""), "story.txt", "stories.txt"),
        (checkpoint._read_json, "gal", "gla"),
        (lambda path: output_file(str(path)), "mamb/curves.svg", "mamba"),
        (run_folder.read_config, "transformer", None),
    ],
)  # fmt: skip
def test_a_path_that_is_not_there(place, refuse, asked, near):
    with pytest.raises((UserError, argparse.ArgumentTypeError)) as refused:
        refuse(place / asked)
    message = str(refused.value)
    assert (f"did you mean '{place / near}'?" in message) if near else ("did you mean" not in message), message


@pytest.mark.parametrize("name", ["tooy", "ronenldan/TinyStories"])
def test_a_source_that_is_a_word(name):
    assert suggest.hint(name, [sources.TOY, sources.hub.TINYSTORIES])


def test_what_cannot_be_looked_at_has_no_hint(place):
    (place / "gla").rename(place / "closed")
    (place / ".notes.yaml").touch()
    assert suggest.path_hint(place / "notes.yaml") == "" and suggest.path_hint(place / ".note.yaml")
    assert suggest.path_hint(place / "closd" / "x") == f"did you mean '{place / 'closed'}'? "
    assert (
        suggest.path_hint(place / ("x" * 300)) == ""
        and suggest.no_such("file", place / "zz") == f"there is no file {place / 'zz'}"
    )
    if os.geteuid():
        (place / "closed").chmod(0)
        assert suggest.path_hint(place / "closed" / "config.jso") == ""
