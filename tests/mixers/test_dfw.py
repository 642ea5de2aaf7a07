"""Decaying fast weights: the paper's recurrence written out, the gates of Table 1, the initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import dfw
from tests.goldens import golden_forms, load
from tests.mixers.goldens import assert_close, assert_normal, assert_uniform, initial, num_parameters
from tests.programs import build


def written_out(params, x, heads, state):
    """y and the last S, float64, one head and one step after another, from S = ``state``."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    S, y = np.array(state, np.float64), np.zeros((*x.shape[:2], p["output_kernel"].shape[1]))
    for b, t in np.ndindex(x.shape[:2]):
        q, k, v = (x[b, t] @ p[f"{name}_kernel"] for name in ("query", "key", "value"))
        alpha = 1 / (1 + np.exp(-(x[b, t] @ p["key_decay_kernel"] + p["key_decay_bias"])))
        beta = 1 / (1 + np.exp(-(x[b, t] @ p["value_decay_kernel"] + p["value_decay_bias"])))
        q, k, v, alpha, beta = (array.reshape(heads, -1) for array in (q, k, v, alpha, beta))
        o = []
        for h in range(heads):
            S[b, h] = np.outer(alpha[h], beta[h]) * S[b, h] + np.outer(k[h], v[h])
            o.append(q[h] @ S[b, h])
        y[b, t] = np.concatenate(o) @ p["output_kernel"]
    return y, S


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "parallel", "chunked"))
def test_the_recurrence_written_out(implementation, heads):
    """With gates that stand anywhere between open and closed, from a state that is not empty."""
    generator = np.random.default_rng(0)
    module = build(
        lambda rngs: dfw.Mixer(dfw.Config(num_heads=heads, implementation=implementation, chunk_size=8), 32, rngs=rngs)
    )
    for bias in (module.key_decay_bias, module.value_decay_bias):
        bias[...] = jnp.asarray(generator.uniform(-4.0, 6.0, bias[...].shape), jnp.float32)
    x = generator.standard_normal((2, 37, 32)).astype(np.float32)
    state = generator.standard_normal(module.init_state(2, 37).shape).astype(np.float32)
    output, after = jax.jit(lambda x, state: module(x, state))(x, state)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    expected, expected_after = written_out(params, x.astype(np.float64), heads, state)
    assert_close(output, expected, 1e-5)
    assert_close(after, expected_after, 1e-5, "state")


def test_gates_of_table_1():
    arrays = load("table1_gates").arrays
    config = dfw.Config(num_heads=1, key_expansion=0.5, value_expansion=8 / 12)
    module = build(lambda rngs: dfw.Mixer(config, 12, rngs=rngs))
    module.key_decay_kernel[...] = jnp.asarray(arrays["W_k"], jnp.float32)
    module.value_decay_kernel[...] = jnp.asarray(arrays["W_v"], jnp.float32)
    module.key_decay_bias[...] = jnp.zeros_like(module.key_decay_bias[...])
    module.value_decay_bias[...] = jnp.zeros_like(module.value_decay_bias[...])
    log_alpha, log_beta = module.log_decays(jnp.asarray(arrays["x"], jnp.float32))
    assert_close(log_alpha[:, :, 0], arrays["loga_dfw"], 1e-6)
    assert_close(log_beta[:, :, 0], arrays["logb_dfw"], 1e-6)


def test_a_closed_gate_keeps_its_logarithm():
    """sigmoid(-200) is zero in float32; its logarithm is -200."""
    module = build(lambda rngs: dfw.Mixer(dfw.Config(), 32, rngs=rngs))
    module.key_decay_bias[...] = jnp.full_like(module.key_decay_bias[...], -200.0)
    assert np.allclose(module.log_decays(jnp.zeros((1, 1, 32)))[0], -200.0)


def test_head_norm():
    """The option makes every head's output as large as its scale says, whatever the memory holds."""
    module = build(lambda rngs: dfw.Mixer(dfw.Config(num_heads=2, head_norm=True), 32, rngs=rngs))
    module.output_kernel[...] = jnp.eye(28, 32)
    output, _ = module(100.0 * jax.random.normal(jax.random.key(0), (1, 5, 32)))
    size = np.square(output[..., :28]).reshape(1, 5, 2, 14).mean(-1)
    assert np.allclose(size, 1.0, rtol=1e-4)


def test_initialisation():
    """Xavier, gain 2^-2.5, for queries, keys and gates; the gates' biases evenly from 3 to 6 in every head."""
    params = initial("dfw", dfw.Config(), 256)
    for name, fan_out in {"query": 128, "key": 128, "key_decay": 128, "value_decay": 224}.items():
        assert params[f"{name}_kernel"].shape == (256, fan_out)
        assert_uniform(params[f"{name}_kernel"], 2**-2.5 * (6 / (256 + fan_out)) ** 0.5)
    assert_normal(params["value_kernel"], 1 / 16)
    assert_normal(params["output_kernel"], 224**-0.5)
    assert np.allclose(params["key_decay_bias"].reshape(4, 32), np.linspace(3, 6, 32))
    assert np.allclose(params["value_decay_bias"].reshape(4, 56), np.linspace(3, 6, 56))


@pytest.mark.parametrize(
    ("config", "count"),
    [(dfw.Config(), 4.125 * 128**2 + 1.375 * 128), (dfw.Config.paper(), 6 * 128**2 + 2 * 128)],
)
def test_sizes(config, count):
    assert num_parameters("dfw", config, 128) == count


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"key_expansion": 0.0}, "key_expansion=0.0 must be positive"),
        ({"value_expansion": -1.0}, "value_expansion=-1.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        dfw.Mixer(dfw.Config(**options), 32, rngs=nnx.Rngs(params=0))
