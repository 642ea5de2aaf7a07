"""Retention: torchscale's layer and initialisation, flash-linear-attention's checkpoint, the paper's decays."""

import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import retnet
from tests.goldens import golden_forms, load
from tests.mixers.goldens import (
    assert_close,
    assert_layer,
    assert_logits,
    assert_uniform,
    checkpoint_model,
    initial,
    num_parameters,
)

# The reference divides by running sums before the norm, so it agrees with itself only up to the norm's epsilon (4e-5).
LAYER_BOUND = 1e-4


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "parallel", "chunked"))
def test_torchscale_layer(implementation):
    golden = load("layer_retnet")
    config = retnet.Config(num_heads=2, key_expansion=1.0, value_expansion=2.0, norm_eps=1e-6, implementation=implementation)
    names = {
        "query_kernel": "q_proj.weight",
        "key_kernel": "k_proj.weight",
        "value_kernel": "v_proj.weight",
        "gate_kernel": "g_proj.weight",
        "output_kernel": "out_proj.weight",
    }
    module = nnx.eval_shape(lambda: retnet.Mixer(config, 16, rngs=nnx.Rngs(params=0)))
    assert_layer(module, golden, names, LAYER_BOUND)
    assert_close(module.log_decay(), golden.arrays["log_decay"], 1e-6)


def test_logits_of_a_checkpoint():
    assert_logits(*checkpoint_model("hf/fla_retnet"), 5e-5)


def test_initialisation():
    """Xavier, gain 2^-2.5 for what enters and 2^-1 for what leaves."""
    params = initial("retnet", retnet.Config(value_expansion=2.0), 128)
    for name, (fan_in, fan_out), gain in [
        ("query", (128, 64), 2**-2.5),
        ("key", (128, 64), 2**-2.5),
        ("value", (128, 256), 2**-2.5),
        ("gate", (128, 256), 2**-2.5),
        ("output", (256, 128), 2**-1.0),
    ]:
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_uniform(kernel, gain * (6 / (fan_in + fan_out)) ** 0.5)


def test_sizes():
    assert num_parameters("retnet", retnet.Config(), 128) == 4 * 128**2
    paper = nnx.eval_shape(lambda: retnet.Mixer(retnet.Config.paper(512), 512, rngs=nnx.Rngs(params=0)))
    assert (paper.config.num_heads, paper.key_head_dim, paper.value_head_dim) == (2, 256, 512)
    assert np.allclose(np.exp(paper.log_decay()), [1 - 1 / 32, 1 - 1 / 64])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"num_heads": 16}, "rope='retnet' turns pairs of features, but a key has 1"),
        ({"rope": "alibi"}, "rope='alibi' is not one of retnet, llama, none"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        retnet.Mixer(retnet.Config(**options), 32, rngs=nnx.Rngs(params=0))
