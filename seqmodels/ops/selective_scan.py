"""Mamba's selective scan (S6): a diagonal state space model whose step size, input and output depend on the token.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t            (arXiv 2312.00752, algorithm 2)

Channel e of E and state n of N decay by exp(dt_t[e] A[e, n]): full rank in E x N, so this is not a case of
``gated_linear_attention``. B enters as dt * B (Euler), as in the authors' code; the paper writes zero-order hold.

| implementation | what it is | states held for a gradient |
|---|---|---|
| recurrent | the definition, one step after the other | 3 T |
| associative | ``linear_recurrence`` over materialised decays and inputs | 13 T |
| parallel | raises: decays of full rank leave no matrix of scores between steps | |
| chunked | one step after the other with its own gradient, from states saved at chunk starts | T / C + C |
| pallas | ``chunked`` as a kernel, for a device that has it; else raises | T / C |

The chunked form is sequential on purpose: the recurrence is elementwise, so that a parallel prefix inside the chunk
only adds passes over memory (on a CPU it took six times as long). What makes a step cheap is E as the minor axis
(inside, the state is [B, N, E]), reading the inputs where they lie (moving time to the front first cost a fifth), and
a gradient that recomputes one chunk's states in a buffer small enough for the cache.

Every exponent is the dt * A of one step: nothing is summed, divided or clamped, so that any decay is as exact as
float32 makes it. The state, the decays and all sums are float32. Documents are kept apart by selecting the carry with
``where``, in values and gradients: a NaN or an infinity in one document of a row reaches no other, except through the
gradient of ``A``, to which all contribute.
"""

import functools

import jax
import jax.numpy as jnp
from jax import custom_derivatives, lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops import kernels, sequence_parallel
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.dispatch import KernelForm, dispatch
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.placement import per_shard


def _sequence_parallel(op, x, dt, A, B, C, *, state=None, reset=None, **options):
    _, added = op(x, dt, A, B, C, reset=reset, **options)
    decay = jnp.exp(jnp.sum(dt.astype(jnp.float32), axis=1)[:, :, None] * A.astype(jnp.float32))
    cut = sequence_parallel.has_reset(reset, x.shape[0])
    first = jnp.zeros_like(added) if state is None else state.astype(jnp.float32)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, decay, added, jnp.multiply))
    y, after = op(x, dt, A, B, C, state=before, reset=reset, **options)
    return y, sequence_parallel.from_last_device(after)


@per_shard(
    {"x": "b t h", "dt": "b t h", "A": "h", "B": "b t", "C": "b t", "state": "b h", "reset": "b t"}, results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)  # fmt: skip
