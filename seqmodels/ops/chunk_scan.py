"""The recurrence over chunks that every matrix state shares: ``chunk.py`` says what a chunk does to the state.

``prepare`` turns a chunk's inputs into a ``Chunk``. It knows the parameterisation and nothing of the state, so
all chunks can be prepared at once. ``chunk_scan`` runs the recurrence over chunks. Its own derivative rule keeps the inputs
and the states at the starts of chunks, N K V numbers a head, and prepares every chunk again in the backward pass.
"""

import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops import kernels, target
from seqmodels.ops.chunk import Chunk, Inputs, advance, pad_steps, power_of_two

Prepare = Callable[[Inputs], Chunk]


class Schedule(enum.Enum):
    """Which chunk is prepared when; the numbers are the same. The third schedule is a kernel's (``kernels.Kernel``)."""

    ONE_BY_ONE = "each chunk is prepared when its turn comes, so that it stays in cache: fastest on a CPU"
    TOGETHER = "all chunks are prepared before the recurrence starts, in parallel: for a device with many cores"


def schedule() -> Schedule:
    """The device's, without a kernel."""
    return Schedule.ONE_BY_ONE if target.device() == "cpu" else Schedule.TOGETHER


def run(
    prepare: Prepare,
    chunk_size: int,
    precision: lax.Precision,
    inputs: Inputs,
    state: Float[Array, "B *heads K V"],
    *,
    kernel: kernels.Kernel | None = None,
) -> tuple[Float[Array, "B T *heads V"], Float[Array, "B *heads K V"]]:
    """``chunk_scan`` over any number of steps, in the kernel or, without one, by this device's schedule."""
    steps = jax.tree.leaves(inputs)[0].shape[1]
    padding = -steps % chunk_size
    if padding:
        inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)), inputs)
    scan = functools.partial(chunk_scan, prepare, chunk_size, precision, schedule() if kernel is None else kernel)
    outputs, final = scan(inputs, state)
    return outputs[:, :steps], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def chunk_scan(
    prepare: Prepare,
    chunk_size: int,
    precision: lax.Precision,
    schedule: Schedule | kernels.Kernel,
    inputs: Inputs,
    state: Float[Array, "B *heads K V"],
) -> tuple[Float[Array, "B T *heads V"], Float[Array, "B *heads K V"]]:
    """Runs a recurrence over the chunks of a sequence.

    Args:
      prepare: the parameterisation: takes the inputs of one chunk, [..., *heads, C, features] with C a power of two, and leading
        axes of its own if several are prepared at once.
      chunk_size: any number of steps; chunks are padded with zeros to a power of two inside.
      precision: of the matrix products.
      schedule: which chunk is prepared when; with a kernel (``chunk_scan``) all chunks together, and the kernel runs the recurrence.
        For chunks [N, B, *heads, C, X], where a head axis may be 1 in some arrays, and a state [B, *heads, K, V] it has
        ``forward``: (outputs [N, B, *heads, C, V], final state, and with ``keep_starts`` the states at chunk starts
        [N, B, *heads, K, V], else None), float32 but for those, which may have the products' dtype;
        ``backward``, of the state alone, from d_outputs and d_final: (the cotangents of the states after every chunk
        [N, B, *heads, K, V], that of the first state). It needs no state:

            d_S = gamma[:, None] d_S' b_keep[None, :] + q~^T (d_o b_read) - W^T (P^T d_o + k~ d_S')
      inputs: a tuple of [B, T, *heads, features] (or None), T a multiple of ``chunk_size``; a zero vector must mean "nothing happens"
        in each.
      state: the state before the first step.

    Returns:
      ``(output, state)``, float32.
    """
    return _run(prepare, chunk_size, precision, schedule, inputs, state, keep_starts=False)[:2]


def _chunk_scan_forward(prepare, chunk_size, precision, schedule, inputs, state):
    outputs, final, starts = _run(prepare, chunk_size, precision, schedule, inputs, state, keep_starts=True)
    return (outputs, final), (inputs, starts)


