"""The long convolution against its definition, and the two views of S4D: convolution and recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.long_conv import long_conv
from tests import goldens
from tests.ops.judge import relative_error
from tests.programs import fast_jit

# float32 FFTs against float64 sums, relative to the largest value
TOLERANCE = 2e-6


def sample(*, steps, taps, batch=2, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, steps, channels), (channels, taps), (batch, steps, channels))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


compiled = fast_jit(long_conv)


@fast_jit
def pull(x, kernel, dy):
    """Gradients of <y, dy>."""
    return jax.vjp(long_conv, x, kernel)[1](dy)


def judge(x, kernel):
    """y_t = sum over l of kernel[l] x_{t-l}, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = np.zeros_like(x)
    for age in range(min(x.shape[1], kernel.shape[1])):
        y[:, age:] += kernel[:, age] * x[:, : x.shape[1] - age]
    return y


@pytest.mark.parametrize("steps", [1, 7, 33, 64])
@pytest.mark.parametrize("taps", [1, 5, 64, 200])
def test_is_the_causal_sum_for_kernels_shorter_and_longer_than_the_sequence(steps, taps):
    x, kernel, _ = sample(steps=steps, taps=taps)
    assert relative_error(compiled(x, kernel), judge(x, kernel)) < TOLERANCE


@pytest.mark.parametrize("taps", [5, 33, 50])
def test_gradients(taps):
    x, kernel, dy = sample(steps=33, taps=taps)
    dx, dkernel = pull(x, kernel, dy)
    # The map is linear in each argument, so its transposes are correlations: the convolution with one end reversed.
    expected_dx = judge(dy[:, ::-1], kernel)[:, ::-1]
    expected_dkernel = np.zeros_like(kernel)
    for age in range(min(33, taps)):
        expected_dkernel[:, age] = np.sum(dy[:, age:].astype(np.float64) * x[:, : 33 - age], axis=(0, 1))
    assert relative_error(dx, expected_dx) < TOLERANCE
    assert relative_error(dkernel, expected_dkernel) < TOLERANCE


def test_is_causal_up_to_the_rounding_of_an_fft():
    x, kernel, _ = sample(steps=37, taps=37)
    dy = np.zeros_like(x)
    dy[:, 20] = 1.0
    dx = np.asarray(pull(x, kernel, dy)[0])
    assert np.abs(dx[:, 21:]).max() < 1e-6 * np.abs(dx).max()
    assert np.abs(dx[:, :21]).min() > 1e-3 * np.abs(dx).max()


def test_rows_and_channels_do_not_touch():
    x, kernel, _ = sample(steps=9, taps=9)
    clean = np.asarray(compiled(x, kernel))
    x[0, 4, 1] = np.nan
    spoiled = np.asarray(compiled(x, kernel))
    others = np.ones_like(clean, bool)
    others[0, :, 1] = False
    np.testing.assert_array_equal(spoiled[others], clean[others])
    assert np.isnan(spoiled[0, 4:, 1]).all()


