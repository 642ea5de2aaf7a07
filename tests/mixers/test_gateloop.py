"""GateLoop: lucidrains' layer, the gates of Table 1, the recurrence written out, the singular point of arg z."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import gateloop
from tests.goldens import golden_forms, load
from tests.mixers.goldens import assert_close, assert_layer, assert_normal, assert_uniform, initial, num_parameters
from tests.programs import build

IMPLEMENTATIONS = golden_forms("recurrent", "associative", "parallel", "chunked")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "heads"), [("layer_gateloop_heads2", 2), ("layer_gateloop_maxheads", 12)])
def test_lucidrains_layer(name, heads, implementation):
    golden = load(name)
    arrays = dict(golden.arrays)
    for prefix in ("w.", "gw."):
        together = np.split(arrays.pop(f"{prefix}to_qkv.weight"), 3)
        arrays |= {f"{prefix}to_{each}": part for each, part in zip("qkv", together)}
    names = {
        "query_kernel": "to_q",
        "key_kernel": "to_k",
        "value_kernel": "to_v",
        "decay_kernel": "to_a.0.weight",
        "decay_bias": "to_a.0.bias",
        "gate_kernel": "to_gates.0.weight",
        "output_kernel": "to_out.weight",
    }
    config = gateloop.Config(num_heads=heads, key_expansion=1.0, gate="cartesian", implementation=implementation, chunk_size=8)
    module = nnx.eval_shape(lambda: gateloop.Mixer(config, 12, rngs=nnx.Rngs(params=0)))
    assert_layer(module, dataclasses.replace(golden, arrays=arrays), names, 1e-5)


def test_gates_of_table_1():
    arrays = load("table1_gates").arrays
    module = build(lambda rngs: gateloop.Mixer(gateloop.Config(num_heads=1, key_expansion=0.5), 12, rngs=rngs))
    module.decay_kernel[...] = jnp.asarray(arrays["W_k"], jnp.float32)
    module.decay_angle_kernel[...] = jnp.asarray(arrays["W_k2"], jnp.float32)
    module.decay_bias[...] = jnp.zeros_like(module.decay_bias[...])
    log_decay, angle = module.decay(jnp.asarray(arrays["x"], jnp.float32))
    assert_close(log_decay[:, :, 0], arrays["loga_gateloop_abs"], 1e-6)
    assert_close(angle[:, :, 0], arrays["loga_gateloop_arg"], 1e-6)


def written_out(params, x, heads, state):
    """y and the last S (complex) of the polar form, complex128, one head and one step after another."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    S, y = np.array(state), np.zeros((*x.shape[:2], p["output_kernel"].shape[1]))
    for b, t in np.ndindex(x.shape[:2]):
        q, k, v, g = (x[b, t] @ p[f"{name}_kernel"] for name in ("query", "key", "value", "gate"))
        modulus = 1 / (1 + np.exp(-(x[b, t] @ p["decay_kernel"] + p["decay_bias"])))
        a = modulus * np.exp(1j * (x[b, t] @ p["decay_angle_kernel"] + p["decay_angle_bias"]))
        q, k, v, a = (array.reshape(heads, -1) for array in (q, k, v, a))
        o = []
        for h in range(heads):
            S[b, h] = a[h][:, None] * S[b, h] + np.outer(k[h], v[h])
            o.append((q[h] @ S[b, h]).real)
        y[b, t] = (g / (1 + np.exp(-g)) * np.concatenate(o)) @ p["output_kernel"]
    return y, S


@pytest.mark.parametrize("heads", [1, 4, 32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_recurrence_written_out(implementation, heads):
    """Gates anywhere between open and closed that turn by up to a half turn, from a state that is not empty."""
    generator = np.random.default_rng(0)
    config = gateloop.Config(num_heads=heads, key_expansion=1.0, implementation=implementation, chunk_size=8)
    module = build(lambda rngs: gateloop.Mixer(config, 32, rngs=rngs))
    module.decay_bias[...] = jnp.asarray(generator.uniform(-4.0, 6.0, 32), jnp.float32)
    module.decay_angle_bias[...] = jnp.asarray(generator.uniform(-np.pi, np.pi, 32), jnp.float32)
    x = generator.standard_normal((2, 37, 32)).astype(np.float32)
    state = generator.standard_normal(module.init_state(2, 37).shape).astype(np.float32)

    def as_complex(state):
        real, imaginary = np.split(np.asarray(state, np.float64), 2, axis=2)
        return real + 1j * imaginary

    output, after = jax.jit(lambda x, state: module(x, state))(x, state)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    expected, expected_after = written_out(params, x.astype(np.float64), heads, as_complex(state))
    assert_close(output, expected, 1e-5)
    assert_close(as_complex(after).real, expected_after.real, 1e-5, "real part of the state")
    assert_close(as_complex(after).imag, expected_after.imag, 1e-5, "imaginary part of the state")


# -- the singular point -----------------------------------------------------------------------------------------


@pytest.mark.tools
@pytest.mark.parametrize("heads", [4, 32])
def test_gradients_where_the_gate_is_exactly_zero(heads):
    """A head with z = 0 at every step, where arg z has no derivative: its own gradient is zero, as in torch."""
    config = gateloop.Config(num_heads=heads, key_expansion=1.0, gate="cartesian")
    module = build(lambda rngs: gateloop.Mixer(config, 32, rngs=rngs))
    module.decay_kernel[...] = module.decay_kernel[...].at[:, :2].set(0.0)
    module.decay_bias[...] = module.decay_bias[...].at[:2].set(0.0)
    definition, params = nnx.split(module, nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    log_decay, angle = module.decay(x)
    assert np.allclose(log_decay[:, :, 0], np.log(0.5)) and not np.asarray(angle[:, :, 0]).any()

    def loss(params, x):
        return jnp.sum(jnp.square(nnx.merge(definition, params)(x)[0]))

    gradients, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((gradients, dx)))
    moving = jnp.abs(gradients["decay_kernel"][...]).max(axis=0) > 0.0
    assert not moving[:2].any() and moving[2:].all()
    assert float(jnp.abs(dx).min(axis=-1).max()) > 0.0


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3])
def test_derivative_of_modulus_and_angle(size):
    """Away from zero they are the derivatives of |z| and arg z, in every direction."""
    turn = np.linspace(-3.0, 3.0, 13)
    real, imaginary = size * np.cos(turn), size * np.sin(turn)

    def pull(d_modulus, d_angle):
        _, back = jax.vjp(gateloop.polar, jnp.asarray(real, jnp.float32), jnp.asarray(imaginary, jnp.float32))
        return back((jnp.full(13, d_modulus), jnp.full(13, d_angle)))

    for actual, expected in zip(pull(1.0, 0.0), (np.cos(turn), np.sin(turn))):
        assert_close(actual, expected, 1e-6, "of |z|")
    for actual, expected in zip(pull(0.0, 1.0), (-np.sin(turn) / size, np.cos(turn) / size)):
        assert_close(actual, expected, 1e-6, "of arg z")


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-7])
def test_derivative_of_the_angle_is_bounded(size):
    """A norm of gradients must not overflow because one z came close to zero."""
    _, back = jax.vjp(gateloop.polar, jnp.full(1, size), jnp.full(1, -size))
    largest = max(float(jnp.abs(each).max()) for each in back((jnp.ones(1), jnp.ones(1))))
    assert largest <= 1.0 / gateloop.SINGULAR


