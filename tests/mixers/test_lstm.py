"""LSTM: torch's numbers, the initialisation, and why it has one form only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import lstm as mixer
from seqmodels.ops.lstm import LSTMState, lstm
from tests.goldens import load
from tests.mixers.goldens import assert_close, assert_normal, assert_uniform, initial, num_parameters


def test_values_and_gradients_of_torch():
    """Measured: values 2e-7, gradients 4e-7 of the largest."""
    x = load("lstm").arrays
    inputs = {name: jnp.asarray(x[name]) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")}

    def run(inputs):
        z = inputs["x"] @ inputs["w_ih"].T + inputs["b_ih"] + inputs["b_hh"]
        return lstm(z, inputs["w_hh"].T, state=LSTMState(inputs["h0"], inputs["c0"]))

    def run_and_pull(inputs):
        (o, final), pull = jax.vjp(run, inputs)
        cotangents = [jnp.asarray(x[f"cot_{name}"]) for name in ("o", "hT", "cT")]
        return o, final, pull((cotangents[0], LSTMState(*cotangents[1:])))[0]

    o, final, gradients = jax.jit(run_and_pull)(inputs)
    for name, value in {"o": o, "hT": final.h, "cT": final.c}.items():
        assert_close(value, x[name], 1e-6, name)
    for name, value in gradients.items():
        assert_close(value, x[f"grad_{name}"], 2e-6, f"gradient of {name}")

    o, final = jax.jit(lstm)(inputs["x"] @ inputs["w_ih"].T + inputs["b_ih"] + inputs["b_hh"], inputs["w_hh"].T)
    for name, value in {"o_zero": o, "hT_zero": final.h, "cT_zero": final.c}.items():
        assert_close(value, x[name], 1e-6, name)


def test_gradients_are_those_of_the_loop():
    """The written-out backward pass = differentiating the steps, resets in the row and a state before it."""
    random = np.random.default_rng(0)
    z, kernel, h, c = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((3, 19, 20), (5, 20), (3, 5), (3, 5))
    )
    reset = jnp.asarray(random.random((3, 19)) < 0.2)
    weights = jnp.asarray(random.standard_normal((3, 19, 5)), jnp.float32)

    def plain(z, kernel, h, c):
        outputs = []
        for t in range(z.shape[1]):
            h, c = (jnp.where(reset[:, t, None], 0.0, leaf) for leaf in (h, c))
            i, f, g, o = jnp.split(z[:, t] + h @ kernel, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            outputs.append(h)
        return jnp.sum(jnp.stack(outputs, axis=1) * weights) + jnp.sum(h * c)

    def ours(z, kernel, h, c):
        o, final = lstm(z, kernel, state=LSTMState(h, c), reset=reset)
        return jnp.sum(o * weights) + jnp.sum(final.h * final.c)

    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(z, kernel, h, c)
    for got, want in zip(jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(z, kernel, h, c), expected):
        assert_close(got, want, 2e-6)


@pytest.mark.parametrize("implementation", ["associative", "parallel", "chunked", "pallas"])
def test_it_says_why_there_is_no_other_form(implementation):
    with pytest.raises(NotImplementedError, match="nonlinear"):
        lstm(jnp.zeros((1, 2, 8)), jnp.zeros((2, 8)), implementation=implementation)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"z": jnp.zeros((1, 0, 8))}, "T >= 1"),
        ({"kernel": jnp.zeros((3, 8))}, "kernel"),
        ({"reset": jnp.zeros((1, 2))}, "reset must be bool"),
        ({"reset": jnp.zeros((1, 3), bool)}, r"reset must be \[1, 2\]; got \[1, 3\]"),
        ({"implementation": "fast"}, "not one of"),
        ({"state": LSTMState(jnp.zeros((1, 2)), jnp.zeros((1, 3)))}, "state's c"),
    ],
)
def test_mistakes_in_arrays(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        lstm(**{"z": jnp.zeros((1, 2, 8)), "kernel": jnp.zeros((2, 8))} | options)


def test_initialisation():
    params = initial("lstm", mixer.Config(hidden_size=48), 64)
    assert_uniform(params["input_kernel"], (6 / (64 + 4 * 48)) ** 0.5)
    np.testing.assert_allclose(params["recurrent_kernel"] @ params["recurrent_kernel"].T, np.eye(48), atol=1e-5)
    assert np.array_equal(params["bias"], np.repeat([0.0, 1.0, 0.0, 0.0], 48).astype(np.float32))
    assert_normal(params["output_kernel"], 48**-0.5)


@pytest.mark.parametrize("d_model", [128, 256, 768])
def test_one_layer_has_the_parameters_of_attention(d_model):
    assert abs(num_parameters("lstm", mixer.Config(), d_model) / (4 * d_model**2) - 1.0) < 0.03


def test_mistakes_in_options():
    with pytest.raises(UserError, match="hidden_size=0"):
        mixer.Mixer(mixer.Config(hidden_size=0), 32, rngs=nnx.Rngs(params=0))
