"""The LSTM's recurrence: gates that read the previous output, so that no step can begin before the last one has ended.

    [i, f, g, o]_t = z_t + h_{t-1} W
    c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(g_t)
    h_t = sigmoid(o_t) tanh(c_t)

(Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000 and without peepholes: torch's LSTM.) z_t is what
the gates get from the input, bias included. Only ``recurrent`` exists: tanh and sigmoid lie between the steps, so that two
steps do not combine into one of the same form, as a scan, a closed form and chunks all need.

The backward pass is written out: the gradient of W is one product over all steps, where differentiating the loop would add
a matrix of W's size at every step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops.dispatch import IMPLEMENTATIONS, dispatch
from seqmodels.ops.placement import per_shard


class LSTMState(NamedTuple):
    h: Float[Array, "B E"]  # the output
    c: Float[Array, "B E"]  # the cell


@per_shard(
    {"z": "r t", "kernel": "_", "state": LSTMState("r", "r"), "reset": "r t"},
    results=("r t", LSTMState("r", "r")),
    sequence_parallel="its recurrence is nonlinear, so that no step can begin before the last one has ended",
)
def lstm(
    z: Float[Array, "B T gates"],
    kernel: Float[Array, "E gates"],
    *,
    state: LSTMState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T E"], LSTMState]:
    """Runs the recurrence at the top of this file over a sequence.

    The product h W is taken in the dtype of ``z``; gates, cell and sums are float32.

    Args:
      z: what the gates get from the input, in the order i, f, g, o.
      kernel: W, gates in the same order.
      state: output and cell before the first step; ``None`` is zeros.
      reset: a new document starts at step t: h and c before it are taken to be zero.
      implementation: ``"recurrent"`` or ``None``.

    Returns:
      ``(h, state)``: outputs in the dtype of ``z``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: any other implementation.
    """
    if z.ndim != 3 or z.shape[1] == 0 or kernel.ndim != 2 or kernel.shape != (z.shape[2] // 4, z.shape[2]):
        raise ValueError(
            f"z must be [B, T, 4 E] with T >= 1 and kernel [E, 4 E]; got z {list(z.shape)}, kernel {list(kernel.shape)}"
        )
    if reset is not None and reset.shape != z.shape[:2]:
        raise ValueError(f"reset must be {list(z.shape[:2])}; got {list(reset.shape)}")
    form = dispatch("lstm", _FORMS, implementation, steps=z.shape[1], default="recurrent")
    size = kernel.shape[0]
    if state is None:
        zeros = jnp.zeros((z.shape[0], size), jnp.float32)
        state = LSTMState(zeros, zeros)
    for name, array in zip(("h", "c"), state):
        if array.shape != (z.shape[0], size):
            raise ValueError(f"the state's {name} must be {[z.shape[0], size]}; got {list(array.shape)}")
    h, state = form(z, kernel.astype(z.dtype), LSTMState(*(x.astype(jnp.float32) for x in state)), reset)
    return h.astype(z.dtype), state


def _drop(x, start):
    return x if start is None else jnp.where(start[:, None], 0.0, x)


def _product(x, kernel, contract_kernel_axis: int):
    """x times the kernel (or its transpose), operands in the kernel's dtype, sums in float32."""
    precision = lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((x.ndim - 1,), (contract_kernel_axis,)), ((), ()))
    return lax.dot_general(x.astype(kernel.dtype), kernel, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _by_time(*arrays):
    return tuple(None if array is None else jnp.moveaxis(array, 1, 0) for array in arrays)


@jax.custom_vjp
def _run(z, kernel, state, reset):
    return _forward(z, kernel, state, reset)[0]


def _forward(z, kernel, state, reset):
    def step(before, inputs):
        z, start = inputs
        h, c = _drop(before.h, start), _drop(before.c, start)
        i, f, g, o = jnp.split(z.astype(jnp.float32) + _product(h, kernel, 0), 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        new_c = f * c + i * g
        new_h = o * jnp.tanh(new_c)
        return LSTMState(new_h, new_c), (new_h, new_c, (i, f, g, o))

    final, (h, c, gates) = lax.scan(step, state, _by_time(z, reset))
    return (jnp.moveaxis(h, 0, 1), final), (h, c, gates)


def _run_forward(z, kernel, state, reset):
    outputs, tape = _forward(z, kernel, state, reset)
    return outputs, (tape, z[:, :0], kernel, state, reset)


def _run_backward(residuals, cotangents):
    (h, c, gates), empty_z, kernel, state, reset = residuals
    d_h, d_state = cotangents
    (d_h_by_time, starts) = _by_time(d_h.astype(jnp.float32), reset)
    previous = functools.partial(_before, starts=starts)
    h_before, c_before = previous(state.h, h), previous(state.c, c)

    def step(carry, inputs):
        d_h, c, c_before, (i, f, g, o), start = inputs
        d_h = d_h + carry.h
        tanh_c = jnp.tanh(c)
        d_c = carry.c + d_h * o * (1.0 - tanh_c * tanh_c)
        d_z = jnp.concatenate(
            [
                d_c * g * i * (1.0 - i),
                d_c * c_before * f * (1.0 - f),
                d_c * i * (1.0 - g * g),
                d_h * tanh_c * o * (1.0 - o),
            ],
            axis=-1,
        )
        return LSTMState(_drop(_product(d_z, kernel, 1), start), _drop(d_c * f, start)), d_z

    d_state, d_z = lax.scan(step, d_state, (d_h_by_time, c, c_before, gates, starts), reverse=True)
    rows = h_before.reshape(-1, h.shape[-1]).astype(kernel.dtype)
    d_kernel = _product(rows.T, d_z.reshape(-1, d_z.shape[-1]).astype(kernel.dtype), 0)
    return jnp.moveaxis(d_z, 0, 1).astype(empty_z.dtype), d_kernel.astype(kernel.dtype), d_state, None


def _before(initial, values, *, starts):
    """What each step saw of the step before it: [T, B, E]."""
    before = jnp.concatenate([initial[None], values[:-1]])
    return before if starts is None else jnp.where(starts[:, :, None], 0.0, before)


_run.defvjp(_run_forward, _run_backward)


_FORMS = {
    name: (
        f"the LSTM has no {name} form: its recurrence is nonlinear, each step's gates read the output of the "
        "step before; use implementation='recurrent'"
    )
    for name in IMPLEMENTATIONS
} | {"recurrent": _run}