def test_a_closed_gate_keeps_its_logarithm():
    """sigmoid(-200) is zero in float32; its logarithm is -200."""
    module = build(lambda rngs: gateloop.Mixer(gateloop.Config(), 32, rngs=rngs))
    module.decay_bias[...] = jnp.full_like(module.decay_bias[...], -200.0)
    assert np.allclose(module.decay(jnp.zeros((1, 1, 32)))[0], -200.0)


# -- max heads --------------------------------------------------------------------------------------------------


def test_memory_with_max_heads():
    """Training with one channel per head keeps nothing of size chunk_size per step and channel.

    The temporary bytes that the compiler plans for a gradient, against those of x: measured 21 times; 41 times through
    the matrix-state op, one chunk at a time.
    """
    B, T, D = 2, 256, 128
    module = build(lambda rngs: gateloop.Mixer(gateloop.Config.max_heads(D), D, rngs=rngs))
    definition, params = nnx.split(module, nnx.Param)

    def loss(params, x):
        return jnp.sum(nnx.merge(definition, params)(x)[0])

    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    planned = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert planned < 30 * 4 * B * T * D


# -- initialisation, sizes, mistakes ----------------------------------------------------------------------------


def test_initialisation_of_a_polar_gate():
    """Xavier, gain 2^-2.5, for queries, keys and gates; every head's moduli from slow to fast, angles around 0."""
    params = initial("gateloop", gateloop.Config(), 256)
    for name in ("query", "key", "decay", "decay_angle"):
        assert params[f"{name}_kernel"].shape == (256, 64)
        assert_uniform(params[f"{name}_kernel"], 2**-2.5 * (6 / (256 + 64)) ** 0.5)
    for name in ("value", "gate", "output"):
        assert_normal(params[f"{name}_kernel"], 1 / 16)
    assert np.allclose(np.sort(params["decay_bias"]), np.linspace(3, 6, 64))
    assert (np.diff(params["decay_bias"].reshape(4, 16), axis=1) > 0).all()
    assert np.ptp(params["decay_bias"].reshape(4, 16), axis=1).min() > 2.5
    assert not params["decay_angle_bias"].any()
    assert np.allclose(initial("gateloop", gateloop.Config.max_heads(32), 32)["decay_bias"], np.linspace(3, 6, 32))


def test_initialisation_of_a_cartesian_gate():
    """torch's default, of lucidrains' layer."""
    params = initial("gateloop", gateloop.Config.max_heads(256, gate="cartesian"), 256)
    assert params["decay_kernel"].shape == (256, 512)
    assert_uniform(params["decay_kernel"], 1 / 16)
    biases = [initial("gateloop", gateloop.Config(num_heads=64, gate="cartesian"), 256, seed)["decay_bias"] for seed in range(8)]
    assert_uniform(np.concatenate(biases), 1 / 16)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (gateloop.Config(), 4 * 128**2 + 2 * 32),
        (gateloop.Config(output_norm=True), 4 * 128**2 + 2 * 32 + 128),
        (gateloop.Config(gate="cartesian"), 3.5 * 128**2 + 8 * 129),
        (gateloop.Config.max_heads(128), 7 * 128**2 + 2 * 128),
        (gateloop.Config.max_heads(128, gate="cartesian"), 7 * 128**2 + 2 * 128),
    ],
)
def test_sizes(config, count):
    assert num_parameters("gateloop", config, 128) == count


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"num_heads": 32}, "num_heads=32 must divide the widths of keys .8."),
        ({"gate": "complex"}, "gate='complex' is not one of polar, cartesian"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        gateloop.Mixer(gateloop.Config(**options), 32, rngs=nnx.Rngs(params=0))
