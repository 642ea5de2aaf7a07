"""The short causal convolution: against torch's numbers, and its tail across calls and documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops import causal_conv
from tests import goldens
from tests.ops.judge import relative_error
from tests.programs import fast_jit

TOLERANCE = 1e-6  # float32 against float64, relative to the largest value


def sample(steps=19, width=4, channels=5, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (batch, steps, channels),
        "weight": (width, channels),
        "bias": (channels,),
        "state": (batch, width - 1, channels),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def judge(x, weight, bias, state, reset):
    """Row by row, document by document, straight from the sum."""
    width = weight.shape[0]
    y, tails = np.zeros(x.shape), np.zeros(state.shape)
    for row in range(x.shape[0]):
        past = [np.float64(step) for step in state[row]]
        for t in range(x.shape[1]):
            if reset[row, t]:
                past = [np.zeros(x.shape[2])] * (width - 1)
            past.append(np.float64(x[row, t]))
            y[row, t] = bias + sum(weight[-1 - age] * past[-1 - age] for age in range(width))
        tails[row] = np.array(past[len(past) - (width - 1) :]).reshape(state.shape[1:])
    return y, tails


@pytest.mark.parametrize("from_state", [True, False])
def test_golden(from_state):
    golden = goldens.load("conv1d").arrays
    inputs = {"x": golden["x"], "weight": golden["w"].T, "bias": golden["b"]}
    state = golden["cache0"] if from_state else None
    suffix = "" if from_state else "_zero"
    y, tail = causal_conv(**inputs, state=state)
    assert relative_error(jax.nn.silu(y), golden[f"o{suffix}"]) < TOLERANCE
    assert relative_error(tail, golden[f"cacheT{suffix}"]) < TOLERANCE


def test_golden_gradients():
    golden = goldens.load("conv1d").arrays
    inputs = {"x": golden["x"], "weight": golden["w"].T, "bias": golden["b"], "state": golden["cache0"]}

    @jax.jit
    def gradients(inputs):
        def loss(inputs):
            y, tail = causal_conv(**inputs)
            return jnp.sum(jax.nn.silu(y) * golden["cot_o"]) + jnp.sum(tail * golden["cot_cacheT"])

        return jax.grad(loss)(inputs)

    found = gradients(inputs)
    for name, stored in {"x": "x", "bias": "b", "state": "cache0"}.items():
        assert relative_error(found[name], golden[f"grad_{stored}"]) < TOLERANCE
    assert relative_error(found["weight"].T, golden["grad_w"]) < TOLERANCE


compiled = fast_jit(causal_conv)


@pytest.mark.parametrize("width", [1, 2, 4, 12])
@pytest.mark.parametrize("steps", [1, 2, 3, 19])
def test_documents_are_cut_in_outputs_and_in_the_tail(width, steps):
    inputs = sample(steps=steps, width=width)
    rng = np.random.default_rng(1)
    for reset in (np.zeros((2, steps), bool), rng.random((2, steps)) < 0.3, np.ones((2, steps), bool)):
        y, tail = compiled(**inputs, reset=reset)
        expected_y, expected_tail = judge(**inputs, reset=reset)
        assert relative_error(y, expected_y) < TOLERANCE
        assert relative_error(tail, expected_tail) < TOLERANCE


def test_without_marks_is_the_same_as_no_marks_set():
    inputs = sample()
    plain, marked = causal_conv(**inputs), causal_conv(**inputs, reset=np.zeros((2, 19), bool))
    np.testing.assert_array_equal(plain[0], marked[0])
    np.testing.assert_array_equal(plain[1], marked[1])


def test_carrying_the_tail_over_a_cut_changes_nothing():
    inputs = sample()
    reset = np.random.default_rng(1).random((2, 19)) < 0.2
    whole_y, whole_tail = compiled(**inputs, reset=reset)
    tail, pieces = inputs["state"], []
    for piece in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 19)):
        y, tail = compiled(**(inputs | {"x": inputs["x"][:, piece], "state": tail}), reset=reset[:, piece])
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole_y, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(tail, whole_tail)


@pytest.mark.parametrize("width", [4, 12])
@pytest.mark.parametrize("place", ["x", "state"])
def test_an_accident_stays_in_its_document(place, width):
    inputs = sample(width=width)
    reset = np.zeros((2, 19), bool)
    reset[0, [2, 10, 18]] = True

    @fast_jit
    def outputs_and_gradient(inputs):
        def later(x):
            y, tail = causal_conv(**(inputs | {"x": x}), reset=reset)
            return jnp.sum(y[0, 10:]) + jnp.sum(y[1]) + jnp.sum(tail), (y, tail)

        return jax.value_and_grad(later, has_aux=True)(inputs["x"])

    (_, (clean_y, clean_tail)), clean_gradient = outputs_and_gradient(inputs)
    hurt = inputs | {place: inputs[place].copy()}
    hurt[place][0, 2 if place == "state" else 9] = np.nan
    (_, (y, tail)), gradient = outputs_and_gradient(hurt)
    bad = np.isnan(np.asarray(y)).any(-1)
    assert bad.sum() == (2 if place == "state" else 1) and bad[0].sum() == bad.sum()
    np.testing.assert_array_equal(np.asarray(y)[~bad], np.asarray(clean_y)[~bad])
    np.testing.assert_array_equal(tail, clean_tail)
    np.testing.assert_array_equal(gradient, clean_gradient)


def test_bfloat16_inputs_keep_a_float32_tail():
    inputs = sample()
    narrow = inputs | {"x": jnp.asarray(inputs["x"], jnp.bfloat16)}
    reset = np.random.default_rng(1).random((2, 19)) < 0.2
    with jax.numpy_dtype_promotion("strict"):
        y, tail = causal_conv(**narrow, reset=reset)
    assert y.dtype == jnp.bfloat16 and tail.dtype == jnp.float32
    expected, _ = causal_conv(**(inputs | {"x": np.asarray(narrow["x"], np.float32)}), reset=reset)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(jnp.asarray(expected, jnp.bfloat16)))


@pytest.mark.parametrize(
    "name, shape",
    [("x", (2, 19)), ("weight", (4, 6)), ("bias", (4,)), ("state", (2, 4, 5)), ("reset", (2, 18))],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    wrong = np.zeros(shape, bool if name == "reset" else np.float32)
    with pytest.raises(ValueError, match=name):
        causal_conv(**(sample() | {name: wrong}))
