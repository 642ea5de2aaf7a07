"""A linear time-invariant state space model with a diagonal state matrix: the core of S4D, and of H3.

    x_t = dA * x_{t-1} + dB u_t,   y_t = 2 Re(sum over modes of C x_t)          dA, dB, C complex [D, M], x_t complex [D, M]

(arXiv 2206.11893, section 3). A channel has M complex modes, which stand for N = 2 M real states: the factor 2 Re adds each
mode's conjugate. ``discretise`` makes dA and dB of a continuous system and a step size. The skip (D u) is the caller's.

| implementation | what it is | per channel and row |
|---|---|---|
| recurrent | the definition, one step after the other | T N work |
| associative | ``linear_recurrence`` over materialised inputs | T N memory |
| parallel | the convolution view: kernel[l] = 2 Re(sum C dB dA^l), by FFT | T log T work |
| chunked | a kernel of C steps inside chunks, states at chunk starts alone | T (C + 2 N) work, T N / C memory |
| pallas | raises: not written yet | |

With ``reset``, parallel sums age by age, O(T^2): an FFT mixes documents. Without it, its rounding (1e-7 of the
largest output) also reaches earlier steps.

The state and all arithmetic are float32. The system is given as dA - 1, not dA: a slow mode has dA = 1 - 0.0005, and float32
rounds that to 6e-5 of its rate, the same way in each of thousands of steps. Powers are kept as dA^l - 1, too. Nothing is
made from the phase l dt Im A, which reaches thousands of radians, so that no digits are lost in reducing it.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from seqmodels.ops import time_invariant
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.placement import per_shard

RULES = ("zoh", "bilinear")


def discretise(
    A: Complex[Array, "D M"], B: Complex[Array, "D M"], dt: Float[Array, " D"], rule: str = "zoh"
) -> tuple[Complex[Array, "D M"], Complex[Array, "D M"]]:
    """One step of dx/ds = A x + B u over dt, the input held (zoh) or averaged (bilinear).

    zoh: dA = e^z, dB = B (e^z - 1) / A; bilinear: dA = (1 + z/2) / (1 - z/2), dB = B dt / (1 - z/2); z = dt A
    (arXiv 2206.11893, section 3.2, and 2111.00396, eq. 3).

    Args:
      A: modes; real part < 0.
      B: how the input enters each mode.
      dt: step sizes, > 0.
      rule: ``"zoh"`` or ``"bilinear"``.

    Returns:
      ``(dA - 1, dB)``, complex64, without cancellation for small z.

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    A, B = A.astype(jnp.complex64), B.astype(jnp.complex64)
    step = dt.astype(jnp.float32)[:, None]
    z = lax.complex(step * A.real, step * A.imag)
    if rule == "zoh":
        # e^z - 1 for z = a + i b is (e^a - 1) cos b - 2 sin^2(b / 2) + i e^a sin b
        a, b = z.real, z.imag
        dA_minus_1 = lax.complex(jnp.expm1(a) * jnp.cos(b) - 2 * jnp.square(jnp.sin(b / 2)), jnp.exp(a) * jnp.sin(b))
        return dA_minus_1, B * (dA_minus_1 / A)
    dA_minus_1 = z / (1 - z / 2)
    return dA_minus_1, B * (step.astype(jnp.complex64) / (1 - z / 2))


