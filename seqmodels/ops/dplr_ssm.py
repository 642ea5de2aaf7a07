"""A linear time-invariant state space model whose state matrix is diagonal plus low rank (DPLR): the core of S4.

    dx/ds = (diag(A) - P P^*) x + B u,   y = 2 Re(sum over modes of C x)         one system per channel, bilinear in time
    x_t = x_{t-1} + (1 - dt/2 F)^-1 dt (F x_{t-1} + B u_t)                       F = diag(A) - P P^*

(arXiv 2111.00396, section 3). A channel has M complex modes, half of N = 2 M in conjugate pairs; P^* x goes over all N, so it
is the real number 2 Re(sum of conj(P) x). Woodbury's identity makes the inverse a diagonal and a correction of rank one,
whose denominator is 1 + dt/2 P^* (1 - dt/2 A)^-1 P >= 1, and a step is O(N) (the paper's appendix C.2).

| implementation | what it is | per channel |
|---|---|---|
| recurrent | the definition, one step after the other | B T N work |
| associative | raises: it would multiply dense N x N transitions at every step | |
| parallel | the convolution view: the kernel by one recurrence from an impulse, then FFT | T N + B T log T work |
| chunked | a kernel of C steps inside chunks, states at chunk starts alone, the dense dA^C between them | B T (C + 2 N) + N^3 log C |
| pallas | raises: not written yet | |

The kernel is T steps of the recurrence for all rows at once, exact in float32 and linear in T; the paper's Cauchy kernel makes it
by evaluating the generating function at roots of unity, which costs digits in float32. Documents and NaN:
see ``time_invariant``. The state and all arithmetic are float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from seqmodels.ops import time_invariant
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.placement import per_shard


def _sequence_parallel(op, u, A, P, B, C, dt, *, state=None, reset=None, **options):
    _, added = op(u, A, P, B, C, dt, reset=reset, **options)
    advance = _advance(_discretise(*(x.astype(jnp.complex64) for x in (A, P, B, C)), dt.astype(jnp.float32)[:, None]))
    return time_invariant.run_sequence_parallel(op, (u, A, P, B, C, dt), added, advance(u.shape[1]), state, reset, **options)


@per_shard(
    {"u": "b t h", "A": "h", "P": "h", "B": "h", "C": "h", "dt": "h", "state": "b h", "reset": "b t"},
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)
def dplr_ssm(
    u: Float[Array, "B T D"],
    A: Complex[Array, "D M"],
    P: Complex[Array, "D M"],
    B: Complex[Array, "D M"],
    C: Complex[Array, "D M"],
    dt: Float[Array, " D"],
    *,
    state: Float[Array, "B D N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Runs the recurrence at the top of this file. The skip (D u) is the caller's.

    Args:
      u: inputs.
      A: the diagonal, real part < 0.
      P: the low-rank part.
      B: how the input enters each mode, continuous.
      C: how the modes are read.
      dt: step sizes, > 0.
      state: x before the first step, the real parts first, then the imaginary parts; None is zero.
      reset: marks the steps at which a new document starts: x is zero before such a step.
      implementation: a row of the table above; None is recurrent for one step, else parallel without ``reset`` and
        chunked with it.
      chunk_size: steps per chunk of ``chunked``, any number >= 1; other forms have no use for it.

    Returns:
      ``(y, state)``: outputs in the dtype of ``u``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: the implementation does not exist; the message says what is missing.
    """
    _check(u, A, P, B, C, dt, state, reset)
    system = _discretise(*(x.astype(jnp.complex64) for x in (A, P, B, C)), dt.astype(jnp.float32)[:, None])
    # Measured on a CPU at B 16, T 256, D 128, N 64, forward and backward: parallel 45 ms, chunked 91 (with documents
    # 155 and 100), recurrent 890.
    return time_invariant.run("dplr_ssm", _FORMS, u, system, state, reset, implementation=implementation, chunk_size=chunk_size)


def kernel(
    A: Complex[Array, "D M"],
    P: Complex[Array, "D M"],
    B: Complex[Array, "D M"],
    C: Complex[Array, "D M"],
    dt: Float[Array, " D"],
    steps: int,
) -> Float[Array, "D T"]:
    """Response to an impulse after 0 .. steps - 1 steps, float32; arguments as of ``dplr_ssm``."""
    system = _discretise(*(x.astype(jnp.complex64) for x in (A, P, B, C)), dt.astype(jnp.float32)[:, None])
    return _kernel(system, steps)


def _check(u, A, P, B, C, dt, state, reset):
    shapes = shapes_of(u=u, A=A, P=P, B=B, C=C)
    if u.ndim != 3 or u.shape[1] == 0 or A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(f"u must be [B, T, D] with T >= 1 and A [D, M]; got {shapes}")
    expected = {
        "P": (P, A.shape),
        "B": (B, A.shape),
        "C": (C, A.shape),
        "dt": (dt, A.shape[:1]),
        "state": (state, (u.shape[0], A.shape[0], 2 * A.shape[1])),
        "reset": (reset, u.shape[:2]),
    }
    check_arguments(expected, shapes)


