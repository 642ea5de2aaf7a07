"""What all linear time-invariant state space models share: convolution that keeps documents apart, and chunks.

    x_t = A x_{t-1} + B u_t,   y_t = C x_t          A, B, C constant in time, one system per channel, x in R^N

Within C steps such a system is three small matrices per channel (``Tables``): its kernel, how it reads the state it
started from, and what it adds to the state at the end. States are made at chunk starts alone, T / C of them, by matrix
products over all chunks at once and an elementwise scan between chunks.

Documents are kept apart by selecting with ``where`` *before* every product, in values and, since the transpose of a
selection is a selection, in gradients: a NaN in one document reaches no other, except through the gradients of
the system itself, to which all contribute. No product sums over rows, channels or chunks, so that nothing leaks there.
Without ``reset`` nothing is selected, and a NaN reaches the whole of its chunk (of its sequence, through an FFT).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops import sequence_parallel
from seqmodels.ops.dispatch import dispatch
from seqmodels.ops.long_conv import long_conv


class Tables(NamedTuple):
    """A system over C steps."""

    kernel: Float[Array, "D C"]
    """Response to an impulse after 0 .. C - 1 steps."""
    read: Float[Array, "D N C"]
    """Output at steps 0 .. C - 1 from the state before step 0."""
    write: Float[Array, "D C N"]
    """State after step C - 1 from the inputs at steps 0 .. C - 1."""
    advance: Callable[[int], Callable[[Float[Array, "*b D N"]], Float[Array, "*b D N"]]]
    """For a number of steps (at most C): what those do to a state without input."""


def run(
    op: str,
    forms: Mapping[str, Callable | str],
    u: Float[Array, "B T D"],
    system: Any,
    state: Float[Array, "B D N"] | None,
    reset: Bool[Array, "B T"] | None,
    *,
    implementation: str | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """An op's output, in the dtype of ``u``, and its float32 state, by the form asked for or, for None, the fastest on a CPU.

    Args:
      op: its name.
      forms: functions of (u, system, state, reset), that of ``chunked`` of ``chunk_size`` too, or why there is none.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: the form's, where the op has none.
    """
    form = dispatch(
        op, forms, implementation,
        steps=u.shape[1], chunk_size=chunk_size, default="parallel" if reset is None else "chunked",
    )  # fmt: skip
    y, state = form(u.astype(jnp.float32), system, None if state is None else state.astype(jnp.float32), reset)
    return y.astype(u.dtype), state


def convolve(u: Float[Array, "B T D"], kernel: Float[Array, "D W"], reset: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """y_t = sum of kernel[l] u_{t-l} over the steps t - l of t's own document.

    Without ``reset`` by FFT, O(T log T). With it one age l after the other, O(T^2) for a kernel of T steps: no FFT keeps
    documents apart, or its rounding away from earlier steps.
    """
    if reset is None:
        return long_conv(u, kernel)
    return _convolve_documents(u.astype(jnp.float32), kernel, _age(reset)).astype(u.dtype)


def _age(reset: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Steps since the document's start, or since step 0 for the document that was already running."""
    steps = lax.broadcasted_iota(jnp.int32, reset.shape, 1)
    return steps - lax.cummax(jnp.where(reset, steps, 0), axis=1)


@jax.custom_vjp
def _convolve_documents(u, kernel, age):
    steps, taps = u.shape[1], min(u.shape[1], kernel.shape[1])
    earlier = jnp.pad(u, ((0, 0), (taps - 1, 0), (0, 0)))

    def add(back, y):
        shifted = lax.dynamic_slice_in_dim(earlier, taps - 1 - back, steps, axis=1)
        return y + jnp.where((age >= back)[:, :, None], kernel[:, back] * shifted, 0.0)

    return lax.fori_loop(0, taps, add, jnp.zeros_like(u))


def _convolve_documents_forward(u, kernel, age):
    return _convolve_documents(u, kernel, age), (u, kernel, age)


