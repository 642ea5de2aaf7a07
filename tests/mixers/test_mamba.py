"""Mamba: its authors' layer, transformers' checkpoint, the authors' initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import mamba
from tests.goldens import golden_forms, load
from tests.mixers.goldens import (
    assert_close,
    assert_layer,
    assert_logits,
    assert_uniform,
    checkpoint_model,
    initial,
    places,
    shapes,
    weight_decay,
)
from tests.programs import build


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "chunked"))
def test_layer_of_the_authors(implementation):
    golden = load("layer_mamba1")
    module = nnx.eval_shape(
        lambda: mamba.Mixer(mamba.Config(d_state=8, implementation=implementation), 16, rngs=nnx.Rngs(params=0))
    )
    assert_layer(module, golden, places("mamba", shapes(module)), 5e-6)


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "chunked"))
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_logits_of_a_checkpoint(name, implementation):
    network, arrays = checkpoint_model(f"hf/{name}", implementation=implementation)
    assert_logits(network, arrays, 5e-5)


def test_the_norm_of_falcon_mamba():
    """r, B and C have a mean square of 1, so that the scale of W_s does not matter."""
    config = mamba.Config(selection_norm=True)
    module = build(lambda rngs: mamba.Mixer(config, 32, rngs=rngs))
    u = jax.random.normal(jax.random.key(1), (2, 5, 64))
    dt, B, C = module.selection(u)
    for part in (B, C):
        assert np.allclose(jnp.mean(part**2, axis=-1), 1.0, atol=1e-4)
    module.selection_kernel[...] = 7.0 * module.selection_kernel[...]
    for scaled, part in zip(module.selection(u), (dt, B, C)):
        assert_close(scaled, part, 1e-3)  # the epsilon shows
    plain = build(lambda rngs: mamba.Mixer(mamba.Config(), 32, rngs=rngs))
    assert not np.allclose(plain.selection(u)[1], B, atol=1e-2)


def test_initialisation():
    """A is -1 .. -N in every channel, D is 1, dt log-uniform in [1e-3, 1e-1]; torch's defaults for the rest."""
    params = initial("mamba", mamba.Config(), 256)
    assert np.allclose(-np.exp(params["A_log"]), np.broadcast_to(load("inits").arrays["mamba1_A"], (512, 16)))
    assert np.array_equal(params["D"], np.ones(512))
    dt = np.logaddexp(params["dt_bias"].astype(np.float64), 0.0)
    assert_uniform(np.log(dt / 1e-2), np.log(10) * (1 + 1e-4))
    for name, fan_in, fan_out in [
        ("input", 256, 512),
        ("gate", 256, 512),
        ("conv", 4, 512),
        ("selection", 512, 16 + 2 * 16),
        ("dt", 16, 512),
        ("output", 512, 256),
    ]:
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_uniform(kernel, fan_in**-0.5)
    assert_uniform(params["conv_bias"], 0.5)


def test_what_weight_decay_leaves_alone():
    mask = weight_decay("mamba", mamba.Config(), 32)
    decayed = {"input_kernel", "gate_kernel", "conv_kernel", "selection_kernel", "output_kernel"}
    assert {name for name, decays in mask.items() if decays} == decayed


@pytest.mark.parametrize(("d_model", "rank"), [(32, 2), (96, 6), (128, 8)])
def test_sizes(d_model, rank):
    params = initial("mamba", mamba.Config.paper(), d_model)
    inner = 2 * d_model
    expected = 3 * inner * d_model + inner * (2 * rank + 2 * 16 + 16 + 4 + 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    assert params["dt_kernel"].shape == (rank, inner)
    module = nnx.eval_shape(lambda: mamba.Mixer(mamba.Config(), d_model, rngs=nnx.Rngs(params=0)))
    state = jax.eval_shape(lambda: module.init_state(1, 100))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state) == 4 * inner * (16 + 3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"expand": 0}, "mamba.expand=0"),
        ({"d_state": 0}, "mamba.d_state=0"),
        ({"conv_width": 0}, "mamba.conv_width=0"),
        ({"dt_rank": 0}, "mamba.dt_rank=0"),
        ({"chunk_size": 0}, "mamba.chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        mamba.Mixer(mamba.Config(**options), 32, rngs=nnx.Rngs(params=0))


def test_no_parallel_form():
    module = mamba.Mixer(mamba.Config(implementation="parallel"), 32, rngs=nnx.Rngs(params=0))
    with pytest.raises(NotImplementedError, match="full rank"):
        module(jnp.zeros((1, 3, 32)))
