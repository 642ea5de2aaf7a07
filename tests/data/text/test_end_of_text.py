"""The end of text is what the files beside a tokenizer.json say; a guess by name is said."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from seqmodels import data

NAMES = ["<|endoftext|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "<|im_end|>", "[GMASK]", "x"]


def folder_with(folder, pieces, special=(), **files):
    """A tokenizer.json of whole words, and JSON files beside it."""
    library = tokenizers.Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token=pieces[0]))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def loaded(folder):
    lines = []
    return data.load_tokenizer(folder / "tokenizer.json", lines.append), lines


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "said",
    [
        lambda name, token: {"config": {"eos_token_id": token}},
        lambda name, token: {"generation_config": {"eos_token_id": [token]}},
        lambda name, token: {"tokenizer_config": {"eos_token": name}},
        lambda name, token: {"special_tokens_map": {"eos_token": {"content": name, "lstrip": False}}},
        lambda name, token: {"config": {"eos_token_id": token}, "tokenizer_config": {"eos_token": name}},
    ],
    ids=["config", "generation_config", "tokenizer_config", "special_tokens_map", "two files"],
)
def test_any_name_in_any_of_the_places(name, said, tmp_path):
    folder = folder_with(tmp_path, ["?", "one", name, "</s>"], [name], **said(name, 2))
    tokenizer, lines = loaded(folder)
    assert (tokenizer.end_of_text, tokenizer.end_name, tokenizer.ends, lines) == (2, name, (2,), [])
    assert not tokenizer.is_guess and tokenizer.decode([1, 2, 1]) == "one one"
    # What a run folder keeps of it says it again.
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    again, lines = loaded(tmp_path / "run")
    assert (again.end_of_text, again.ends, lines) == (2, (2,), [])
    assert data.tokenizer_digest(again) == data.tokenizer_digest(tokenizer)


def test_several_ends(tmp_path):
    """A model that was trained on turns stops at each of them; one stands between texts."""
    pieces = ["?", "one", "<end>", "<turn>", "<pad>"]
    said = {"generation_config": {"eos_token_id": [3, 2]}, "tokenizer_config": {"eos_token": "<end>"}}
    tokenizer, lines = loaded(folder_with(tmp_path, pieces, ["<end>", "<turn>", "<pad>"], **said))
    assert (tokenizer.end_of_text, tokenizer.ends, lines) == (2, (2, 3), [])
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    assert loaded(tmp_path / "run")[0].ends == (2, 3)


def test_files_that_contradict_each_other(tmp_path):
    pieces, names = ["?", "one", "<end>", "<turn>"], {"tokenizer_config": {"eos_token": "<end>"}}
    folder = folder_with(tmp_path, pieces, ["<end>", "<turn>"], config={"eos_token_id": 3}, **names)
    tokenizer, lines = loaded(folder)
    assert tokenizer.ends == (3, 2) and len(lines) == 1 and "'<turn>' in config.json and '<end>'" in lines[0]
    # An ordinary word is what a config's class has by default.
    tokenizer, lines = loaded(folder_with(tmp_path, pieces, ["<end>"], config={"eos_token_id": 1}, **names))
    assert tokenizer.ends == (2,) and len(lines) == 1
    folder = folder_with(tmp_path / "alone", pieces, ["<end>"], config={"eos_token_id": 1})
    tokenizer, lines = loaded(folder)
    assert tokenizer.ends == (1,) and "'one', no special token" in lines[0]


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"eos_token_id": 99}},
        {"config": {"eos_token_id": -1}},
        {"config": {"eos_token_id": True}},
        {"config": {"eos_token_id": 2**70}},
        {"config": {"eos_token_id": "2"}},
        {"tokenizer_config": {"eos_token": "<none>"}},
        {"tokenizer_config": {"eos_token": {"name": "<end>"}}},
        {"tokenizer_config": {"eos_token": "<\ud800>"}},
        {"tokenizer_config": "{"},
    ],
    ids=str,
)
def test_what_says_nothing_is_passed_over_and_said(files, tmp_path):
    tokenizer, lines = loaded(folder_with(tmp_path, ["?", "one", "</s>"], **files))
    assert tokenizer.end_name == "</s>" and tokenizer.is_guess
    assert len(lines) == 2 and "passed over" in lines[0] and "by its name" in lines[1]


def test_a_guess_is_said_with_its_cure(tmp_path):
    for files in ({}, {"config": {"eos_token_id": None}}, {"config": [1]}):
        tokenizer, lines = loaded(folder_with(tmp_path, ["?", "<other>", "</s>"], **files))
        assert tokenizer.end_of_text == 2 and len(lines) == 1
        assert "'</s>' is taken, by its name" in lines[0] and '{"eos_token": "NAME"}' in lines[0]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<other>"}')
    tokenizer, lines = loaded(tmp_path)
    assert (tokenizer.end_of_text, lines) == (1, [])


def test_the_same_file_with_another_end_is_another_tokenizer(tmp_path):
    """Cached tokens have the separator in them."""
    one, other = (
        loaded(folder_with(tmp_path / end, ["?", "<a>", "<b>"], ["<a>", "<b>"], tokenizer_config={"eos_token": end}))[0]
        for end in ("<a>", "<b>")
    )
    assert one.to_json() == other.to_json() and data.tokenizer_digest(one) != data.tokenizer_digest(other)


def test_an_added_token_ends_a_text_whether_or_not_it_is_marked_as_special(tmp_path):
    said = {
        "config": {"eos_token_id": 2},
        "generation_config": {"eos_token_id": [2, 3]},
        "tokenizer_config": {"eos_token": "<end>"},
    }
    folder = folder_with(tmp_path, ["?", "one", "<end>", "<turn>"], ["<end>"], **said)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<turn>", special=False)])
    library.save(str(folder / "tokenizer.json"))
    tokenizer, lines = loaded(folder)
    assert (tokenizer.ends, lines) == ((2, 3), [])
    # An ordinary word does not, beside a token that has an id and a name; and that is said.
    folder = folder_with(tmp_path, ["?", "one", "<end>", "turn"], ["<end>"], **said)
    tokenizer, [line] = loaded(folder)
    assert tokenizer.ends == (2,) and "eos_token_id 3 is the ordinary 'turn'; it is not taken to end a text" in line
