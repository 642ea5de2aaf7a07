"""The pattern: options of one layer, mixers side by side, and how mistakes in it are said."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import config as config_lib
from seqmodels import mixers, model, pattern
from seqmodels.comparison import plan
from seqmodels.errors import UserError
from tests.configs import START, tiny
from tests.programs import fast_jit

VOCAB = 50


def build(layers, **fields):
    config = tiny(**{"model.pattern": layers, "model.repeats": 1} | fields).model
    params = fast_jit(model.init_params, static_argnums=(0, 1))(config, VOCAB, jax.random.key(0))
    return config, params, model.merge(model.graphdef(config, VOCAB), params)


@fast_jit
def call(network, *arguments):
    return network(*arguments)


def tokens(length=12):
    return jax.random.randint(jax.random.key(1), (2, length), 0, VOCAB)


def test_blanks_do_not_matter():
    written = "attention( window = 64,num_heads=2 )  mlp gla + mamba2 mlp"
    assert pattern.parse_pattern(written) == ("attention(window=64,num_heads=2)", "mlp", "gla+mamba2", "mlp")
    assert pattern.mixers_in_pattern(written) == ("attention", "gla", "mamba2")


def test_options_belong_to_their_layer():
    """A model of one windowed layer is the model whose attention has that window; the other layer's is full."""
    _, params, windowed = build("attention(window=4) mlp")
    config, _, _ = build("attention mlp", **{"model.mixers.attention.window": 4})
    same = model.merge(model.graphdef(config, VOCAB), params)
    np.testing.assert_array_equal(call(windowed, tokens())[0], call(same, tokens())[0])
    _, params, both = build("attention(window=4) mlp attention mlp")
    bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for state in both.init_state(1, 32)]
    assert bytes_of[0] < bytes_of[2]


@pytest.mark.tools
@pytest.mark.parametrize("layers", ["attention(window=4) mlp attention mlp", "attention+mamba2 mlp", "hgrn2+hgrn2 mlp hgrn2"])
def test_decoding_is_the_model_that_was_trained(layers):
    _, _, network = build(layers, **{"model.repeats": 2})
    text = tokens()
    whole = call(network, text)[0]

    def step(state, token):
        logits, state = network(token[:, None], state)
        return state, logits[:, 0]

    state = network.unstack_state(network.init_state(2, text.shape[1]))
    _, steps = fast_jit(lambda state: jax.lax.scan(step, state, text.T))(state)
    np.testing.assert_allclose(jnp.moveaxis(steps, 0, 1), whole, rtol=0, atol=2e-5)


def test_side_by_side_is_the_mean_of_normed_outputs():
    config, params, network = build("attention+gla mlp", **START)
    x = jax.random.normal(jax.random.key(2), (2, 9, config.d_model))

    @fast_jit
    def by_two_ways(network):
        layer = jax.tree.map(lambda leaf: leaf[0], network._layers()[0])
        outputs = [mixer(layer.norm(x))[0] for _, mixer in layer.parts()]
        norms = [layer.layer.norms[name] for name in ("0_attention", "1_gla")]
        return layer(x, None, {}, reset=None, dropout_key=None)[0] - x, sum(norm(y) for norm, y in zip(norms, outputs)) / 2

    found, expected = by_two_ways(network)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    wanted = config.branch_rms * 2**-0.5
    assert 0.5 * wanted < jnp.sqrt(jnp.mean(found**2)) < 2 * wanted, "the start is that of any layer"


def test_saved_and_read_back(tmp_path):
    config = tiny(**{"model.pattern": "attention(window=4) mlp attention+gla mlp"})
    config_lib.save(config, str(tmp_path / "config.json"))
    assert config_lib.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["model"]["pattern"] == config.model.pattern


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("attention(windw=4) mlp", "model.pattern: attention.windw is not a field; did you mean model.pattern: attention.window"),
        ("attention(window=wide) mlp", "window='wide' must be int"),
        ("attention(window=0) mlp", "window=0"),
        ("attention(num_heads=3) mlp", "num_heads"),
        ("attention mlp(hiden=4)", "did you mean model.pattern: mlp.hidden"),
        ("attention mlp(hidden=0)", "hidden=0"),
        ("attention(window=4 mlp", "do not match"),
        ("attention(window) mlp", "not one option=value"),
        ("attention(window=4,window=5)", "not one option=value"),
        ("atention+gla mlp", "did you mean 'attention'"),
        ("attention+mlp", "mlp is a channel layer, which stands alone"),
        ("attention+", "write a layer like"),
        ("", "model.pattern is empty"),
        ("hgrn2(num_heads=2) mlp hgrn2 mlp", "must have the same options"),
    ],
)
def test_a_mistake_is_one_line(layers, said):
    with pytest.raises(UserError) as error:
        build(layers)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_comparisons_understand_both():
    base = {"model": {"pattern": "attention mlp"}}
    found = plan.entries("gla(num_heads=2), wide=attention(window=8,num_heads=2) mlp, attention+mamba2, mamba2(d_state=8)", base)
    assert found == {
        "gla(num_heads=2)": "gla(num_heads=2) mlp",
        "wide": "attention(window=8,num_heads=2) mlp",
        "attention+mamba2": "attention+mamba2 mlp",
        "mamba2(d_state=8)": "mamba2(d_state=8) mamba2(d_state=8)",
    }
    assert len({plan.folder_name(label) for label in found}) == len(found)


def test_options_hold_over_those_of_all_layers():
    config = tiny(**{"model.pattern": "attention(num_heads=1) mlp", "model.mixers.attention.num_heads": 4}).model
    ((name, options),) = pattern.parts_of(pattern.parse_pattern(config.pattern)[0])
    found = pattern.with_options(dict(config.mixers)[name], name, options)
    assert found == dataclasses.replace(mixers.load("attention").Config(), num_heads=1)


def test_more_layers_than_can_be_compiled_one_by_one_are_refused_at_once():
    with pytest.raises(UserError, match="has 10,000 layers; write at most 1,024"):
        pattern.parse_pattern("attention mlp " * 5_000)
    assert len(pattern.parse_pattern("attention mlp " * 512)) == 1_024