def test_narrow_inputs_are_convolved_in_float32():
    x, kernel, dy = (jnp.asarray(array, jnp.bfloat16) for array in sample(steps=70, taps=70))
    kernel = kernel.astype(jnp.float32)

    @fast_jit
    def run(x, kernel, dy):
        y, pull = jax.vjp(long_conv, x, kernel)
        return y, *pull(dy)

    with jax.numpy_dtype_promotion("strict"):
        y, dx, dkernel = run(x, kernel, dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dkernel.dtype == jnp.float32
    assert relative_error(y, judge(x, kernel)) < 4e-3  # rounding to 8 bits
    wide_y, _, wide_dkernel = run(x.astype(jnp.float32), kernel, dy.astype(jnp.float32))
    assert relative_error(dkernel, wide_dkernel) < TOLERANCE
    np.testing.assert_array_equal(y, wide_y.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "x_shape, kernel_shape",
    [((2, 7), (3, 7)), ((2, 7, 3), (7, 3)), ((2, 7, 3), (3,)), ((2, 0, 3), (3, 4)), ((2, 7, 3), (3, 0))],
)
def test_shapes_that_do_not_fit_are_named(x_shape, kernel_shape):
    with pytest.raises(ValueError) as raised:
        long_conv(np.zeros(x_shape, np.float32), np.zeros(kernel_shape, np.float32))
    assert str(list(x_shape)) in str(raised.value) and str(list(kernel_shape)) in str(raised.value)


# ---- S4D: x_t = dA x_{t-1} + dB u_t,  y_t = 2 Re(C . x_t) + D u_t, in both views


def discretise(is_zoh, log_dt, A, B):
    """Decay and input factor of one step (arXiv 2206.11893, section 3.2), zero-order hold or bilinear."""
    dt = jnp.exp(log_dt)[:, None]
    zoh = jnp.exp(dt * A), B * jnp.expm1(dt * A) / A
    bilinear = (1 + dt * A / 2) / (1 - dt * A / 2), B * dt / (1 - dt * A / 2)
    return jnp.where(is_zoh, zoh[0], bilinear[0]), jnp.where(is_zoh, zoh[1], bilinear[1])


def s4d(view, is_zoh, p):
    """o [B,H,T], K [H,T] and the final state for u [B,H,T] and the parameters of the goldens."""
    u, C, h0 = p["u"].swapaxes(1, 2), p["C_re"] + 1j * p["C_im"], p["h0_re"] + 1j * p["h0_im"]
    A = -jnp.exp(p["log_A_re"]) + 1j * p["A_im"]
    decay, enter = discretise(is_zoh, p["log_dt"], A, p["B_re"] + 1j * p["B_im"])
    powers = jnp.exp(jnp.log(decay)[..., None] * jnp.arange(u.shape[1] + 1))  # decay ** l for l = 0 .. T
    kernel = 2 * jnp.einsum("hn,hnl->hl", C * enter, powers[..., :-1]).real
    if view == "convolution":
        o = long_conv(u, kernel) + 2 * jnp.einsum("hn,hnt,bhn->bth", C, powers[..., 1:], h0).real
        state = powers[..., -1] * h0 + jnp.einsum("hnt,hn,bth->bhn", powers[..., -2::-1], enter, u)
    else:
        entered = enter * u[..., None]
        h, state = linear_recurrence(jnp.broadcast_to(decay, entered.shape), entered, state=h0, implementation=view)
        o = 2 * jnp.einsum("hn,bthn->bth", C, h).real
    return {"o": (o + p["D"] * u).swapaxes(1, 2), "K": kernel, "ht_re": state.real, "ht_im": state.imag}


@functools.cache
def differentiate_s4d(view):
    """(is_zoh, parameters, cotangents) -> outputs, the same from a zero state, gradients; compiled once for both rules."""

    def run(is_zoh, parameters, cotangents):
        outputs, pull = jax.vjp(functools.partial(s4d, view, is_zoh), parameters)
        zero = {name: jnp.zeros_like(value) for name, value in parameters.items() if name.startswith("h0")}
        return outputs, s4d(view, is_zoh, parameters | zero), pull(cotangents)[0]

    return fast_jit(run)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("view", ["convolution", "recurrent", "associative", "chunked"])
def test_both_views_of_s4d_meet_the_goldens(view, rule):
    golden = goldens.load(f"s4d_{rule}").arrays
    names = ("u", "log_dt", "log_A_re", "A_im", "B_re", "B_im", "C_re", "C_im", "D", "h0_re", "h0_im")
    cotangents = {name: golden[f"cot_{name}"] for name in ("o", "K", "ht_re", "ht_im")}
    parameters = {name: golden[name] for name in names}
    outputs, zero, gradients = differentiate_s4d(view)(rule == "zoh", parameters, cotangents)
    found = {name: relative_error(value, golden[name]) for name, value in outputs.items()}
    found |= {f"{name}_zero": relative_error(value, golden[f"{name}_zero"]) for name, value in zero.items()}
    found |= {name: relative_error(value, golden[f"grad_{name}"]) for name, value in gradients.items()}
    assert max(found.values()) < 1e-5, found
