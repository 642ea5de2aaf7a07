"""DeltaNet: flash-linear-attention's checkpoint, the initialisation, sizes, mistakes."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import deltanet
from tests.goldens import golden_forms
from tests.mixers.goldens import (
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
        ("head_norm", "scale"): "o_norm.weight",
        ("output_kernel",): "o_proj.weight",
    }
    config = deltanet.Config(num_heads=2, norm_eps=1e-6, implementation=implementation)
    network, arrays, rest = fla_model("hf/fla_delta_net", "deltanet", config, weights, short_conv=True)
    assert not rest
    assert_logits(network, arrays, 5e-5)


def test_initialisation():
    """Normal of deviation 1/sqrt(fan in), torch's default for the convolution, ones for the norm."""
    params = initial("deltanet", deltanet.Config(num_heads=32), 256)
    for name, (fan_in, fan_out) in {
        "input": (256, 768),
        "beta": (256, 32),
        "output": (256, 256),
    }.items():
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_normal(kernel, fan_in**-0.5)
    assert_uniform(params["conv_kernel"], 0.5)
    assert np.array_equal(params["head_norm"]["scale"], np.ones(8))


def test_what_weight_decay_leaves_alone():
    mask = weight_decay("deltanet", deltanet.Config(), 32)
    kept = {name for name, decays in mask.items() if name != "head_norm" and not decays}
    assert kept == set() and not mask["head_norm"]["scale"]


@pytest.mark.parametrize("paper", [False, True])
def test_sizes(paper):
    D, W = 256, 4
    config = deltanet.Config.paper(D) if paper else deltanet.Config()
    H = 2 if paper else 4
    assert config.num_heads == H
    assert num_parameters("deltanet", config, D) == 4 * D**2 + (3 * W + H) * D + D // H
    module = nnx.eval_shape(lambda: deltanet.Mixer(config, D, rngs=nnx.Rngs(params=0)))
    state = jax.eval_shape(lambda: module.init_state(1, 100))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state) == 4 * (D * D // H + (W - 1) * 3 * D)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "deltanet.num_heads=0"),
        ({"num_heads": 3}, "deltanet.num_heads=3 must divide"),
        ({"conv_width": 0}, "deltanet.conv_width=0"),
        ({"chunk_size": 0}, "deltanet.chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        deltanet.Mixer(deltanet.Config(**options), 32, rngs=nnx.Rngs(params=0))
