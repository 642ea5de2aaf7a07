"""Linear attention the mixer: its quadratic formula in float64, its options and its refusals.

What every mixer owes (states, documents, dtypes, gradients) is in tests/contract.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import linear_attention
from tests.goldens import golden_forms
from tests.mixers.goldens import assert_logits, checkpoint_model
from tests.ops.judge import relative_error

D_MODEL = 32


def build(**changes):
    return linear_attention.Mixer(linear_attention.Config(**changes), D_MODEL, rngs=nnx.Rngs(params=0))


def inputs(steps=23):
    return np.random.default_rng(0).standard_normal((2, steps, D_MODEL)).astype(np.float32)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


FEATURE_MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "softmax": softmax,
    "identity": lambda x: x,
}


def quadratic(mixer, x):
    """Every pair of steps, as the paper's eq. 4 with a causal mask; no state anywhere."""
    config, (batch, steps, _) = mixer.config, x.shape
    kernels = {
        name: np.asarray(getattr(mixer, f"{name}_kernel")[...], np.float64) for name in ("query", "key", "value", "output")
    }
    phi = FEATURE_MAPS[config.feature_map]
    q, k, v = ((np.float64(x) @ kernels[name]).reshape(batch, steps, config.num_heads, -1) for name in ("query", "key", "value"))
    scores = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * np.tri(steps)
    if config.normalize:
        scores = scores / (scores.sum(-1, keepdims=True) + config.eps)
    o = np.einsum("bhts,bshv->bthv", scores, v)
    if config.norm_eps is not None:
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + config.norm_eps)
    if not config.normalize:
        o = o * mixer.head_dim**-0.5
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + config.eps)
    return o.reshape(x.shape) @ kernels["output"]


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "chunked"))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "relu", "num_heads": 2},
        {"feature_map": "softmax"},
        {"norm_eps": 1e-2},
        {"normalize": False},
        {"normalize": False, "feature_map": "identity", "num_heads": 8},
    ],
    ids=str,
)
def test_equals_the_quadratic_formula(options, implementation):
    mixer, x = build(**options, implementation=implementation, chunk_size=8), inputs()
    assert relative_error(mixer(x)[0], quadratic(mixer, x)) < 2e-6


def test_logits_of_a_checkpoint():
    assert_logits(*checkpoint_model("hf/fla_linear_attn"), 5e-5)


def test_the_normaliser_is_not_rounded_to_the_compute_dtype():
    # Constant values come out as they went in, as far as the compute dtype goes, however many steps the sums run over.
    mixer, x = build(), jnp.ones((1, 300, D_MODEL), jnp.bfloat16)
    kernel = jnp.eye(D_MODEL)
    mixer.value_kernel[...] = kernel
    mixer.output_kernel[...] = kernel
    y, state = mixer(x)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.ones(y.shape, np.float32))


@pytest.mark.parametrize("normalize, columns", [(True, 9), (False, 8)])
def test_the_state_holds_the_normaliser_as_one_more_column(normalize, columns):
    mixer = build(normalize=normalize)
    state = mixer(inputs(), mixer.init_state(2, 100))[1]
    assert state.shape == mixer.init_state(2, 5).shape == (2, 4, 8, columns)
    if normalize:
        q = np.float64(inputs()) @ np.asarray(mixer.key_kernel[...], np.float64)
        expected = FEATURE_MAPS["elu"](q).reshape(2, 23, 4, 8).sum(1)
        assert relative_error(state[..., -1], expected) < 1e-6


@pytest.mark.parametrize(
    "options, said",
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"feature_map": "eluu"}, "'eluu' is not one of elu"),
        ({"feature_map": "identity"}, "normalize=False"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"normalize": False, "norm_eps": 1e-5}, "norm_eps=1e-05"),
        ({"num_heads": 5}, "num_heads=5 must divide model.d_model=32"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        build(**options)


def test_defaults_work_at_every_width_that_is_a_multiple_of_32():
    for d_model in (32, 96, 160):
        mixer = linear_attention.Mixer(linear_attention.Config(), d_model, rngs=nnx.Rngs(params=0))
        assert mixer(jnp.ones((1, 2, d_model)))[0].shape == (1, 2, d_model)
