"""The language model around the mixers: stacking, patterns, heads, dropout, remat, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import mixers, model, ops
from seqmodels.errors import UserError
from seqmodels.layers import has_short_conv
from tests.configs import START, tiny
from tests.programs import fast_jit

VOCAB = 50


def config_of(**overrides):
    return tiny(**{f"model.{name}": value for name, value in overrides.items()}).model


def build(**overrides):
    config = config_of(**overrides)
    params = fast_jit(lambda key: model.init_params(config, VOCAB, key))(jax.random.key(0))
    return config, params, model.merge(model.graphdef(config, VOCAB), params)


@fast_jit
def call(network, *arguments):
    return network(*arguments)


@fast_jit
def features(network, tokens, dropout_key=None):
    return network.features(tokens, dropout_key=dropout_key)[0]


def tokens(batch=2, time=9):
    return jax.random.randint(jax.random.key(1), (batch, time), 0, VOCAB)


def test_repeats_are_independent_layers():
    _, params, _ = build(pattern="attention mlp", repeats=3)
    kernel = params["layers"]["0_attention"]["layer"]["query_kernel"]
    assert kernel.shape == (3, 32, 32)
    assert not np.allclose(kernel[0], kernel[1])


def test_scan_over_repeats_equals_the_layers_written_out():
    """Two repeats of "attention mlp" are one repeat of "attention mlp attention mlp"."""
    _, stacked, network = build(pattern="attention mlp", repeats=2)
    config, unstacked, _ = build(pattern="attention mlp attention mlp", repeats=1)
    for position, name in enumerate(("0_attention", "1_mlp", "2_attention", "3_mlp")):
        source = stacked["layers"][("0_attention", "1_mlp")[position % 2]]
        unstacked["layers"][name] = jax.tree.map(lambda leaf, at=position // 2: leaf[at][None], source)
    unstacked |= {"embedding": stacked["embedding"], "final_norm": stacked["final_norm"]}
    written_out = model.merge(model.graphdef(config, VOCAB), unstacked)
    np.testing.assert_allclose(call(network, tokens())[0], call(written_out, tokens())[0], rtol=0, atol=1e-5)


def test_unstacked_state_is_the_same_step():
    _, _, network = build(pattern="attention mlp linear_attention mlp", repeats=2)
    state = network.init_state(2, 12)
    _, state = call(network, tokens(), state)
    step = tokens(time=1)
    logits, after = call(network, step, state)

    @fast_jit
    def unstacked_call(network, step, state):
        logits, state = network(step, network.unstack_state(state))
        return logits, network.stack_state(state)

    unstacked_logits, stacked = unstacked_call(network, step, state)
    np.testing.assert_allclose(logits, unstacked_logits, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), after, stacked)


@pytest.mark.tools
@pytest.mark.parametrize("repeats", [1, 2])
def test_remat_changes_memory_not_mathematics(repeats):
    config, params, _ = build(repeats=repeats)

    def loss(params, remat):
        definition = model.graphdef(dataclasses.replace(config, remat=remat), VOCAB)
        return jnp.sum(jnp.square(model.merge(definition, params)(tokens())[0]))

    plain, remat = (fast_jit(jax.value_and_grad(loss), static_argnums=1)(params, flag) for flag in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, remat)


def test_dropout_masks_differ_by_key_and_layer_and_vanish_in_evaluation():
    _, _, network = build(pattern="mlp", repeats=2, dropout=0.5)
    x = tokens()
    first, second = (features(network, x, jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, features(network, x, jax.random.key(0)))
    np.testing.assert_array_equal(features(network, x), features(network, x))


def test_tied_head_is_the_embedding():
    _, params, network = build(tie_embeddings=True)
    np.testing.assert_array_equal(network.head_kernel(), params["embedding"].T)
    _, params, network = build(tie_embeddings=False)
    np.testing.assert_array_equal(network.head_kernel(), params["output_kernel"])


def test_bfloat16_computes_narrow_and_keeps_parameters_and_logits_wide():
    _, params, network = build(compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert features(network, tokens()).dtype == jnp.bfloat16
    logits, _ = call(network, tokens())
    assert logits.dtype == jnp.float32
    _, _, wide = build(compute_dtype="float32")
    np.testing.assert_allclose(logits, call(wide, tokens())[0], atol=0.05)


def test_depth_scales_what_layers_add():
    """The residual stream's variance must not grow with depth: output kernels start at 1/sqrt(layers)."""
    _, shallow, _ = build(pattern="mlp", repeats=1)
    _, deep, _ = build(pattern="mlp", repeats=16)
    ratio = np.std(shallow["layers"]["0_mlp"]["layer"]["output_kernel"]) / np.std(
        deep["layers"]["0_mlp"]["layer"]["output_kernel"]
    )
    assert abs(ratio - 4.0) < 0.2


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="num_heads"):
        build(**{"mixers.attention.num_heads": 5})
    with pytest.raises(UserError, match="model.channel_layers.mlp.activation='swish'"):
        build(pattern="mlp", **{"channel_layers.mlp.activation": "swish"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("d_model", [64, pytest.param(1024, marks=pytest.mark.tools)])
def test_the_untrained_model_guesses_at_random(d_model, tied):
    """A tied head sees the token's own embedding in the stream; at no width does it begin by repeating the token."""
    _, _, network = build(
        d_model=d_model, pattern="attention mlp", repeats=1, tie_embeddings=tied, branch_rms=START["model.branch_rms"]
    )
    ids = tokens(4, 33)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(call(network, ids[:, :-1])[0]), ids[:, 1:, None], axis=-1)
    assert abs(losses.mean() - np.log(VOCAB)) < 0.4


def test_a_start_without_scaled_branches_is_the_layers_own():
    """An older run's start: embeddings as they are, output kernels times 1/sqrt(layers) and nothing else."""
    _, unscaled, _ = build(branch_rms=None)
    _, scaled, _ = build(branch_rms=0.3)
    for name, layer in unscaled["layers"].items():
        ratio = scaled["layers"][name]["layer"]["output_kernel"] / layer["layer"]["output_kernel"]
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
        assert not np.allclose(ratio, 1.0)
    unscaled["layers"] = scaled["layers"] = None
    jax.tree.map(np.testing.assert_array_equal, unscaled, scaled)


@pytest.mark.parametrize("field, value", [("branch_rms", -0.1), ("branch_rms", float("nan"))])
def test_a_start_out_of_range_is_one_line(field, value):
    with pytest.raises(UserError, match=field):
        build(**{field: value})


def test_the_start_is_not_in_the_record_of_forms():
    with ops.record_choices() as choices:
        build(branch_rms=START["model.branch_rms"])
    assert not choices


def test_short_conv_all_gives_one_to_layers_whose_mixers_have_none():
    """A pattern of every case: none, side by side with one that has, its own, switched off, a token shift, a channel layer."""
    config = config_of(
        pattern="attention attention+mamba mamba linear_attention(conv_width=4) rwkv6 mlstm(block=v2) rwkv_channel_mix",
        repeats=1,
        short_conv="all",
    )
    params = model.param_shapes(config, VOCAB)
    having = [name for name, layer in params["layers"].items() if "short_conv" in layer]
    assert having == ["0_attention", "1_attention+mamba", "5_mlstm"]
    assert params["layers"]["0_attention"]["short_conv"]["conv_kernel"].shape == (1, 4, 32)
    mask = model.weight_decay_mask(config, VOCAB)["layers"]
    assert all(mask[name]["short_conv"]["conv_kernel"] for name in having)


@pytest.mark.parametrize("mixer", mixers.names())
def test_what_has_a_short_convolution_sees_the_step_before_by_it(mixer):
    """A mixer that says so imports an op that mixes neighbouring steps, or their common projection; no other does."""
    module = mixers.load(mixer)
    mixing = any(hasattr(module, name) for name in ("causal_conv", "token_shift", "delta_inputs"))
    assert has_short_conv(module.Config()) == (mixing and mixer != "linear_attention")


def test_short_conv_none_leaves_no_taps_but_the_current_one():
    params = model.param_shapes(config_of(pattern="mamba gla", repeats=1, short_conv="none"), VOCAB)
    assert params["layers"]["0_mamba"]["layer"]["conv_kernel"].shape[1] == 1
    with pytest.raises(UserError, match="leave one out"):
        build(pattern="mamba(conv_width=3)", short_conv="none")


def test_attention_weights_are_of_what_the_mixer_reads():
    _, _, network = build(pattern="attention", repeats=1, short_conv="all")

    @fast_jit
    def by_two_ways(network):
        (layer,) = jax.tree.map(lambda leaf: leaf[0], network._layers())
        read, _ = layer.short_conv(layer.norm(network.embed(tokens())))
        return network.attention_weights(tokens())[0], layer.layer.weights(read)

    np.testing.assert_allclose(*by_two_ways(network), atol=1e-6)
