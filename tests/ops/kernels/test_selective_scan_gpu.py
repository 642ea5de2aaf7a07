"""The GPU's selective scan, in JAX's interpreter for it, against float64 numpy: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import ops
from seqmodels.ops.kernels import selective_scan_gpu
from tests.ops.judge import relative_error
from tests.ops.test_selective_scan import cotangents_for, judge, marks, sample

pytestmark = pytest.mark.gpu_kernels

# Relative to the largest value. float32 measured 1e-6; bfloat16 is the rounding of y, dx and ddt, 2e-3.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 4e-3}


def errors(inputs, reset=None, dtype=jnp.float32):
    """Relative error of the outputs, the final state and every gradient."""
    inputs = {name: jnp.asarray(x, dtype if name in ("x", "dt") else None) for name, x in inputs.items()}
    dy, dstate = cotangents_for(inputs)
    dy = jnp.asarray(dy, dtype)

    @jax.jit
    def compute(inputs, reset, cotangents):
        outputs, pull = jax.vjp(lambda x: ops.selective_scan(**x, reset=reset, implementation="pallas"), inputs)
        return outputs, pull(cotangents)[0]

    with ops.interpret("gpu"):
        (y, state), grads = compute(inputs, reset, (dy, dstate))
    expected_y, expected_state, expected = judge(inputs, reset, (dy, dstate))
    found = {name: relative_error(grads[name], expected[name]) for name in inputs}
    return found | {"y": relative_error(y, expected_y), "final state": relative_error(state, expected_state)}


SHAPES = {
    "a tile": {"steps": 32, "batch": 1, "channels": 64, "states": 16},
    "odd": {"steps": 37, "batch": 2, "channels": 70, "states": 5},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_states_and_gradients(shape, dtype):
    inputs = sample(**SHAPES[shape])
    for reset in (None, marks(inputs, (5, 8, 31))):
        found = errors(inputs, reset, dtype)
        assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("most", [20.0, 300.0])
def test_strong_decays(most):
    found = errors(sample(steps=37, batch=1, channels=64, states=16, most=most))
    assert max(found.values()) < TOLERANCE[jnp.float32], found


def test_an_accident_stays_in_its_document():
    inputs = sample(steps=20, batch=1, channels=64, states=8)
    reset = marks(inputs, (9,))
    hurt = inputs | {"x": inputs["x"].copy()}
    hurt["x"][0, 3, 1] = np.nan
    with ops.interpret("gpu"):
        run = jax.jit(lambda x: ops.selective_scan(**x, reset=reset, implementation="pallas"))
        (y, state), (clean_y, clean_state) = run(hurt), run(inputs)
    np.testing.assert_array_equal(y[:, 9:], clean_y[:, 9:])
    np.testing.assert_array_equal(state, clean_state)
    assert np.isnan(y[0, 3:9, 1]).all()


def test_what_the_kernel_lacks_is_said():
    x, A, B = jnp.zeros((1, 4, 8)), jnp.zeros((8, 64)), jnp.zeros((1, 4, 64))
    assert "N = 64" in selective_scan_gpu.lacks(x, x, A, B, B)
    assert selective_scan_gpu.lacks(x, x, A[:, :16], B[..., :16], B[..., :16]) is None