def _convolve_documents_backward(residuals, d_y):
    u, kernel, age = residuals
    steps, taps = u.shape[1], min(u.shape[1], kernel.shape[1])
    earlier = jnp.pad(u, ((0, 0), (taps - 1, 0), (0, 0)))
    later = jnp.pad(d_y, ((0, 0), (0, taps - 1), (0, 0)))
    later_age = jnp.pad(age, ((0, 0), (0, taps - 1)), constant_values=-1)

    def add(back, gradients):
        d_u, d_kernel = gradients
        shifted = lax.dynamic_slice_in_dim(earlier, taps - 1 - back, steps, axis=1)
        tap = jnp.sum(jnp.where((age >= back)[:, :, None], d_y * shifted, 0.0), axis=(0, 1))
        pulled = lax.dynamic_slice_in_dim(later, back, steps, axis=1)
        reached = lax.dynamic_slice_in_dim(later_age, back, steps, axis=1) >= back
        d_u = d_u + jnp.where(reached[:, :, None], kernel[:, back] * pulled, 0.0)
        return d_u, lax.dynamic_update_index_in_dim(d_kernel, tap, back, axis=1)

    d_u, d_kernel = lax.fori_loop(0, taps, add, (jnp.zeros_like(u), jnp.zeros_like(kernel)))
    return d_u, d_kernel, None


_convolve_documents.defvjp(_convolve_documents_forward, _convolve_documents_backward)