# ---- one step. A state is a pair of real numbers per mode, [.., D, 2M], the real parts first.


class _System(NamedTuple):
    """x_t = x_{t-1} + move(x_{t-1}) + dB u_t,   move(x) = v - w P^* v,   v = f x - g P^* x;   y = read . x"""

    f: Complex[Array, "D M"]
    g: Complex[Array, "D M"]
    w: Complex[Array, "D M"]
    P: Complex[Array, "D M"]
    dB: Float[Array, "D N"]
    read: Float[Array, "D N"]


def _discretise(A, P, B, C, dt) -> _System:
    half = (dt / 2).astype(jnp.complex64)
    solve = 1 / (1 - half * A)  # (1 - dt/2 diag(A))^-1
    solved_P = half * solve * P
    w = solved_P / (1 + _project(P, solved_P)).astype(jnp.complex64)
    entered = 2 * half * solve * B
    dB = entered - w * _project(P, entered).astype(jnp.complex64)
    read = jnp.concatenate([2 * C.real, -2 * C.imag], axis=-1)
    return _System(2 * half * solve * A, 2 * solved_P, w, P, jnp.concatenate([dB.real, dB.imag], axis=-1), read)


def _project(P, x):
    """P^* x over both halves of the conjugate pairs; keeps the axis."""
    return 2 * jnp.sum(P.real * x.real + P.imag * x.imag, axis=-1, keepdims=True)


def _move(system: _System, x: Float[Array, "*b D N"]) -> Float[Array, "*b D N"]:
    """(dA - 1) x."""
    x = lax.complex(*jnp.split(x, 2, axis=-1))
    v = system.f * x - system.g * _project(system.P, x).astype(jnp.complex64)
    v = v - system.w * _project(system.P, v).astype(jnp.complex64)
    return jnp.concatenate([v.real, v.imag], axis=-1)


# ---- the definition


def _recurrent(u, system, state, reset):
    def step(x, inputs):
        u, start = inputs
        if start is not None:
            x = jnp.where(start[:, None, None], 0.0, x)
        x = x + _move(system, x) + u[:, :, None] * system.dB
        return x, jnp.sum(system.read * x, axis=-1)

    by_time = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (u, reset))
    state, y = lax.scan(step, _zeros(u, system) if state is None else state, by_time)
    return jnp.moveaxis(y, 0, 1), state


def _zeros(u, system):
    return jnp.zeros((u.shape[0], *system.dB.shape), jnp.float32)


# ---- convolution, and chunks


def _kernel(system, steps):
    def step(x, _):
        return x + _move(system, x), jnp.sum(system.read * x, axis=-1)

    return lax.scan(step, system.dB, length=steps)[1].T


def _parallel(u, system, state, reset):
    steps = u.shape[1]
    y = time_invariant.convolve(u, _kernel(system, steps), reset)
    tables = _tables(system, time_invariant.near_root(steps))
    if state is None:
        return y, time_invariant.last_state(u, tables, _zeros(u, system), reset)
    y = y + time_invariant.response(tables, state, steps, reset)
    return y, time_invariant.last_state(u, tables, state, reset)


def _chunked(u, system, state, reset, *, chunk_size):
    tables = _tables(system, chunk_size)
    return time_invariant.in_chunks(u, tables, _zeros(u, system) if state is None else state, reset)


def _tables(system, length) -> time_invariant.Tables:
    def column(x, _):
        return x + _move(system, x), x

    _, pull = jax.vjp(functools.partial(_move, system), system.dB)

    def row(c, _):
        c = c + pull(c)[0]
        return c, c

    columns = lax.scan(column, system.dB, length=length)[1]  # dA^l dB
    rows = lax.scan(row, system.read, length=length)[1]  # C dA^(l + 1)
    return time_invariant.Tables(
        kernel=jnp.einsum("dn,ldn->dl", system.read, columns, precision=lax.Precision.HIGHEST),
        read=jnp.moveaxis(rows, 0, 2),
        write=jnp.moveaxis(columns[::-1], 0, 1),
        advance=_advance(system),
    )


def _advance(system: _System):
    """For a number of steps: what those do to a state [B, D, N] without input."""
    states = system.dB.shape[-1]
    units = jnp.broadcast_to(jnp.eye(states, dtype=jnp.float32)[:, None], (states, *system.dB.shape))
    dA_minus_1 = jnp.moveaxis(_move(system, units), 0, 2)  # [D, N, N], column by column
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def advance(steps):
        matrix = time_invariant.power_minus_1(dA_minus_1, steps, product)
        return lambda x: x + jnp.einsum("dnk,bdk->bdn", matrix, x, precision=lax.Precision.HIGHEST)

    return advance


_FORMS = {
    "recurrent": _recurrent,
    "associative": (
        "dplr_ssm has no associative form: products of diagonal-plus-low-rank transitions are dense, N x N numbers"
        " per channel and step; use parallel or chunked"
    ),
    "parallel": _parallel,
    "chunked": _chunked,
    "pallas": "dplr_ssm has no Pallas kernel yet: use parallel or chunked",
}
