"""The token shift: the step before, zero at the start of a document, and no NaN that was not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops.token_shift import token_shift

BATCH, STEPS, CHANNELS = 2, 11, 3


def sample():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, STEPS, CHANNELS)).astype(np.float32)
    state = rng.standard_normal((BATCH, CHANNELS)).astype(np.float32)
    reset = np.zeros((BATCH, STEPS), bool)
    reset[0, [0, 4]] = True
    reset[1, [7, 8, 10]] = True
    return x, state, reset


def judge(x, state, reset):
    shifted, previous = np.zeros_like(x), state.copy()
    for t in range(x.shape[1]):
        for row in range(x.shape[0]):
            shifted[row, t] = 0.0 if reset[row, t] else previous[row]
            previous[row] = x[row, t]
    return shifted, previous


@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (4, 1, 6), (7, 4)])
def test_the_previous_step_within_a_document(pieces):
    x, state, reset = sample()
    expected, expected_state = judge(x, state, reset)
    found, start = [], 0
    for length in pieces:
        piece = slice(start, start + length)
        shifted, state = token_shift(x[:, piece], state=state, reset=reset[:, piece])
        found.append(shifted)
        start += length
    np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
    np.testing.assert_array_equal(state, expected_state)


def test_nothing_is_zero():
    x, state, _ = sample()
    shifted, last = token_shift(x)
    np.testing.assert_array_equal(shifted[:, 0], np.zeros((BATCH, CHANNELS)))
    np.testing.assert_array_equal(shifted[:, 1:], x[:, :-1])
    for other in token_shift(x, state=np.zeros_like(state)), token_shift(x, reset=np.zeros((BATCH, STEPS), bool)):
        np.testing.assert_array_equal(shifted, other[0])
        np.testing.assert_array_equal(last, other[1])


def test_an_accident_reaches_the_next_step_of_its_document_and_no_other():
    x, state, reset = sample()

    def later(arrays):
        shifted, last = token_shift(arrays["x"], state=arrays["state"], reset=reset)
        return jnp.sum(jnp.where(jnp.isnan(shifted), 0.0, shifted**2)) + jnp.sum(last**2), shifted

    hurt = {"x": x.copy(), "state": state.copy()}
    hurt["x"][0, 3] = hurt["x"][1, 4] = hurt["state"][0] = np.nan  # only the second is followed by its own document
    gradients, shifted = jax.grad(later, has_aux=True)(hurt)
    bad = np.isnan(np.asarray(shifted)).any(axis=-1)
    assert np.argwhere(bad).tolist() == [[1, 5]]
    assert np.isnan(gradients["x"]).any(axis=-1).sum() <= 1 and not np.isnan(gradients["state"]).any()
    np.testing.assert_array_equal(gradients["state"][0], np.zeros(CHANNELS))
    np.testing.assert_allclose(gradients["x"][0, 2], np.zeros(CHANNELS) + 2 * x[0, 2])


def test_bfloat16_inputs_keep_a_float32_state():
    x, state, reset = sample()
    shifted, last = token_shift(jnp.asarray(x, jnp.bfloat16), state=state, reset=reset)
    assert shifted.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(last, np.asarray(jnp.asarray(x[:, -1], jnp.bfloat16), np.float32))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", np.zeros((BATCH, CHANNELS))),
        ("x", np.zeros((BATCH, 0, CHANNELS))),
        ("state", np.zeros((BATCH, 1, CHANNELS))),
        ("reset", np.zeros((BATCH, STEPS - 1), bool)),
        ("reset", np.zeros((BATCH, STEPS), np.int32)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, wrong):
    x, state, reset = sample()
    arguments = {"x": x, "state": state, "reset": reset} | {name: wrong}
    with pytest.raises(ValueError, match=name):
        token_shift(arguments.pop("x"), **arguments)