def in_chunks(
    u: Float[Array, "B T D"], tables: Tables, state: Float[Array, "B D N"], reset: Bool[Array, "B T"] | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Outputs and the last state, both float32, by chunks of as many steps as ``tables`` have."""
    u = u.astype(jnp.float32)
    outputs = []
    for piece, part, marks in _pieces(u, tables, reset):
        starts, state = _states(piece, part, state, marks)
        if marks is None:
            inside = jnp.einsum("bnjd,dji->bnid", piece, _toeplitz(part.kernel), precision=lax.Precision.HIGHEST)
        else:
            flat = piece.reshape(piece.shape[0] * piece.shape[1], *piece.shape[2:])
            inside = _convolve_documents(flat, part.kernel, _age(marks.reshape(flat.shape[:2]))).reshape(piece.shape)
        y = inside + _read(starts, part, marks)
        outputs.append(y.reshape(u.shape[0], y.shape[1] * y.shape[2], u.shape[2]))
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0], state


def last_state(
    u: Float[Array, "B T D"], tables: Tables, state: Float[Array, "B D N"], reset: Bool[Array, "B T"] | None
) -> Float[Array, "B D N"]:
    """The state after the last step, float32."""
    for piece, part, marks in _pieces(u.astype(jnp.float32), tables, reset):
        _, state = _states(piece, part, state, marks)
    return state


def response(tables: Tables, state: Float[Array, "B D N"], steps: int, reset: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """What the outputs of the next ``steps`` steps hold of ``state``."""
    length = tables.kernel.shape[1]
    if reset is not None:
        # A state that nothing reads must not reach the gradient of ``read`` either.
        state = jnp.where(reset[:, 0, None, None], 0.0, state)
    count, advance = -(-steps // length), tables.advance(length)
    _, starts = lax.scan(lambda x, _: (advance(x), x), state, length=count)
    y = jnp.einsum("nbdk,dki->bnid", starts, tables.read, precision=lax.Precision.HIGHEST)
    y = y.reshape(state.shape[0], count * length, state.shape[1])[:, :steps]
    if reset is None:
        return y
    return jnp.where((jnp.cumsum(reset, axis=1, dtype=jnp.int32) == 0)[:, :, None], y, 0.0)


def power_minus_1(E: Array, power: int, product: Callable[[Array, Array], Array] = jnp.multiply) -> Array:
    """(1 + E)^power - 1 by squaring; power >= 1."""
    result = None
    while power:
        if power % 2:
            result = E if result is None else result + E + product(result, E)
        power //= 2
        if power:
            E = 2 * E + product(E, E)
    return result


def run_sequence_parallel(
    op: Callable,
    arguments: tuple[Array, ...],
    added: Float[Array, "B D N"],
    advance: Callable[[Float[Array, "B D N"]], Float[Array, "B D N"]],
    state: Float[Array, "B D N"] | None,
    reset: Bool[Array, "B T"] | None,
    **options: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """``op(*arguments)`` where time is split over devices.

    Args:
      added: the state after this device's steps from an empty one.
      advance: what as many steps do to a state without input.
    """
    cut = sequence_parallel.has_reset(reset, added.shape[0])
    first = jnp.zeros_like(added) if state is None else state.astype(jnp.float32)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, None, added, lambda _, state: advance(state)))
    y, after = op(*arguments, state=before, reset=reset, **options)
    return y, sequence_parallel.from_last_device(after)


def near_root(steps: int) -> int:
    """The power of two next to the square root, from above: a chunk as long as there are chunks."""
    return 1 << ((steps - 1).bit_length() + 1) // 2


def _pieces(u, tables, reset):
    """The whole chunks [B, n, C, D], then what is left as one shorter chunk, each with its tables and marks."""
    batch, steps, channels = u.shape
    length = tables.kernel.shape[1]
    whole = steps // length * length
    for start, stop, size in ((0, whole, length), (whole, steps, steps - whole)):
        if start < stop:
            part = tables
            if size != length:
                # Fewer steps: the first taps, the first readings, the last writings.
                read, write = tables.read[:, :, :size], tables.write[:, length - size :]
                part = Tables(tables.kernel[:, :size], read, write, tables.advance)
            count = (stop - start) // size
            marks = None if reset is None else reset[:, start:stop].reshape(batch, count, size)
            yield u[:, start:stop].reshape(batch, count, size, channels), part, marks


def _states(u: Float[Array, "B n C D"], tables: Tables, state, marks: Bool[Array, "B n C"] | None):
    """States at chunk starts [n, B, D, N], zero where their chunk does not read them, and the state after the last."""
    if marks is None:
        written, cut, unread = u, None, None
    else:
        number = jnp.cumsum(marks, axis=2, dtype=jnp.int32)
        written = jnp.where((number == number[:, :, -1:])[..., None], u, 0.0)  # the last document's alone
        cut, unread = jnp.moveaxis(number[:, :, -1] > 0, 1, 0), jnp.moveaxis(marks[:, :, 0], 1, 0)
    added = jnp.einsum("bnjd,djk->nbdk", written, tables.write, precision=lax.Precision.HIGHEST)
    advance = tables.advance(u.shape[2])  # here, so that what it prepares is not prepared again in every step

    def step(x, chunk):
        added, cut = chunk
        return advance(_drop(x, cut)) + added, x

    state, starts = lax.scan(step, state, (added, cut))
    return _drop(starts, unread), state


def _read(starts, tables: Tables, marks):
    y = jnp.einsum("nbdk,dki->bnid", starts, tables.read, precision=lax.Precision.HIGHEST)
    if marks is None:
        return y
    return jnp.where((jnp.cumsum(marks, axis=2, dtype=jnp.int32) == 0)[..., None], y, 0.0)


def _drop(x, mark):
    return x if mark is None else jnp.where(mark[..., None, None], 0.0, x)


def _toeplitz(kernel: Float[Array, "D C"]) -> Float[Array, "D C C"]:
    """[d, j, i] = kernel[d, i - j], zero for i < j: rows of 2C numbers laid one short of each other, so no gather."""
    channels, taps = kernel.shape
    row = jnp.concatenate([kernel, jnp.zeros_like(kernel)], axis=1)
    rows = jnp.broadcast_to(row[:, None], (channels, taps, 2 * taps)).reshape(channels, -1)
    return rows[:, : taps * (2 * taps - 1)].reshape(channels, taps, 2 * taps - 1)[:, :, :taps]
