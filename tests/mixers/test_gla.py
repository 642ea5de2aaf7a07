"""Gated linear attention: flash-linear-attention's checkpoint, the gate of the paper, the initialisation."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import gla
from tests.goldens import golden_forms, load
from tests.mixers.goldens import (
    assert_close,
    assert_logits,
    assert_normal,
    assert_uniform,
    checkpoint_model,
    initial,
    num_parameters,
)
from tests.programs import build


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "parallel", "chunked"))
def test_logits_of_a_checkpoint(implementation):
    network, arrays = checkpoint_model("hf/fla_gla", implementation=implementation)
    assert_logits(network, arrays, 5e-5)


def test_gate_of_table_1():
    arrays = load("table1_gates").arrays
    module = build(lambda rngs: gla.Mixer(gla.Config(num_heads=1, decay_rank=4), 12, rngs=rngs))
    module.decay_in_kernel[...] = jnp.asarray(arrays["W_a1"], jnp.float32)
    module.decay_out_kernel[...] = jnp.asarray(arrays["W_a2k"], jnp.float32)
    module.decay_bias[...] = jnp.zeros_like(module.decay_bias[...])
    log_decay = module.log_decay(jnp.asarray(arrays["x"], jnp.float32))
    assert_close(log_decay[:, :, 0], arrays["loga_gla"], 1e-6)


def test_a_closed_gate_keeps_its_logarithm():
    """sigmoid(-200)^(1/16) underflows before the root is taken; its logarithm is -12.5."""
    module = build(lambda rngs: gla.Mixer(gla.Config(), 32, rngs=rngs))
    module.decay_bias[...] = jnp.full_like(module.decay_bias[...], -200.0)
    assert np.allclose(module.log_decay(jnp.zeros((1, 1, 32))), -12.5)


def test_initialisation():
    """Of the authors' code: Xavier, gain 2^-2.5, for queries, keys and decays; torch's default for the bias."""
    params = initial("gla", gla.Config(decay_rank=64), 256)
    for name, (fan_in, fan_out) in {
        "query": (256, 128),
        "key": (256, 128),
        "decay_in": (256, 64),
        "decay_out": (64, 128),
    }.items():
        assert params[f"{name}_kernel"].shape == (fan_in, fan_out)
        assert_uniform(params[f"{name}_kernel"], 2**-2.5 * (6 / (fan_in + fan_out)) ** 0.5)
    biases = np.concatenate([initial("gla", gla.Config(decay_rank=64), 256, seed)["decay_bias"] for seed in range(40)])
    assert_uniform(biases, 1 / 8)
    for name in ("value", "gate", "output"):
        assert_normal(params[f"{name}_kernel"], 1 / 16)
    assert np.array_equal(params["head_norm"]["scale"], np.ones(64))


def test_sizes():
    scale = 128 // 4
    assert num_parameters("gla", gla.Config.paper(), 128) == 4 * 128**2 + 128 * 16 + 16 * 64 + 64 + scale


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"decay_rank": 0}, "decay_rank=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        gla.Mixer(gla.Config(**options), 32, rngs=nnx.Rngs(params=0))
