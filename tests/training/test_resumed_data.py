"""A run goes on with the text and the tokenizer that it was begun with, and with no others, whatever its files hold by now."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import seqmodels
from seqmodels import config as config_lib
from seqmodels import data
from seqmodels.data.text import validation as validations
from seqmodels.errors import UserError
from seqmodels.training import loop
from tests.configs import tiny

pytestmark = pytest.mark.tools

WORDS = [f"w{number}" for number in range(40)]


def write_texts(path, count, *, last="w1"):
    path.write_text(
        "".join(json.dumps({"text": f"w{i % 40} w2 w3 {last if i == count - 1 else 'w1'}"}) + "\n" for i in range(count))
    )


def write_tokenizer(path, words):
    library = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*words, "[UNK]", "</s>"])}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and the files that it was trained with."""
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder / "texts.jsonl", 200)
    write_texts(folder / "held_out.jsonl", 60)
    write_tokenizer(folder / "tokenizer.json", WORDS)
    loop.train(config_of(folder), folder / "run")
    return folder


def config_of(folder):
    return tiny(**{
        "data.source": str(folder / "texts.jsonl"), "data.validation_source": str(folder / "held_out.jsonl"),
        "data.tokenizer": str(folder / "tokenizer.json"), "data.cache_dir": str(folder / "cache"), "data.batch_size": 2,
        "data.seq_len": 16, "model.repeats": 1, "train.steps": 2, "train.eval_tokens": 64, "train.sample_every_steps": 0,
        "train.loggers": "",
    })  # fmt: skip


@pytest.fixture
def folder(trained):
    """The same, for a test to change; afterwards as it was."""
    copies = {name: (trained / name).read_bytes() for name in ("texts.jsonl", "held_out.jsonl", "tokenizer.json")}
    shutil.copytree(trained / "run", trained / "kept")
    yield trained
    for name, content in copies.items():
        (trained / name).write_bytes(content)
    shutil.rmtree(trained / "run")
    (trained / "kept").rename(trained / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        # Of as many tokens as before.
        (lambda folder: write_texts(folder / "texts.jsonl", 200, last="w4"), "data.source=.*texts.jsonl is not what the run"),
        (
            lambda folder: write_texts(folder / "held_out.jsonl", 60, last="w4"),
            "validation text of data.validation_source=.*held_out",
        ),
        (lambda folder: write_texts(folder / "held_out.jsonl", 61), "validation text of data.validation_source=.*held_out"),
        # Another vocabulary: other shapes of parameters, which are not damaged.
        (lambda folder: write_tokenizer(folder / "tokenizer.json", [*WORDS, "more"]), "data.tokenizer=.* is not what the run"),
        (lambda folder: write_tokenizer(folder / "tokenizer.json", WORDS[::-1]), "data.tokenizer=.* is not what the run"),
    ],
)
def test_other_data_are_refused_and_named(folder, change, message):
    path = folder / "run/checkpoints"
    before = sorted(path.rglob("*"))
    change(folder)
    with pytest.raises(UserError, match=message) as refused:
        loop.train(config_of(folder), folder / "run")
    assert "damaged" not in str(refused.value) and sorted(path.rglob("*")) == before


def test_files_of_the_data_that_are_damaged_are_written_anew(folder, capsys):
    run = folder / "run"
    whole = {name: (run / name).read_bytes() for name in ("validation.npz", "tokenizer.json")}
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-30]), lambda path: path.unlink()):
        for name in whole:
            damage(run / name)
        loop.train(config_of(folder), run)
        said = capsys.readouterr().err
        assert all(f"{run / name} was damaged or gone, and is written anew" in said for name in whole)
        assert {name: (run / name).read_bytes() for name in whole} == whole
    loop.train(config_of(folder), run)
    assert "written anew" not in capsys.readouterr().err


def test_a_change_between_the_blocks_of_the_sample_is_found(folder):
    config = config_of(folder)
    dataset = data.prepare(config.data, seed=0)
    older = {"data": dataset.fingerprint, "seconds": 1.0}
    record = older | {"digests": dict(dataset.digests), "tokenizer": loop.tokenizer_digest(dataset)}
    for known in (record, older):
        loop._check_record(config, dataset, folder / "run", known)
    kind = dataset.digests["train"].partition(":")[0]
    with pytest.raises(UserError, match="data.source=.* is not what the run"):
        loop._check_record(config, dataset, folder / "run", record | {"digests": {"train": f"{kind}:0"}})
    loop._check_record(config, dataset, folder / "run", record | {"digests": {"train": "another format:0"}})


def of_another_run(folder):
    """The same run with other heads, of which the parameters have the same shapes, on other words of as many."""
    config = config_of(folder)
    heads = {"attention": dataclasses.replace(dict(config.model.mixers)["attention"], num_heads=1)}
    mixers = tuple((name, heads.get(name, options)) for name, options in config.model.mixers)
    validation = data.load_validation(folder / "run")
    other = dataclasses.replace(validation, tokens=np.asarray(validation.tokens)[::-1].copy())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mixers=mixers)), other


def test_an_option_that_a_mixer_got_since_is_no_other_model(folder):
    config = config_of(folder)
    record = config_lib.model_record(config)
    assert config_lib.other_options(record, config) == [] == config_lib.other_options(None, config)
    older = {name: value for name, value in record["options"].items() if name != "mixers.attention.window"}
    assert len(older) == len(record["options"]) - 1
    assert config_lib.other_options(record | {"options": older}, config) == []
    assert config_lib.other_options(record | {"options": older | {"dropout": 0.5}}, config) == ["model.dropout 0.5 -> 0.0"]
    assert config_lib.other_options({"version": record["version"] - 1, "options": {"dropout": 0.5}}, config) == []


def test_a_file_of_another_run_in_the_folder_is_said(folder, capsys):
    """As half of a copy leaves it: each file is whole, and belongs to another checkpoint."""
    run = folder / "run"
    config, other = of_another_run(folder)
    lines = []
    assert seqmodels.load_run(run, report=lines.append).validation() and lines == []
    capsys.readouterr()
    validations.write(other, run)
    seqmodels.load_run(run).validation()
    assert "validation.npz is not the text that the run held out" in capsys.readouterr().err
    config_lib.save(config, run / "config.json")
    seqmodels.load_run(run, report=lines.append)
    assert len(lines) == 1 and "config.json has another model than the checkpoint of step 2 was made by" in lines[0]
    assert "(model.mixers.attention.num_heads 4 -> 1)" in lines[0]
    with pytest.raises(UserError, match="the model of .*config.json is not what the run"):
        loop.train(config, run)
    config_lib.save(config_of(folder), run / "config.json")
    loop.train(config_of(folder), run)
    assert f"{run / 'validation.npz'} was damaged or gone, and is written anew" in capsys.readouterr().err
    assert not data.is_another(
        data.load_validation(run).digest, data.prepare(config_of(folder).data, seed=0).digests["validation"]
    )
