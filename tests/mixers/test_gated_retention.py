"""Gated retention: the layer of YOCO's authors, their initialisation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import gated_retention
from tests.goldens import golden_forms, load
from tests.mixers.goldens import assert_close, assert_layer, assert_uniform, initial, num_parameters
from tests.programs import build


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "parallel", "chunked"))
def test_layer_of_yoco(implementation):
    config = gated_retention.Config(num_heads=2, key_expansion=1.0, norm_eps=1e-5, implementation=implementation)
    names = {
        "query_kernel": "q_proj.weight",
        "key_kernel": "k_proj.weight",
        "value_kernel": "v_proj.weight",
        "gate_kernel": "g_proj.weight",
        "decay_kernel": "gt_proj.weight",
        "output_kernel": "out_proj.weight",
    }
    module = nnx.eval_shape(lambda: gated_retention.Mixer(config, 16, rngs=nnx.Rngs(params=0)))
    assert_layer(module, load("layer_gated_retention"), names, 2e-5)


def test_gate_of_table_1():
    arrays = load("table1_gates").arrays
    config = gated_retention.Config(num_heads=1, key_expansion=1.0)
    module = build(lambda rngs: gated_retention.Mixer(config, 12, rngs=rngs))
    module.decay_kernel[...] = jnp.asarray(arrays["W_s"], jnp.float32)
    log_decay = module.log_decay(jnp.asarray(arrays["x"], jnp.float32))
    assert_close(log_decay[..., 0], arrays["logg_gated_retention"], 1e-6)


def test_a_closed_gate_keeps_its_logarithm():
    """sigmoid(-200)^(1/16) underflows before the root is taken; its logarithm is -12.5."""
    module = build(lambda rngs: gated_retention.Mixer(gated_retention.Config(num_heads=1), 32, rngs=rngs))
    module.decay_kernel[...] = jnp.full((32, 1), -200.0 / 32)
    assert np.allclose(module.log_decay(jnp.ones((1, 1, 32))), -12.5)


def test_initialisation():
    """Xavier, gain 2^-2.5 for what enters and 2^-1 for what leaves."""
    params = initial("gated_retention", gated_retention.Config(num_heads=32), 128)
    widths = {"query": (64, 2**-2.5), "key": (64, 2**-2.5), "value": (128, 2**-2.5), "gate": (128, 2**-2.5)}
    widths |= {"decay": (32, 2**-2.5), "output": (128, 2**-1.0)}
    assert params.keys() == {f"{name}_kernel" for name in widths}
    for name, (fan_out, gain) in widths.items():
        assert params[f"{name}_kernel"].shape == (128, fan_out)
        assert_uniform(params[f"{name}_kernel"], gain * (6 / (128 + fan_out)) ** 0.5)


def test_sizes():
    assert num_parameters("gated_retention", gated_retention.Config(), 128) == 4 * 128**2 + 4 * 128
    paper = gated_retention.Config.paper(1024)
    assert paper == dataclasses.replace(gated_retention.Config(), num_heads=4, key_expansion=1.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"num_heads": 16}, "num_heads=16 .* even"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        gated_retention.Mixer(gated_retention.Config(**options), 32, rngs=nnx.Rngs(params=0))
