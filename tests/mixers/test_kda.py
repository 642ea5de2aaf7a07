"""Kimi delta attention: flash-linear-attention's checkpoint, its two decays, the initialisation, sizes, mistakes."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import kda
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


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "chunked"))
def test_logits_of_a_checkpoint(implementation):
    weights = {
        ("input_kernel",): ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
        ("conv_kernel",): ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"],
        ("beta_kernel",): "b_proj.weight",
        ("dt_in_kernel",): "f_proj.0.weight",
        ("dt_out_kernel",): "f_proj.1.weight",
        ("dt_bias",): "dt_bias",
        ("A_log",): "A_log",
        ("gate_in_kernel",): "g_proj.0.weight",
        ("gate_out_kernel",): "g_proj.1.weight",
        ("gate_bias",): "g_proj.1.bias",
        ("head_norm", "scale"): "o_norm.weight",
        ("output_kernel",): "o_proj.weight",
    }
    config = kda.Config(num_heads=2, key_expansion=0.5, value_expansion=0.5, norm_eps=1e-6, implementation=implementation)
    network, arrays, rest = fla_model("hf/fla_kda", "kda", config, weights, short_conv=True)
    assert not rest
    assert_logits(network, arrays, 5e-5)


def test_a_floor_under_the_log_decay():
    """-5 sigmoid(A (logit + b)), in float64; without a floor the same logits give -A softplus(logit + b)."""
    x = 3.0 * jax.random.normal(jax.random.key(2), (2, 20, 32))
    floored, free = (kda.Mixer(kda.Config(log_decay_floor=floor), 32, rngs=nnx.Rngs(params=0)) for floor in (-5.0, None))
    params = initial("kda", kda.Config(), 32)
    logit = np.asarray(x, np.float64) @ params["dt_in_kernel"] @ params["dt_out_kernel"] + params["dt_bias"]
    logit, A = logit.reshape(2, 20, 4, 8), np.exp(params["A_log"].astype(np.float64))[:, None]
    assert_close(free.log_decay(x), -A * np.logaddexp(logit, 0.0), 1e-5)
    assert_close(floored.log_decay(x), -5.0 / (1.0 + np.exp(-A * logit)), 1e-5)
    assert floored.log_decay(x).min() >= -5.0 > free.log_decay(x).min()


def test_initialisation():
    """A uniform in [1, 16], dt log-uniform in [1e-3, 1e-1], b_g = 0; normal kernels, torch's convolution."""
    config = kda.Config(num_heads=256, decay_rank=64, gate_rank=64)
    params = initial("kda", config, 256)
    for name, (fan_in, fan_out) in {
        "input": (256, 768),
        "beta": (256, 256),
        "dt_in": (256, 64),
        "dt_out": (64, 256),
        "gate_in": (256, 64),
        "gate_out": (64, 256),
        "output": (256, 256),
    }.items():
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_normal(kernel, fan_in**-0.5)
    assert_uniform(params["conv_kernel"], 0.5)
    assert np.array_equal(params["gate_bias"], np.zeros(256))
    assert np.array_equal(params["head_norm"]["scale"], np.ones(1))
    many = [initial("kda", config, 256, seed) for seed in range(8)]
    A = np.exp(np.concatenate([one["A_log"] for one in many]).astype(np.float64))
    assert_uniform(A - 8.5, 7.5 * (1 + 1e-6))
    dt = np.logaddexp(np.concatenate([one["dt_bias"] for one in many]).astype(np.float64), 0.0)
    assert_uniform(np.log(dt / 1e-2), np.log(10) * (1 + 1e-4))


def test_what_weight_decay_leaves_alone():
    mask = weight_decay("kda", kda.Config(), 32)
    kept = {name for name, decays in mask.items() if name != "head_norm" and not decays}
    assert kept == {"dt_in_kernel", "dt_out_kernel", "dt_bias", "A_log", "gate_bias"} and not mask["head_norm"]["scale"]


@pytest.mark.parametrize("paper", [False, True])
def test_sizes(paper):
    D, W = 256, 4
    config = kda.Config.paper(D) if paper else kda.Config()
    H, rank = (2, 128) if paper else (4, 16)
    assert (config.num_heads, config.decay_rank, config.gate_rank) == (H, rank, rank)
    assert num_parameters("kda", config, D) == 4 * D**2 + (3 * W + H + 4 * rank + 2) * D + H + D // H
    module = nnx.eval_shape(lambda: kda.Mixer(config, D, rngs=nnx.Rngs(params=0)))
    state = jax.eval_shape(lambda: module.init_state(1, 100))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state) == 4 * (D * D // H + (W - 1) * 3 * D)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "kda.num_heads=0"),
        ({"num_heads": 3}, "kda.num_heads=3 must divide"),
        ({"conv_width": 0}, "kda.conv_width=0"),
        ({"decay_rank": 0}, "kda.decay_rank=0"),
        ({"gate_rank": 0}, "kda.gate_rank=0"),
        ({"log_decay_floor": 0.0}, "kda.log_decay_floor=0.0 must be negative"),
        ({"chunk_size": 0}, "kda.chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        kda.Mixer(kda.Config(**options), 32, rngs=nnx.Rngs(params=0))