def kernel(
    dA_minus_1: Complex[Array, "D M"], dB: Complex[Array, "D M"], C: Complex[Array, "D M"], steps: int
) -> Float[Array, "D T"]:
    """kernel[l] = 2 Re(sum over modes of C dB dA^l) for l = 0 .. steps - 1: the response to an impulse.

    dA^l is dA^(Q a) dA^b with Q about the square root of ``steps``, so that the sum over modes is a matrix product and only
    2 Q powers are made.
    """
    length = time_invariant.near_root(steps)
    inner = _powers_minus_1(dA_minus_1, length + 1)
    outer = 1 + _powers_minus_1(inner[..., -1], -(-steps // length))
    left = (C * dB)[..., None] * outer
    left = jnp.concatenate([left.real, -left.imag], axis=1)
    right = 1 + inner[..., :-1]
    right = jnp.concatenate([right.real, right.imag], axis=1)
    taps = 2 * jnp.einsum("dna,dnb->dab", left, right, precision=lax.Precision.HIGHEST)
    return taps.reshape(C.shape[0], -1)[:, :steps]


def _sequence_parallel(op, u, dA_minus_1, dB, C, *, state=None, reset=None, **options):
    _, added = op(u, dA_minus_1, dB, C, reset=reset, **options)
    advance = functools.partial(_advance, time_invariant.power_minus_1(dA_minus_1.astype(jnp.complex64), u.shape[1]))
    return time_invariant.run_sequence_parallel(op, (u, dA_minus_1, dB, C), added, advance, state, reset, **options)


@per_shard(
    {"u": "b t h", "dA_minus_1": "h", "dB": "h", "C": "h", "state": "b h", "reset": "b t"},
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)
def diagonal_ssm(
    u: Float[Array, "B T D"],
    dA_minus_1: Complex[Array, "D M"],
    dB: Complex[Array, "D M"],
    C: Complex[Array, "D M"],
    *,
    state: Float[Array, "B D N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Runs the recurrence at the top of this file.

    Args:
      u: inputs.
      dA_minus_1: dA - 1 of every mode, |dA| <= 1 (from ``discretise``).
      dB: how the input enters each mode, discretised.
      C: how the modes are read.
      state: x before the first step, the real parts first, then the imaginary parts; None is zero.
      reset: marks the steps at which a new document starts: x is zero before such a step.
      implementation: a row of the table above; None is recurrent for one step, else parallel
        without ``reset`` and chunked with it.
      chunk_size: steps per chunk of ``chunked``, any number >= 1; other forms have no use for it.

    Returns:
      ``(y, state)``: outputs in the dtype of ``u``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: the implementation does not exist; the message says what is missing.
    """
    _check(u, dA_minus_1, dB, C, state, reset)
    system = tuple(x.astype(jnp.complex64) for x in (dA_minus_1, dB, C))
    # Measured on a CPU at B 16, T 256, D 128, N 64, forward and backward: parallel 9 ms, chunked 25 (with documents 120 and 43),
    # recurrent 350, associative 1600.
    return time_invariant.run(
        "diagonal_ssm", _FORMS, u, system, state, reset, implementation=implementation, chunk_size=chunk_size
    )


def _check(u, dA_minus_1, dB, C, state, reset):
    shapes = shapes_of(u=u, dA_minus_1=dA_minus_1, dB=dB, C=C)
    if u.ndim != 3 or u.shape[1] == 0 or dA_minus_1.ndim != 2 or dA_minus_1.shape[0] != u.shape[2]:
        raise ValueError(f"u must be [B, T, D] with T >= 1 and dA_minus_1 [D, M]; got {shapes}")
    modes = dA_minus_1.shape
    expected = {
        "dB": (dB, modes),
        "C": (C, modes),
        "state": (state, (u.shape[0], modes[0], 2 * modes[1])),
        "reset": (reset, u.shape[:2]),
    }
    check_arguments(expected, shapes)


def _zeros(u, system):
    channels, modes = system[0].shape
    return jnp.zeros((u.shape[0], channels, 2 * modes), jnp.float32)


def _halves(x):
    return jnp.split(x, 2, axis=-1)


# ---- the definition, and the parallel prefix


def _recurrent(u, system, state, reset):
    dA_minus_1, dB, C = system

    def step(x, inputs):
        u, start = inputs
        if start is not None:
            x = jnp.where(start[:, None, None], 0.0, x)
        x = _advance(dA_minus_1, x) + u[:, :, None] * jnp.concatenate([dB.real, dB.imag], axis=-1)
        real, imaginary = _halves(x)
        return x, 2 * jnp.sum(C.real * real - C.imag * imaginary, axis=-1)

    by_time = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (u, reset))
    state, y = lax.scan(step, _zeros(u, system) if state is None else state, by_time)
    return jnp.moveaxis(y, 0, 1), state


def _advance(dA_minus_1, x):
    """dA x, as x + (dA - 1) x."""
    real, imaginary = _halves(x)
    more, turn = dA_minus_1.real, dA_minus_1.imag
    return x + jnp.concatenate([more * real - turn * imaginary, more * imaginary + turn * real], axis=-1)


def _associative(u, system, state, reset):
    dA_minus_1, dB, C = system
    entered = lax.complex(u[..., None] * dB.real, u[..., None] * dB.imag)
    decay = jnp.broadcast_to(1 + dA_minus_1, entered.shape)
    state = None if state is None else lax.complex(*_halves(state))
    x, state = linear_recurrence(decay, entered, state=state, reset=reset, implementation="associative")
    y = 2 * jnp.sum(C.real * x.real - C.imag * x.imag, axis=-1)
    return y, jnp.concatenate([state.real, state.imag], axis=-1)


# ---- convolution, and chunks


def _parallel(u, system, state, reset):
    steps = u.shape[1]
    y = time_invariant.convolve(u, kernel(*system, steps), reset)
    tables = _tables(system, time_invariant.near_root(steps))
    if state is None:
        return y, time_invariant.last_state(u, tables, _zeros(u, system), reset)
    y = y + time_invariant.response(tables, state, steps, reset)
    return y, time_invariant.last_state(u, tables, state, reset)


def _chunked(u, system, state, reset, *, chunk_size):
    tables = _tables(system, chunk_size)
    return time_invariant.in_chunks(u, tables, _zeros(u, system) if state is None else state, reset)


def _tables(system, length) -> time_invariant.Tables:
    dA_minus_1, dB, C = system
    powers_minus_1 = _powers_minus_1(dA_minus_1, length + 1)
    powers = 1 + powers_minus_1
    read = 2 * C[..., None] * powers[..., 1:]
    write = dB[..., None] * powers[..., :-1]
    taps = 2 * jnp.sum((C[..., None] * write).real, axis=1)
    write = jnp.concatenate([write.real, write.imag], axis=1)[..., ::-1]
    return time_invariant.Tables(
        kernel=taps,
        read=jnp.concatenate([read.real, -read.imag], axis=1),
        write=jnp.swapaxes(write, 1, 2),
        advance=lambda steps: functools.partial(_advance, powers_minus_1[..., steps]),
    )


def _powers_minus_1(dA_minus_1: Complex[Array, "D M"], count: int) -> Complex[Array, "D M l"]:
    """dA^l - 1 for l = 0 .. count - 1, by doubling: what is small stays exact, and nothing is divided."""
    powers, last = jnp.zeros_like(dA_minus_1)[..., None], dA_minus_1  # dA^0 - 1, and dA^(how many there are) - 1
    while powers.shape[-1] < count:
        more = last[..., None]
        powers = jnp.concatenate([powers, powers + more + powers * more], axis=-1)
        last = last * (2 + last)
    return powers[..., :count]


_FORMS = {
    "recurrent": _recurrent,
    "associative": _associative,
    "parallel": _parallel,
    "chunked": _chunked,
    "pallas": "diagonal_ssm has no Pallas kernel yet: use chunked",
}
