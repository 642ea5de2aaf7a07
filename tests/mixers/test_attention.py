"""What the attention mixer adds to its op: projections, positions, options, the size of its state, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers.attention import Config, Mixer
from tests import programs

D = 32


def build(d_model=D, **options):
    constructor = {name: options.pop(name) for name in ("compute_dtype",) if name in options}
    return programs.build(lambda rngs: Mixer(Config(**options), d_model, rngs=rngs, **constructor))


@programs.fast_jit
def call(mixer, x, state=None, reset=None):
    return mixer(x, state, reset=reset)


def draw(B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


def close(actual, expected, tolerance=5e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), atol=tolerance, rtol=0)


def test_equation():
    """softmax(q k^T / sqrt(K)) v in every head, heads side by side, times W_o; in float64, from the parameters."""
    mixer, x = build(rope=False, num_kv_heads=2), draw(1, 9)
    y, _ = call(mixer, x)
    rows = np.asarray(x[0], np.float64)
    kernels = (mixer.query_kernel, mixer.key_kernel, mixer.value_kernel)
    q, k, v = (rows @ np.asarray(kernel[...], np.float64) for kernel in kernels)
    heads = []
    for h in range(4):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        scores = np.where(np.tri(9, dtype=bool), q[:, own] @ k[:, shared].T / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
    close(y[0], np.concatenate(heads, axis=1) @ np.asarray(mixer.output_kernel[...], np.float64))


@pytest.mark.parametrize(
    ("options", "max_len", "shape"),
    [
        ({}, 50, (3, 4, 50, 8)),
        ({"num_kv_heads": 1}, 50, (3, 1, 50, 8)),
        ({"window": 7}, 50, (3, 4, 7, 8)),
        ({"window": 70}, 50, (3, 4, 50, 8)),
        ({"head_dim": 6}, 50, (3, 4, 50, 6)),
    ],
)
def test_state_holds_what_can_be_seen(options, max_len, shape):
    mixer = nnx.eval_shape(lambda: Mixer(Config(**options), D, rngs=nnx.Rngs(0), compute_dtype=jnp.bfloat16))
    state = jax.eval_shape(lambda: mixer.init_state(3, max_len))
    assert state.cache.keys.shape == state.cache.values.shape == shape
    assert state.cache.keys.dtype == state.cache.values.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (state.cache.cursor, state.cache.live, state.position)} == {jnp.dtype(jnp.int32)}
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))


def test_a_piece_longer_than_the_ring():
    mixer, x = build(window=5), draw(2, 40)
    expected, _ = call(mixer, x)
    state, outputs = mixer.init_state(2, 100), []
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        y, state = call(mixer, x[:, start:stop], state)
        outputs.append(y)
    close(jnp.concatenate(outputs, axis=1), expected)
    np.testing.assert_array_equal(state.position, [40, 40])


def test_positions_start_again_with_a_document():
    """With the ring cut by the op, what is left to see is the rotation: a document is read alike wherever it stands."""
    mixer, x = build(), draw(2, 12)
    reset = jnp.zeros((2, 12), bool).at[0, 5].set(True)
    y, state = call(mixer, x, mixer.init_state(2, 12), reset)
    np.testing.assert_array_equal(state.position, [7, 12])
    close(y[:1, 5:], call(mixer, x[:1, 5:])[0])
    moved = state._replace(position=state.position + 1)
    later = draw(2, 1, seed=1)
    assert np.max(np.abs(call(mixer, later, state)[0] - call(mixer, later, moved)[0])) > 1e-3


def test_qk_norm_bounds_the_scores():
    """Queries and keys of any size give the same weights; the values still grow."""
    mixer, x = build(qk_norm=True), draw(1, 10)
    assert mixer.query_norm.scale.shape == mixer.key_norm.scale.shape == (8,)
    close(call(mixer, 1000 * x)[0] / 1000, call(mixer, x)[0], 1e-3)
    plain = build()
    assert np.max(np.abs(call(plain, 1000 * x)[0] / 1000 - call(plain, x)[0])) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide model.d_model=32"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"head_dim": 7}, "head_dim=7 must be even for rope"),
    ],
)
def test_mistakes_name_their_field(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)
