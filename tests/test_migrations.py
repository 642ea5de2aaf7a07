"""Runs made before are still read, and mean what they meant: configs of each day in tests/run_configs."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import config, migrations, model
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, loop
from tests.configs import tiny

RUN_CONFIGS = sorted((Path(__file__).parent / "run_configs").glob("*.json"))
# What fields of version 0 are called now; None: said elsewhere.
MOVED = {
    "model.mlp_kind": None,
    "model.mlp_hidden": "model.channel_layers.mlp.hidden",
    "model.mlp_activation": "model.channel_layers.mlp.activation",
}


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_the_config_of_an_old_run_is_still_read(path):
    """Configs of runs of that day: what a field said is what it says, or what its new name says."""
    then = config.flatten(json.loads(path.read_text()))
    now = config.flatten(json.loads(json.dumps(config.to_dict(config.load(path)))))
    if "model.mlp_kind" in then and then["model.mlp_kind"] == "rwkv6":
        assert now.pop("model.pattern") == then.pop("model.pattern").replace(" mlp", " rwkv_channel_mix")
        assert now["model.channel_layers.rwkv_channel_mix.hidden"] == then["model.mlp_hidden"] == 112
        then = {name: value for name, value in then.items() if name not in MOVED}
    for name in ("version", "digest"):
        then.pop(name, None)
    then = {MOVED[name] if name in MOVED else name: value for name, value in then.items()}
    then.pop(None, None)
    if "model.mixers.lstm.hidden_size" in then:
        assert then["model.mixers.lstm.hidden_size"] is None and then["model.d_model"] == 128
        then["model.mixers.lstm.hidden_size"] = 156  # what None meant
    assert then.items() <= now.items()


def test_a_run_of_the_first_day_did_what_it_did():
    """The fields that came later have the values of what that day's code did."""
    first = config.load(RUN_CONFIGS[0])
    assert (first.model.norm, first.model.embedding_norm, first.model.branch_rms, first.model.logit_cap) == (
        "rms",
        False,
        None,
        None,
    )
    assert dict(first.model.mixers)["linear_attention"].conv_width == 0 and first.data.task == "text"
    assert first.optim.rate_changes == () and not first.train.skip_nonfinite and first.train.init_from is None


def test_what_is_written_is_of_the_newest_version(tmp_path):
    path = tmp_path / "config.json"
    config.save(tiny(), path)
    assert json.loads(path.read_text())["version"] == migrations.VERSION
    assert config.load(path) == tiny()


@pytest.mark.parametrize("version", [migrations.VERSION + 1, -1, True, "1", None, 1.0])
def test_a_version_that_is_not_known_is_a_mistake(tmp_path, version):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config.to_dict(tiny()), "version": version}))
    with pytest.raises(UserError, match=f"reads versions up to {migrations.VERSION}"):
        config.load(path)


def test_an_lstm_without_an_mlp_keeps_its_width_and_goes_on(tmp_path):
    """Version 4's default had the parameters of an MLP as well; the same command asks for today's, and is told so."""
    former = config.to_dict(tiny(**{"model.pattern": "lstm"})) | {"version": 4}
    assert former["model"]["mixers"]["lstm"]["hidden_size"] is None
    (tmp_path / "config.json").write_text(json.dumps(former))
    own = "--config.model.mixers.lstm.hidden_size=40"
    with pytest.raises(UserError, match=rf"hidden_size 40 -> None; .* or go on as it was, with {own}$"):
        loop._check_config(tiny(**{"model.pattern": "lstm"}), tmp_path)
    with pytest.raises(UserError, match=rf"'lstm' -> 'lstm mlp', [^,]*; .* with --config.model.pattern=lstm {own}$"):
        loop._check_config(tiny(**{"model.pattern": "lstm mlp"}), tmp_path)
    as_it_was = tiny(**{"model.pattern": "lstm", "model.mixers.lstm.hidden_size": 40})
    assert loop._check_config(as_it_was, tmp_path) == as_it_was


@pytest.mark.parametrize(
    ("pattern", "migrated"),
    [
        ("lstm(hidden_size=None)", "lstm(hidden_size=40)"),
        ("mlp lstm(forget_bias=0.0, hidden_size = None) mlstm", "mlp lstm(forget_bias=0.0, hidden_size = 40) mlstm"),
        ("lstm(hidden_size=12) lstm", "lstm(hidden_size=12) lstm"),
    ],
)
def test_the_width_of_an_lstm_in_a_pattern(pattern, migrated):
    model = {"d_model": 32, "pattern": pattern, "mixers": {"lstm": {"hidden_size": None}}}
    now = migrations.up_to_date({"version": 4, "model": model})["model"]
    assert now == {"d_model": 32, "pattern": migrated, "mixers": {"lstm": {"hidden_size": 40}}}


def test_migrations_leave_odd_values_to_the_config(tmp_path):
    lstm = {"pattern": "lstm", "mixers": {"lstm": {"hidden_size": None}}}
    odd_models = (
        1,
        {"mixers": []},
        lstm | {"d_model": 0},
        lstm | {"d_model": 1e9},
        {"mlp_kind": [], "mlp_hidden": 0, "mlp_activation": {}},
    )
    for odd in ({}, *({"model": each} for each in odd_models)):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(odd))
        with pytest.raises(UserError):
            config.load(path)


def test_a_checkpoint_of_the_channel_mix_under_its_former_name(tmp_path):
    """Version 0 called the parameters of RWKV-6's channel mix after the pattern's "mlp"."""
    config_now = dataclasses.replace(tiny(**{"model.pattern": "lstm rwkv_channel_mix", "model.repeats": 1}).model, d_model=4)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), model.param_shapes(config_now, 5)
    )
    layers = {name.replace("rwkv_channel_mix", "mlp"): layer for name, layer in params["layers"].items()}
    writer = checkpoint.Writer(tmp_path, keep=2)
    state = {"params": {**params, "layers": layers}, "optimizer": ({"mu": layers},), "step": jnp.int32(3)}
    writer.save(3, state, {}, validation_loss=None)
    writer.close()
    wanted = {**state, "params": params, "optimizer": ({"mu": params["layers"]},)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path, abstract).state, wanted)
