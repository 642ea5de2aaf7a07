"""The GPU's elementwise recurrence, in JAX's interpreter for it, against float64 numpy: values, states, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import ops
from tests.ops.kernels.lowering import lower
from tests.ops.kernels.running import kernels_of
from tests.ops.test_linear_recurrence import cotangents_for, distance, judge, marks, sample

pytestmark = pytest.mark.gpu_kernels

TOLERANCE = 5e-6  # float32 against float64, relative to the largest value; measured 4e-7


@jax.jit
def compute(inputs, reset, cotangents):
    outputs, pull = jax.vjp(lambda x: ops.linear_recurrence(**x, reset=reset, implementation="pallas"), inputs)
    return outputs, pull(cotangents)[0]


def errors(inputs, reset=None):
    cotangents = cotangents_for(inputs)
    with kernels_of("gpu"):
        (h, state), gradients = compute(inputs, reset, cotangents)
    expected_h, expected_state, expected = judge(inputs, reset, cotangents)
    found = {name: distance(gradients[name], expected[name]) for name in inputs}
    return found | {"h": distance(h, expected_h), "final state": distance(state, expected_state)}


def test_values_states_and_gradients():
    inputs = sample(steps=37, channels=(3, 50))
    for reset in (None, marks(inputs, (5, 31, 32))):
        found = errors(inputs, reset)
        assert max(found.values()) < TOLERANCE, found


def test_one_step():
    found = errors(sample(steps=1, channels=(3,)))
    assert max(found.values()) < TOLERANCE, found


def test_complex_numbers():
    inputs = sample(steps=37, batch=1, channels=(128,), is_complex=True)
    found = errors(inputs, marks(inputs, (5, 31, 32)))
    assert max(found.values()) < TOLERANCE, found


def test_decays_that_underflow():
    found = errors(sample(steps=37, channels=(128,), batch=1, low=-300.0))
    assert max(found.values()) < TOLERANCE, found


def test_bfloat16_is_read_into_float32():
    inputs = sample(steps=37, channels=(128,), batch=1)
    narrow = {name: x if name == "state" else jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    with kernels_of("gpu"):
        h, state = jax.jit(lambda x: ops.linear_recurrence(**x, implementation="pallas"))(narrow)
    expected_h, expected_state = judge({name: np.asarray(x, np.float32) for name, x in narrow.items()})
    assert h.dtype == jnp.bfloat16 and distance(h, expected_h) < 4e-3  # the rounding of h
    assert state.dtype == jnp.float32 and distance(state, expected_state) < TOLERANCE


def test_an_accident_stays_in_its_document():
    inputs = sample(steps=40, channels=(128,), batch=1)
    reset = marks(inputs, (9,))
    hurt = inputs | {"b": inputs["b"].copy()}
    hurt["b"][0, 3, 1] = np.nan
    cotangents = cotangents_for(inputs)
    with kernels_of("gpu"):
        (h, state), gradients = compute(hurt, reset, cotangents)
        (clean_h, clean_state), clean = compute(inputs, reset, cotangents)
    np.testing.assert_array_equal(h[:, 9:], clean_h[:, 9:])
    np.testing.assert_array_equal(state, clean_state)
    np.testing.assert_array_equal(gradients["a"][:, 9:], clean["a"][:, 9:])
    assert np.isnan(h[0, 3:9, 1]).all()


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_lowers_for_a_gpu(is_complex):
    inputs = sample(steps=64, channels=(256,), is_complex=is_complex)

    def loss(inputs, reset):
        h, state = ops.linear_recurrence(**inputs, reset=reset, implementation="pallas")
        return jnp.sum(h.real) + jnp.sum(state.real)

    lower(jax.grad(loss), inputs, marks(inputs))