def _run(prepare, chunk_size, precision, schedule, inputs, state, *, keep_starts):
    """Outputs, the final state, and the states at chunk starts (a kernel makes them only if they are kept)."""
    batch, steps = jax.tree.leaves(inputs)[0].shape[:2]
    count = steps // chunk_size
    if schedule is Schedule.ONE_BY_ONE:

        def step(n, carry):
            state, outputs, starts = carry
            chunk = prepare(_take(inputs, n, chunk_size))
            output, following = advance(chunk, state, precision)
            outputs = _put(outputs, output, n, chunk_size)
            return following, outputs, lax.dynamic_update_index_in_dim(starts, state, n, 0)

        outputs = jnp.zeros((batch, steps, *state.shape[1:-2], state.shape[-1]), jnp.float32)
        starts = jnp.zeros((count, *state.shape), jnp.float32)
        final, outputs, starts = lax.fori_loop(0, count, step, (state, outputs, starts))
    elif schedule is Schedule.TOGETHER:
        chunks = prepare(_split(inputs, chunk_size))
        final, starts = lax.scan(lambda state, chunk: (advance(chunk, state, precision)[1], state), state, chunks)
        outputs = _join(advance(chunks, starts, precision)[0], chunk_size)
    else:
        outputs, final, starts = schedule.passes.forward(
            prepare(_split(inputs, chunk_size)),
            state,
            precision=precision,
            keep_starts=keep_starts,
            interpret=schedule.interpret,
        )
        outputs = _join(outputs, chunk_size)
    return outputs, final, starts


def _chunk_scan_backward(prepare, chunk_size, precision, schedule, residuals, cotangents):
    inputs, starts = residuals
    d_outputs, d_state = cotangents
    count = starts.shape[0]

    def run(chunk_inputs, state):
        return advance(prepare(chunk_inputs), state, precision)

    if schedule is Schedule.ONE_BY_ONE:

        def step(i, carry):
            d_state, d_inputs = carry
            n = count - 1 - i
            start = lax.dynamic_index_in_dim(starts, n, 0, keepdims=False)
            _, pull = jax.vjp(run, _take(inputs, n, chunk_size), start)
            d_chunk, d_state = pull((_take(d_outputs, n, chunk_size), d_state))
            return d_state, jax.tree.map(lambda x, d: _put(x, d, n, chunk_size), d_inputs, d_chunk)

        d_state, d_inputs = lax.fori_loop(0, count, step, (d_state, jax.tree.map(jnp.zeros_like, inputs)))
    else:
        split_inputs, d_split_outputs = _split((inputs, d_outputs), chunk_size)
        chunks = prepare(split_inputs)
        if schedule is Schedule.TOGETHER:

            def step(d_state, x):
                chunk, start, d_output = x
                _, pull = jax.vjp(lambda state: advance(chunk, state, precision), start)
                return pull((d_output, d_state))[0], d_state

            d_state, d_ends = lax.scan(step, d_state, (chunks, starts, d_split_outputs), reverse=True)
        else:
            d_ends, d_state = schedule.passes.backward(
                chunks, d_split_outputs, d_state, precision=precision, interpret=schedule.interpret
            )
        starts = starts.astype(jnp.float32)  # a kernel's may have the products' dtype
        _, pull = jax.vjp(lambda chunk_inputs: run(chunk_inputs, starts), split_inputs)
        (d_split_inputs,) = pull((d_split_outputs, d_ends))
        d_inputs = jax.tree.map(lambda d: _join(d, chunk_size), d_split_inputs)
    return d_inputs, d_state


chunk_scan.defvjp(_chunk_scan_forward, _chunk_scan_backward)


def _take(tree, n, chunk_size):
    """Chunk n of [B, T, *heads, X] arrays, as [B, *heads, C, X] with C the padded chunk size."""

    def take(x):
        steps = lax.dynamic_slice_in_dim(x, n * chunk_size, chunk_size, axis=1)
        return pad_steps(jnp.moveaxis(steps, 1, -2), power_of_two(chunk_size))

    return jax.tree.map(take, tree)


def _put(whole, chunk, n, chunk_size):
    """Writes [B, *heads, C, X] over chunk n of [B, T, *heads, X]."""
    steps = jnp.moveaxis(chunk[..., :chunk_size, :], -2, 1).astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, steps, n * chunk_size, axis=1)


def _split(tree, chunk_size):
    """[B, T, *heads, X] arrays as [N, B, *heads, C, X], with C the padded chunk size."""

    def split(x):
        batch, steps, *rest = x.shape
        x = x.reshape(batch, steps // chunk_size, chunk_size, *rest)
        return pad_steps(jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0), power_of_two(chunk_size))

    return jax.tree.map(split, tree)


def _join(chunks, chunk_size):
    """[N, B, *heads, C, X] as [B, T, *heads, X]."""
    x = jnp.moveaxis(jnp.moveaxis(chunks[..., :chunk_size, :], 0, 1), -2, 2)
    batch, count, size, *rest = x.shape
    return x.reshape(batch, count * size, *rest)
