"""The elementwise recurrence h_t = a_t h_{t-1} + b_t on a TPU: one row of channels after the other, the carry in registers.

It is bound by memory, 12 bytes a step and channel: what counts is that each number is read and written once. A step of the
grid holds a stretch of time of one row of the batch and up to 1024 channels, and walks through it row by row, which takes a
load of a and of b and a store of h for every 128 channels, within the time that memory takes. The carry passes from stretch
to stretch in scratch memory.

Backwards, the same walk gives the gradient's g_t = d_h_t + a_{t+1} g_{t+1}. A complex number is two planes, real and imaginary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Inexact

from seqmodels.ops.kernels.tpu.common import steps_in_order

_STEPS = 256  # of one step of the grid
_CHANNELS = 1024
_UNROLLED = 8  # rows of a register


def unsupported_reason(*, dtype: DTypeLike) -> str | None:
    """Nothing: any shape, float32 or complex64."""
    return None


def scan(
    a: Inexact[Array, "B T *channels"],
    b: Inexact[Array, "B T *channels"],
    carry: Inexact[Array, " B *channels"],
    reset: Bool[Array, "B T"] | None,
    *,
    reverse: bool,
    interpret,
) -> tuple[Inexact[Array, "B T *channels"], Inexact[Array, " B *channels"]]:
    """Forwards every h_t and the last; in reverse, with b = d_h and carry = the last state's gradient, every g_t and a_1 g_1."""
    batch, steps = a.shape[:2]
    channels = a.size // (batch * steps)
    is_complex = jnp.iscomplexobj(a)
    most = _CHANNELS // 2 if is_complex else _CHANNELS
    block = max(x for x in range(128, most + 1, 128) if -(-channels // 128) * 128 % x == 0)
    length = min(_STEPS, -(-steps // _UNROLLED) * _UNROLLED)

    def planes(x, rows, fill=0.0):
        """[B, whole blocks of ``rows`` rows, whole blocks of channels] float32: one array, or real and imaginary part."""
        x = x.reshape(batch, -1, channels)
        missing = ((0, 0), (0, -x.shape[1] % rows), (0, -channels % block))
        parts = ((x.real, fill), (x.imag, 0.0)) if is_complex else ((x, fill),)
        return [jnp.pad(part, missing, constant_values=value) if any(map(sum, missing)) else part for part, value in parts]

    # A step that fills a stretch keeps any carry as it is.
    rows = [*planes(a, length, fill=1.0), *planes(b, length)]
    first = planes(carry, 1)
    count = rows[0].shape[1] // length
    marks = []
    if reset is not None:
        missing = count * length - steps
        marks = [jnp.pad(reset, ((0, 0), (0, missing))).astype(jnp.int32).reshape(batch, count, 1, length)]

    def place(row, channel, n):
        return row, count - 1 - n if reverse else n, channel

    def place_marks(row, channel, n):
        return *place(row, channel, n)[:2], 0, 0

    stretch = pl.BlockSpec((None, length, block), place)
    one = pl.BlockSpec((None, 1, block), lambda row, channel, n: (row, 0, channel))
    mark = pl.BlockSpec((None, None, 1, length), place_marks, memory_space=pltpu.SMEM)
    parts = len(first)
    outputs = pl.pallas_call(
        functools.partial(_kernel, parts=parts, marked=reset is not None, reverse=reverse),
        grid=(batch, rows[0].shape[2] // block, count),
        in_specs=[stretch] * (2 * parts) + [one] * parts + [mark] * len(marks),
        out_specs=[stretch] * parts + [one] * parts,
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*rows[:parts], *first)],
        scratch_shapes=[pltpu.VMEM((1, block), jnp.float32)] * parts,
        compiler_params=steps_in_order(3),
        interpret=interpret,
    )(*rows, *first, *marks)

    def whole(parts, steps):
        x = lax.complex(*parts) if is_complex else parts[0]
        return x[:, :steps, :channels]

    last = whole(outputs[parts:], 1).reshape(carry.shape)
    return whole(outputs[:parts], steps).reshape(a.shape), last


def _kernel(*refs, parts, marked, reverse):
    refs = list(refs)
    a, b, first = (_take(refs, parts) for _ in range(3))
    (reset,) = _take(refs, 1) if marked else (None,)
    outputs, final, carry = (_take(refs, parts) for _ in range(3))
    n, last = pl.program_id(2), pl.num_programs(2) - 1
    length = outputs[0].shape[0]

    @pl.when(n == 0)
    def _():
        for here, there in zip(carry, first):
            here[...] = there[...]

    def rows(group, carried):
        start = pl.multiple_of((length // _UNROLLED - 1 - group if reverse else group) * _UNROLLED, _UNROLLED)
        for row in reversed(range(_UNROLLED)) if reverse else range(_UNROLLED):
            at = pl.ds(start + row, 1)
            a_t, b_t = ([ref[at, :] for ref in x] for x in (a, b))
            starts = None if reset is None else reset[0, start + row] != 0
            if reverse:
                output = [x + y for x, y in zip(b_t, carried)]
                carried = _drop(_times(a_t, output), starts)
            else:
                output = carried = [x + y for x, y in zip(_times(a_t, _drop(carried, starts)), b_t)]
            for ref, x in zip(outputs, output):
                ref[at, :] = x
        return tuple(carried)

    carried = lax.fori_loop(0, length // _UNROLLED, rows, tuple(ref[...] for ref in carry))
    for ref, x in zip(carry, carried):
        ref[...] = x

    @pl.when(n == last)
    def _():
        for here, there in zip(final, carried):
            here[...] = there


def _take(refs, count):
    taken, refs[:] = refs[:count], refs[count:]
    return taken


def _times(a, h):
    if len(a) == 1:
        return [a[0] * h[0]]
    return [a[0] * h[0] - a[1] * h[1], a[0] * h[1] + a[1] * h[0]]


def _drop(x, starts):
    """Zero where a document starts, selected, so that what was there does not matter."""
    return x if starts is None else [jnp.where(starts, 0.0, part) for part in x]
