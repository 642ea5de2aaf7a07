"""The GPU's selective scan, in JAX's interpreter for it, against float64 numpy: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels import ops
from seqmodels.ops.kernels.gpu import selective_scan
from tests.ops.judge import relative_error
from tests.ops.kernels.lowering import lower
from tests.ops.kernels.running import kernels_of
from tests.ops.test_selective_scan import cotangents_for, judge, marks, sample

pytestmark = pytest.mark.gpu_kernels

# Relative to the largest value. float32 measured 1e-6; bfloat16 is the rounding of y, d_x and d_dt, 2e-3.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 4e-3}


@jax.jit
def compute(inputs, reset, cotangents):
    outputs, pull = jax.vjp(lambda x: ops.selective_scan(**x, reset=reset, implementation="pallas"), inputs)
    return outputs, pull(cotangents)[0]


def errors(inputs, reset=None, dtype=jnp.float32):
    """Relative error of the outputs, the final state and every gradient."""
    inputs = {name: jnp.asarray(x, dtype if name in ("x", "dt") else None) for name, x in inputs.items()}
    d_y, d_state = cotangents_for(inputs)
    d_y = jnp.asarray(d_y, dtype)

    with kernels_of("gpu"):
        (y, state), grads = compute(inputs, reset, (d_y, d_state))
    expected_y, expected_state, expected = judge(inputs, reset, (d_y, d_state))
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return found | {"y": relative_error(y, expected_y), "final state": relative_error(state, expected_state)}


def test_values_states_and_gradients():
    inputs = sample(steps=37, batch=2, channels=70, states=5)
    found = errors(inputs, marks(inputs, (5, 8, 31)))
    assert max(found.values()) < TOLERANCE[jnp.float32], found


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=st.integers(1, 40),
    batch=st.integers(1, 2),
    channels=st.integers(1, 70),
    states=st.integers(1, 32),
    seed=st.integers(0, 99),
)
def test_any_shape(steps, batch, channels, states, seed):
    inputs = sample(steps=steps, batch=batch, channels=channels, states=states, seed=seed)
    reset = np.random.default_rng(seed).random((batch, steps)) < 0.1
    found = errors(inputs, reset)
    assert max(found.values()) < TOLERANCE[jnp.float32], found


def test_bfloat16_whole_tiles_and_no_documents():
    found = errors(sample(steps=64, batch=1, channels=64, states=16), dtype=jnp.bfloat16)
    assert max(found.values()) < TOLERANCE[jnp.bfloat16], found


def test_blocks_of_128_channels(monkeypatch):
    monkeypatch.setattr(selective_scan, "_BLOCKS", 1)
    inputs = sample(steps=12, batch=1, channels=129, states=9)
    found = errors(inputs, marks(inputs, (5,)))
    assert max(found.values()) < TOLERANCE[jnp.float32], found


def test_strong_decays():
    for most in (20.0, 300.0):  # of dt; times A, to -60 and to -900 a step
        found = errors(sample(steps=20, batch=1, channels=64, states=8, most=most))
        assert max(found.values()) < TOLERANCE[jnp.float32], (most, found)


def test_an_accident_stays_in_its_document():
    inputs = sample(steps=20, batch=1, channels=64, states=8)
    reset = marks(inputs, (9,))
    hurt = inputs | {"x": inputs["x"].copy()}
    hurt["x"][0, 3, 1] = np.nan
    with kernels_of("gpu"):
        run = jax.jit(lambda x: ops.selective_scan(**x, reset=reset, implementation="pallas"))
        (y, state), (clean_y, clean_state) = run(hurt), run(inputs)
    np.testing.assert_array_equal(y[:, 9:], clean_y[:, 9:])
    np.testing.assert_array_equal(state, clean_state)
    assert np.isnan(y[0, 3:9, 1]).all()


@pytest.mark.parametrize("batch", [1, 132], ids=["blocks of 64", "blocks of 128"])
def test_lowers_for_a_gpu(batch):
    inputs = sample(steps=64, batch=batch, channels=128, states=16)

    def loss(inputs, reset):
        y, state = ops.selective_scan(**inputs, reset=reset, implementation="pallas")
        return jnp.sum(y) + jnp.sum(state)

    lower(jax.grad(loss), inputs, marks(inputs))


def test_what_the_kernel_lacks_is_said():
    x, A, B = jnp.zeros((1, 4, 8)), jnp.zeros((8, 64)), jnp.zeros((1, 4, 64))
    assert "N = 64" in selective_scan.unsupported_reason(x, x, A, B, B)
    assert selective_scan.unsupported_reason(x, x, A[:, :16], B[..., :16], B[..., :16]) is None
