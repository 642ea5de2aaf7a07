"""A config is a tree of frozen dataclasses; a mistake in it is one line that says what to do."""

import dataclasses
import re

import pytest

from configs import base
from seqmodels import config
from seqmodels.data import tasks
from seqmodels.errors import UserError
from tests.configs import tiny
from tools.pages import base_config


def test_json_round_trip(tmp_path):
    original = tiny(**{"model.pattern": "attention mlp linear_attention mlp", "model.mixers.attention.window": 8})
    path = str(tmp_path / "config.json")
    config.save(original, path)
    assert config.load(path) == original
    assert dict(original.model.mixers)["attention"].window == 8


def test_hashable_throughout():
    assert hash(tiny()) == hash(tiny())


def test_only_layers_in_the_pattern_are_kept():
    kept = tiny(**{"model.pattern": "linear_attention mlp"}).model
    assert [name for name, _ in kept.mixers] == ["linear_attention"] and [name for name, _ in kept.channel_layers] == ["mlp"]


@pytest.mark.parametrize("kind", config.LAYER_KINDS)
def test_base_holds_every_option_of_every_layer(kind):
    options = base.get_config().model[kind]
    for name in config.LAYER_KINDS[kind].names():
        fields = {field.name: field.default for field in dataclasses.fields(config.LAYER_KINDS[kind].load(name).Config)}
        assert {key: options[name][key] for key in options[name]} == fields


def test_base_holds_every_option_of_every_task():
    options = base.get_config().data.tasks
    for name, task in tasks.TASKS.items():
        fields = {field.name: field.default for field in dataclasses.fields(task)}
        assert {key: options[name][key] for key in options[name]} == fields
        assert task(**fields).name == name and hash(task()) == hash(task())


def test_only_the_task_in_use_is_kept():
    chosen = tiny(**{"data.task": "parity", "train.sample_every_steps": 0}).data
    assert [name for name, _ in chosen.tasks] == ["parity"] and chosen.synthetic_task == tasks.TASKS["parity"]()
    assert tiny().data.tasks == () and tiny().data.synthetic_task is None


def test_differences_name_the_fields():
    changed = config.differences(tiny(), tiny(**{"optim.learning_rate": 0.5, "model.mixers.attention.window": 4}))
    assert changed == {
        "optim.learning_rate": (tiny().optim.learning_rate, 0.5),
        "model.mixers.attention.window": (None, 4),
    }


def values(**changes):
    """config.json's dict with dotted fields changed; None removes one."""
    tree = config.to_dict(tiny())
    for dotted, value in changes.items():
        *groups, name = dotted.split(".")
        group = tree
        for part in groups:
            group = group[part]
        if value is None:
            del group[name]
        else:
            group[name] = value
    return tree


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optim.learning_rat": 1.0}, "did you mean config.optim.learning_rate"),
        ({"optim.learning_rate": None}, "config.optim lacks learning_rate"),
        ({"optim.learning_rate": "fast"}, "config.optim.learning_rate='fast' must be float"),
        ({"data.seq_len": 1.5}, "config.data.seq_len=1.5 must be int"),
        ({"model.remat": 1}, "config.model.remat=1 must be bool"),
        ({"optim": 3}, "config.optim must be a group of fields"),
        ({"model.pattern": "atention mlp"}, "did you mean 'attention'"),
        ({"model.pattern": " "}, "model.pattern is empty"),
        ({"model.pattern": "attention rwkv_channel_mix"}, "model.channel_layers has no options for it"),
        ({"model.mixers.attention.num_head": 2}, "did you mean config.model.mixers.attention.num_heads"),
        ({"model.compute_dtype": "float64"}, "model.compute_dtype='float64' is not one of"),
        ({"model.dropout": 1.0}, "model.dropout=1.0"),
        ({"model.repeats": 0}, "must be at least 1"),
        ({"optim.schedule": "cosin"}, "optim.schedule='cosin' is not one of"),
        ({"train.steps": 0}, "train.steps=0 must be at least 1"),
        ({"data.task": "parity"}, "data.task is 'parity', but data.tasks has no options for it"),
        ({"data.task": "parity", "data.tasks": {"parity": {"every": 1}}}, "config.data.tasks.parity lacks train_examples"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError) as error:
        config.from_config_dict(values(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_int_is_accepted_for_float():
    assert config.from_config_dict(values(**{"optim.learning_rate": 1})).optim.learning_rate == 1.0


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe"])
def test_damaged_config_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError):
        config.load(str(path))


def test_missing_config_json(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        config.load(str(tmp_path / "config.json"))


def test_base_is_what_the_fields_declare():
    assert base_config.PATH.read_text() == base_config.text(), "run: python -m tools.pages.base_config"


def test_an_edited_config_is_said(tmp_path):
    """Whoever changes config.json, a person or a failing disk: it is read, and one line says so. Older files have no digest."""
    path, said = tmp_path / "config.json", []
    config.save(tiny(), path)
    text = path.read_text()
    assert config.load(path, report=said.append) == tiny() and not said
    path.write_text(text.replace('"seed": 0', '"seed": 4'))
    assert config.load(path, report=said.append).seed == 4
    assert len(said) == 1 and str(path) in said[0] and "edited" in said[0]
    path.write_text(re.sub(r'"digest": "[0-9a-f]+",', "", path.read_text()))
    assert config.load(path, report=said.append).seed == 4 and len(said) == 1