def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    *,
    state: Float[Array, "B E N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """Runs the recurrence at the top of this file. The skip (D x), the gate and softplus(dt) are the caller's.

    Args:
      x: inputs.
      dt: step sizes, >= 0; a step of 0 leaves the state as it is.
      A: the diagonal of the state matrix, <= 0 (usually -exp(A_log)); keep it float32.
      B: how the input enters each state, shared by the channels.
      C: how the state is read, shared by the channels.
      state: h before the first step; None is zero.
      reset: marks the steps at which a new document starts: h is zero before such a step.
      implementation: a row of the table above; None is recurrent for one step, else pallas where the device has the kernel,
        else chunked.
      chunk_size: most steps per chunk of ``chunked``, any number >= 1; the kernels have none to choose and are
        refused with it, other forms have no use for it. None: the table in ``dispatch.py``.

    Returns:
      ``(y, state)``: outputs in the dtype of ``x``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: the implementation does not exist, or not for this call; the message says what is missing.
    """
    _check(x, dt, A, B, C, state, reset)
    if state is None:
        state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    form = dispatch(
        "selective_scan", _FORMS, implementation, steps=x.shape[1], chunk_size=chunk_size,
        kernel_forms={"selective_scan": KernelForm(_in_a_kernel, {"x": x, "dt": dt, "A": A, "B": B, "C": C})},
    )  # fmt: skip
    return form(x, dt, A, B, C, state.astype(jnp.float32), reset)


def _check(x, dt, A, B, C, state, reset):
    shapes = shapes_of(x=x, dt=dt, A=A, B=B, C=C)
    if x.ndim != 3 or x.shape[1] == 0 or A.ndim != 2:
        raise ValueError(f"x must be [B, T, E] with T >= 1 and A [E, N]; got {shapes}")
    (batch, steps, channels), states = x.shape, A.shape[1]
    expected = {
        "dt": (dt, (batch, steps, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, steps, states)),
        "C": (C, (batch, steps, states)),
        "state": (state, (batch, channels, states)),
        "reset": (reset, (batch, steps)),
    }
    check_arguments(expected, shapes)


def _float32(*arrays):
    return tuple(array.astype(jnp.float32) for array in arrays)


# ---- the definition, and the parallel prefix


def _recurrent(x, dt, A, B, C, state, reset):
    (A,) = _float32(A)

    def step(h, inputs):
        *inputs, start = inputs
        x, dt, B, C = _float32(*inputs)
        if start is not None:
            h = jnp.where(start[:, None, None], 0.0, h)
        h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
        return h, jnp.einsum("ben,bn->be", h, C, precision=lax.Precision.HIGHEST)

    by_time = tuple(None if array is None else jnp.moveaxis(array, 1, 0) for array in (x, dt, B, C, reset))
    state, y = lax.scan(step, state, by_time)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state


def _associative(x, dt, A, B, C, state, reset):
    dtype = x.dtype
    x, dt, A, B, C = _float32(x, dt, A, B, C)
    decay = jnp.exp(dt[:, :, :, None] * A)
    added = (dt * x)[:, :, :, None] * B[:, :, None, :]
    h, state = linear_recurrence(decay, added, state=state, reset=reset, implementation="associative")
    y = jnp.einsum("bten,btn->bte", h, C, precision=lax.Precision.HIGHEST)
    return y.astype(dtype), state


# ---- chunks. Inside, states are [B, N, E]; time is padded to whole chunks with steps of dt = 0, which do nothing.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk_size, x, dt, A, B, C, state, reset):
    return _forward(chunk_size, x, dt, A, B, C, state, reset)[0]


def _forward(chunk_size, x, dt, A, B, C, state, reset):
    """((y, final state), states at chunk starts [T / C, B, N, E])."""
    steps = x.shape[1]
    times, (x, dt, B, C, reset) = _whole_chunks(chunk_size, x, dt, B, C, reset)
    A_by_state = A.astype(jnp.float32).T

    def step(carry, t):
        h, y = carry
        x_t, dt_t, B_t, C_t = _float32(*(_at(array, t) for array in (x, dt, B, C)))
        h = _advance(_keep(h, reset, t), x_t, dt_t, A_by_state, B_t)
        y_t = jnp.einsum("bne,bn->be", h, C_t, precision=lax.Precision.HIGHEST)
        return (h, _put(y, y_t, t)), None

    def chunk(carry, times):
        return lax.scan(step, carry, times)[0], carry[0]

    (h, y), starts = lax.scan(chunk, (jnp.swapaxes(state, 1, 2), jnp.zeros_like(x)), times)
    return (y[:, :steps], jnp.swapaxes(h, 1, 2)), starts


def _chunked_forward(chunk_size, *primals):
    x, dt, A, B, C, state, reset = jax.tree.map(lambda primal: primal.value, primals)
    outputs, starts = _forward(chunk_size, x, dt, A, B, C, state, reset)
    return outputs, (x, dt, A, B, C, reset, starts)


def _chunked_backward(chunk_size, residuals, cotangents):
    """Chunk by chunk from the last: its states recomputed, then g_t = C_t d_y_t + exp(dt_{t+1} A) g_{t+1} backwards.

    d_x_t = dt_t (g_t . B_t),  d_B_t = g_t . (dt_t x_t),  d_C_t = h_t . d_y_t,  and with the exponent's own gradient
    w_t = g_t exp(dt_t A) h_{t-1}:  d_dt_t = A . w_t + x_t (g_t . B_t),  d_A = sum over t of dt_t w_t.

    Where y was used for nothing (a device's first pass over its steps), C_t d_y_t and d_C_t are left out.
    """
    x, dt, A, B, C, reset, starts = residuals
    d_y, d_final = (None if isinstance(each, custom_derivatives.SymbolicZero) else each for each in cotangents)
    steps = x.shape[1]
    times, (x, dt, B, C, d_y, reset) = _whole_chunks(chunk_size, x, dt, B, C, d_y, reset)
    A_by_state = A.astype(jnp.float32).T
    places = jnp.arange(times.shape[1], dtype=jnp.int32)

    def chunk(carry, times_and_start):
        times, start = times_and_start

        def recompute(carry, time_and_place):
            h, before = carry
            t, place = time_and_place
            x_t, dt_t, B_t = _float32(*(_at(array, t) for array in (x, dt, B)))
            h = _keep(h, reset, t)
            before = lax.dynamic_update_index_in_dim(before, h, place, axis=0)
            return (_advance(h, x_t, dt_t, A_by_state, B_t), before), None

        def step(carry, time_and_place):
            d_h, d_A, d_x, d_dt, d_B, d_C = carry
            t, place = time_and_place
            x_t, dt_t, B_t = _float32(*(_at(array, t) for array in (x, dt, B)))
            h_before = lax.dynamic_index_in_dim(before, place, axis=0, keepdims=False)
            decay = jnp.exp(dt_t[:, None, :] * A_by_state)
            g = d_h
            if d_y is not None:
                C_t, d_y_t = _float32(_at(C, t), _at(d_y, t))
                h = decay * h_before + (dt_t * x_t)[:, None, :] * B_t[:, :, None]
                d_C = _put(d_C, jnp.einsum("bne,be->bn", h, d_y_t, precision=lax.Precision.HIGHEST), t)
                g = d_h + d_y_t[:, None, :] * C_t[:, :, None]
            d_h = g * decay
            w = d_h * h_before
            d_A += w * dt_t[:, None, :]
            written = jnp.einsum("bne,bn->be", g, B_t, precision=lax.Precision.HIGHEST)
            d_x = _put(d_x, dt_t * written, t)
            d_dt = _put(d_dt, _sum_over_states(w, A_by_state) + x_t * written, t)
            d_B = _put(d_B, jnp.einsum("bne,be->bn", g, dt_t * x_t, precision=lax.Precision.HIGHEST), t)
            return (_keep(d_h, reset, t), d_A, d_x, d_dt, d_B, d_C), None

        buffer = jnp.empty((len(places), *start.shape), jnp.float32)
        (_, before), _ = lax.scan(recompute, (start, buffer), (times, places))
        return lax.scan(step, carry, (times, places), reverse=True)

    d_h = jnp.zeros(starts.shape[1:], jnp.float32) if d_final is None else jnp.swapaxes(d_final, 1, 2)
    # d_A keeps its batch axis to the end: summed in every step, it would be an all-reduce per step across devices.
    by_time = (x, dt, B, None if d_y is None else C)
    carry = (d_h, jnp.zeros_like(d_h), *jax.tree.map(jnp.zeros_like, by_time))
    (d_h, d_A, *by_time), _ = lax.scan(chunk, carry, (times, starts), reverse=True)
    d_x, d_dt, d_B, d_C = jax.tree.map(lambda array: array[:, :steps], by_time)
    return d_x, d_dt, jnp.sum(d_A, axis=0).T.astype(A.dtype), d_B, d_C, jnp.swapaxes(d_h, 1, 2), None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def _whole_chunks(chunk_size: int, *arrays):
    """The times of each chunk [T / C, C], and the arrays padded in time with zeros to that many steps."""
    steps = arrays[0].shape[1]
    num_chunks = -(-steps // chunk_size)
    length = -(-steps // num_chunks)  # as even as can be: 33 steps are two chunks of 17, not of 32
    padding = num_chunks * length - steps
    if padding:
        arrays = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)), arrays)
    return jnp.arange(num_chunks * length, dtype=jnp.int32).reshape(num_chunks, length), arrays


def _at(array, t):
    return lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _put(array, value, t):
    return lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), t, axis=1)


def _keep(h, reset, t):
    """h where step t belongs to the same document as step t - 1, else zero."""
    return h if reset is None else jnp.where(_at(reset, t)[:, None, None], 0.0, h)


def _advance(h, x, dt, A_by_state, B):
    return jnp.exp(dt[:, None, :] * A_by_state) * h + (dt * x)[:, None, :] * B[:, :, None]


def _sum_over_states(w: Float[Array, "B N E"], A_by_state: Float[Array, "N E"]) -> Float[Array, "B E"]:
    """Sum over n of A[n] w[:, n], term by term: as a ``sum``, XLA runs it on a pool of threads, ten times slower."""
    return sum(w[:, n] * A_by_state[n] for n in range(w.shape[1]))


# ---- the kernel, which keeps what the chunked form keeps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pallas(kernel: kernels.Kernel, x, dt, A, B, C, state, reset):
    """The passes: ``forward`` gives (y, final state, with ``keep_starts`` the states at chunk starts in a layout of the
    kernel's own, else None), ``backward`` the gradients of x, dt, A, B, C and the state.
    """
    return kernel.passes.forward(x, dt, A, B, C, state, reset, keep_starts=False, interpret=kernel.interpret)[:2]


def _pallas_forward(kernel, x, dt, A, B, C, state, reset):
    y, final, starts = kernel.passes.forward(x, dt, A, B, C, state, reset, keep_starts=True, interpret=kernel.interpret)
    return (y, final), (x, dt, A, B, C, reset, starts)


def _pallas_backward(kernel, residuals, cotangents):
    gradients = kernel.passes.backward(*residuals, *cotangents, interpret=kernel.interpret)
    return *gradients, None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _in_a_kernel(x, dt, A, B, C, state, reset, *, kernel):
    return _pallas(kernel, x, dt, A, B, C, state, reset)


def _in_chunks(*arguments, chunk_size):
    return _chunked(chunk_size, *arguments)


_FORMS = {
    "recurrent": _recurrent,
    "associative": _associative,
    "parallel": (
        "selective_scan has no parallel form: its decays have full rank in channels x states, so that no matrix of"
        " scores between steps exists; use associative or chunked"
    ),
    "chunked": _in_chunks,
}
