"""Gated DeltaNet: flash-linear-attention's checkpoint, grouped values, the initialisation, sizes, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import gated_deltanet
from tests.goldens import golden_forms
from tests.mixers.goldens import (
    assert_close,
    assert_logits,
    assert_normal,
    assert_uniform,
    fla_model,
    initial,
    num_parameters,
    weight_decay,
)
from tests.programs import build, fast_jit


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "chunked"))
def test_logits_of_a_checkpoint(implementation):
    weights = {
        ("input_kernel",): ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
        ("conv_kernel",): ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"],
        ("beta_kernel",): "b_proj.weight",
        ("gate_kernel",): "g_proj.weight",
        ("dt_kernel",): "a_proj.weight",
        ("dt_bias",): "dt_bias",
        ("A_log",): "A_log",
        ("head_norm", "scale"): "o_norm.weight",
        ("output_kernel",): "o_proj.weight",
    }
    config = gated_deltanet.Config(num_heads=2, norm_eps=1e-6, implementation=implementation)
    network, arrays, rest = fla_model("hf/fla_gated_deltanet", "gated_deltanet", config, weights, short_conv=True)
    assert not rest
    assert_logits(network, arrays, 5e-5)


def test_value_heads_of_a_group_share_queries_and_keys():
    """Four value heads on two heads are four heads whose queries, keys and their convolutions are there twice."""
    grouped = build(lambda rngs: gated_deltanet.Mixer(gated_deltanet.Config(num_heads=2, num_value_heads=4), 32, rngs=rngs))
    plain = build(lambda rngs: gated_deltanet.Mixer(gated_deltanet.Config(num_heads=4, key_expansion=1.0), 32, rngs=rngs), 1)
    for name in ("input_kernel", "conv_kernel"):
        q, k, v = jnp.split(getattr(grouped, name)[...], [16, 32], axis=1)
        twice = [jnp.repeat(x.reshape(-1, 2, 8), 2, axis=1).reshape(-1, 32) for x in (q, k)]
        getattr(plain, name)[...] = jnp.concatenate([*twice, v], axis=1)
    for name in ("gate_kernel", "beta_kernel", "dt_kernel", "dt_bias", "A_log", "output_kernel"):
        getattr(plain, name)[...] = getattr(grouped, name)[...]
    x = jax.random.normal(jax.random.key(2), (2, 20, 32))
    call = fast_jit(lambda module: module(x)[0])
    assert_close(call(grouped), call(plain), 1e-5)


def test_a_closed_gate_keeps_its_logarithm():
    module = build(lambda rngs: gated_deltanet.Mixer(gated_deltanet.Config(), 32, rngs=rngs))
    module.A_log[...] = jnp.zeros(4)
    module.dt_bias[...] = jnp.full(4, 300.0)
    assert np.array_equal(module.log_decay(jnp.zeros((1, 1, 32))), np.full((1, 1, 4), -300.0))


def test_initialisation():
    """A uniform in (0, 16], dt log-uniform in [1e-3, 1e-1]; normal kernels, torch's default for the convolution."""
    config = gated_deltanet.Config(num_heads=1, num_value_heads=512, value_expansion=2.0)
    params = initial("gated_deltanet", config, 256)
    for name, (fan_in, fan_out) in {
        "input": (256, 2 * 128 + 512),
        "gate": (256, 512),
        "beta": (256, 512),
        "dt": (256, 512),
        "output": (512, 256),
    }.items():
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_normal(kernel, fan_in**-0.5)
    assert_uniform(params["conv_kernel"], 0.5)
    assert np.array_equal(params["head_norm"]["scale"], np.ones(1))
    many = [initial("gated_deltanet", config, 256, seed) for seed in range(4)]
    A = np.exp(np.concatenate([one["A_log"] for one in many]).astype(np.float64))
    assert_uniform(A - 8.0, 8.0 * (1 + 1e-6))
    dt = np.logaddexp(np.concatenate([one["dt_bias"] for one in many]).astype(np.float64), 0.0)
    assert_uniform(np.log(dt / 1e-2), np.log(10) * (1 + 1e-4))


def test_what_weight_decay_leaves_alone():
    mask = weight_decay("gated_deltanet", gated_deltanet.Config(), 32)
    kept = {name for name, decays in mask.items() if name != "head_norm" and not decays}
    assert kept == {"dt_kernel", "dt_bias", "A_log"} and not mask["head_norm"]["scale"]


@pytest.mark.parametrize("paper", [False, True])
def test_sizes(paper):
    D, W = 1024, 4
    config = gated_deltanet.Config.paper(D) if paper else gated_deltanet.Config()
    H, K, V = (3, 256, 512) if paper else (4, 128, 256)
    assert config.num_heads == H
    assert num_parameters("gated_deltanet", config, D) == (D * H * (2 * K + 3 * V) + W * H * (2 * K + V) + 2 * D * H + 2 * H + V)
    module = nnx.eval_shape(lambda: gated_deltanet.Mixer(config, D, rngs=nnx.Rngs(params=0)))
    state = jax.eval_shape(lambda: module.init_state(1, 100))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state) == 4 * (H * K * V + (W - 1) * H * (2 * K + V))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "gated_deltanet.num_heads=0"),
        ({"num_heads": 3}, "gated_deltanet.num_heads=3 must divide the width of keys"),
        ({"num_value_heads": 0}, "gated_deltanet.num_value_heads=0"),
        ({"num_value_heads": 6}, "gated_deltanet.num_value_heads=6 must be a multiple of num_heads=4"),
        ({"num_value_heads": 12}, "gated_deltanet.num_value_heads=12 .* must divide the width of values"),
        ({"conv_width": 0}, "gated_deltanet.conv_width=0"),
        ({"chunk_size": 0}, "gated_deltanet.chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        gated_deltanet.Mixer(gated_deltanet.Config(**options), 32, rngs=nnx.Rngs(params=0))
