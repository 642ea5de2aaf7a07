"""The channel layer rwkv_channel_mix: its authors' layer and initialisation, its size, and its state inside a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import model
from seqmodels.channel_layers import mlp, rwkv_channel_mix
from seqmodels.errors import UserError
from seqmodels.layers import rwkv_depth
from tests.configs import tiny
from tests.goldens import load
from tests.mixers.goldens import assert_layer
from tests.programs import fast_jit

NAMES = {
    "key_mix": "time_maa_k",
    "receptance_mix": "time_maa_r",
    "key_kernel": "key.weight",
    "receptance_kernel": "receptance.weight",
    "output_kernel": "value.weight",
}


def build(**overrides):
    settings = {"pattern": "rwkv6 rwkv_channel_mix"} | overrides
    config = tiny(**{f"model.{name}": value for name, value in settings.items()}).model
    params = fast_jit(lambda key: model.init_params(config, 50, key))(jax.random.key(0))
    return params, model.merge(model.graphdef(config, 50), params)


def test_layer_of_the_authors():
    golden = load("layer_rwkv6_cmix")
    arrays = {name: array.reshape(-1) if "time_maa" in name else array for name, array in golden.arrays.items()}
    module = rwkv_channel_mix.Layer(rwkv_channel_mix.Config(hidden=28), 16, rngs=nnx.Rngs(params=0))
    assert_layer(module, dataclasses.replace(golden, arrays=arrays), NAMES, 1e-5)


def test_initial_mix_goes_by_depth():
    """1 - c^(1 - l/L), as the time mix's blend of keys, in a model where layer 2 l + 1 is in block l."""
    params, _ = build(d_model=16, repeats=3, **{"mixers.rwkv6.num_heads": 2})
    layer = params["layers"]["1_rwkv_channel_mix"]["layer"]
    expected = 1 - (np.arange(16) / 16) ** (1 - np.arange(3)[:, None] / 3)
    for name in ("key_mix", "receptance_mix"):
        np.testing.assert_allclose(layer[name], expected, atol=1e-6)
    published = load("layer_rwkv6_tmix").arrays["init.time_maa_k"].reshape(-1)
    np.testing.assert_allclose(layer["key_mix"][1], published, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
def test_depth_runs_from_the_first_block_to_the_last(num_layers):
    depths = [rwkv_depth(index, num_layers) for index in range(num_layers)]
    assert depths[0] == (0.0, 1.0)
    blocks = -(-num_layers // 2)
    assert depths[-1] == (float(blocks > 1), pytest.approx(1 / blocks))
    assert depths[0::2][: len(depths[1::2])] == depths[1::2], "both layers of a block are equally deep"


@pytest.mark.parametrize("d_model", [32, 96, 128, 256, 768])
def test_as_many_parameters_as_the_gated_mlp(d_model):
    def count(module):
        layer = nnx.eval_shape(lambda: module.Layer(module.Config(), d_model, rngs=nnx.Rngs(params=0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(layer, nnx.Param))))

    gated, mixing = count(mlp), count(rwkv_channel_mix)
    assert mixing == gated + 2 * d_model and mixing < 1.01 * gated


def test_the_width_asked_for_is_the_width():
    for pattern, hidden in (
        ("rwkv6 rwkv_channel_mix(hidden=48)", 48),
        ("rwkv6 rwkv_channel_mix", rwkv_channel_mix.default_hidden(32)),
    ):
        params = model.param_shapes(tiny(**{"model.pattern": pattern}).model, 50)
        assert params["layers"]["1_rwkv_channel_mix"]["layer"]["output_kernel"].shape == (2, hidden, 32)


def test_its_state_is_the_last_input_and_survives_unstacking():
    _, network = build()
    call = fast_jit(lambda network, *arguments: network(*arguments))
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 50)
    empty = network.init_state(3, 20)
    assert (empty[1].shape, empty[1].dtype) == ((2, 3, 32), jnp.float32)
    _, state = call(network, tokens, empty)
    assert float(jnp.abs(state[1]).min(axis=(1, 2)).max()) > 0.0
    unstacked = network.unstack_state(state)
    jax.tree.map(np.testing.assert_array_equal, network.stack_state(unstacked), state)
    step = tokens[:, :1]
    logits, after = call(network, step, state)
    unstacked_logits, unstacked = call(network, step, unstacked)
    np.testing.assert_allclose(logits, unstacked_logits, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), after, network.stack_state(unstacked))
    forgotten, _ = call(network, step, (state[0], jnp.zeros_like(state[1])))
    assert float(jnp.abs(forgotten - logits).max()) > 1e-4, "the state of the channel layer changes nothing"


def test_an_unknown_channel_layer_is_a_mistake():
    with pytest.raises(UserError, match="no mixer or channel layer 'rwkv_chanel_mix'; did you mean 'rwkv_channel_mix'"):
        build(pattern="rwkv6 rwkv_chanel_mix")
