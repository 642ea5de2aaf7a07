"""Mamba's selective scan on a TPU: the state of 128 channels is N rows of a register file, and never leaves it within a stretch.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t

Channels lie along lanes and the N numbers of a channel along sublanes, so that everything over channels is elementwise, B_t
and C_t are columns, and only the sum over N crosses sublanes. A step of the grid holds 128 steps of time, for one row of the
batch and up to 512 channels, and walks through them one after the other; the state passes from stretch to stretch in scratch
memory. Eight steps are written out, so that what does not wait for the state is done beside it; their columns are taken from a
[N, 128] block that turns by eight lanes after them, so that the wanted ones are always at the same places.

The backward pass keeps the states at the starts of stretches, N E numbers per 128 steps. It makes the states of one stretch again,
into scratch memory, and walks backwards through it. Gradients of B and C are sums over channels: those of each block of
channels leave the kernel and are added by XLA. All exponents are of one step's dt * A; nothing is divided or clamped.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from seqmodels.ops.kernels.tpu.common import steps_in_order, unsupported_dtype

_STEPS = 128  # of one step of the grid: one lane each in the blocks of B and C
_UNROLLED = 8
_CHANNELS = 512
_MOST_STATES = 64  # the states of a stretch take 4 * _STEPS * N * channels bytes of VMEM


def unsupported_reason(*, x: Array, dt: Array, A: Array, B: Array, C: Array, chunk_size: int | None = None) -> str | None:
    """What keeps a call of ``selective_scan`` from this kernel."""
    if chunk_size is not None:
        return f"chunk_size={chunk_size}, and the kernel has no chunks to choose"
    reason = unsupported_dtype(x=x, dt=dt)
    if reason is not None:
        return reason
    if A.shape[1] > _MOST_STATES:
        return f"{A.shape[1]} numbers a channel do not fit in VMEM for {_STEPS} steps, at most {_MOST_STATES} do"
    return None


def forward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    state: Float[Array, "B E N"],
    reset: Bool[Array, "B T"] | None,
    *,
    keep_starts: bool,
    interpret,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"], Float[Array, "B stretches padded_N padded_E"] | None]:
    """y in the dtype of x, the final state, and the states at the starts of stretches if they are kept."""
    sizes = _Sizes(x, A)
    y, final, *starts = sizes.call(
        functools.partial(_forward_kernel, marked=reset is not None, keep_starts=keep_starts),
        [
            ("time", sizes.over_time(x)),
            ("time", sizes.over_time(dt)),
            ("columns", sizes.columns(B)),
            ("columns", sizes.columns(C)),
            ("decay", sizes.decay(A)),
            ("state", sizes.state(state)),
        ],
        reset,
        outputs=[("time", x.dtype), ("state", jnp.float32)] + [("start", jnp.float32)] * keep_starts,
        scratch=[(_STEPS, sizes.block)] * 3 + [(sizes.states, sizes.block)],
        reverse=False,
        interpret=interpret,
    )
    return sizes.of_time(y), sizes.of_state(final), starts[0] if keep_starts else None


def backward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    starts: Float[Array, "B stretches padded_N padded_E"],
    d_y: Float[Array, "B T E"],
    d_final: Float[Array, "B E N"],
    *,
    interpret,
) -> tuple[Array, ...]:
    """Gradients of x, dt, A, B, C (in their dtypes) and the state."""
    sizes = _Sizes(x, A)
    over_time, states = (_STEPS, sizes.block), (sizes.states, sizes.block)
    d_x, d_dt, d_A, d_B, d_C, d_state = sizes.call(
        functools.partial(_backward_kernel, marked=reset is not None),
        [
            ("time", sizes.over_time(x)),
            ("time", sizes.over_time(dt)),
            ("time", sizes.over_time(d_y)),
            ("columns", sizes.columns(B)),
            ("columns", sizes.columns(C)),
            ("start", starts),
            ("decay", sizes.decay(A)),
            ("state", sizes.state(d_final)),
        ],
        reset,
        outputs=[("time", x.dtype), ("time", dt.dtype)]
        + [(kind, jnp.float32) for kind in ("state", "summed", "summed", "state")],
        scratch=[over_time] * 6 + [states] * 2 + [(_STEPS, *states)],
        reverse=True,
        interpret=interpret,
    )
    d_A = jnp.sum(sizes.of_state(d_A), axis=0).astype(A.dtype)
    d_B, d_C = sizes.of_columns(d_B).astype(B.dtype), sizes.of_columns(d_C).astype(C.dtype)
    return sizes.of_time(d_x), sizes.of_time(d_dt), d_A, d_B, d_C, sizes.of_state(d_state)


# ---- the kernels


def _forward_kernel(x, dt, B, C, A, first, *refs, marked, keep_starts):
    (reset,), refs = (refs[:1], refs[1:]) if marked else ((None,), refs)
    y, final, *starts, dt_wide, added, y_wide, carry = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = first[...]

    if keep_starts:
        starts[0][...] = carry[...]
    # Rows of single steps are read from float32: a register of bfloat16 holds two rows interleaved.
    dt_wide[...] = dt[...].astype(jnp.float32)
    added[...] = dt_wide[...] * x[...].astype(jnp.float32)
    decay_rate = A[...]

    def steps(group, carried):
        h, B, C = carried
        for i in range(_UNROLLED):
            t, at = _time(group, i)
            h = jnp.exp(dt_wide[at, :] * decay_rate) * _drop(h, reset, t) + added[at, :] * _column(B, i)
            y_wide[at, :] = jnp.sum(h * _column(C, i), axis=0, keepdims=True)
        return h, _later(B), _later(C)

    h, _, _ = lax.fori_loop(0, _STEPS // _UNROLLED, steps, (carry[...], B[...], C[...]))
    carry[...] = h
    y[...] = y_wide[...].astype(y.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        final[...] = h


def _backward_kernel(x, dt, d_y, B, C, starts, A, d_final, *refs, marked):
    """Backwards: g_t = C_t d_y_t + exp(dt_{t+1} A) g_{t+1}, as in ``selective_scan.py``, which has the gradients' equations."""
    (reset,), refs = (refs[:1], refs[1:]) if marked else ((None,), refs)
    d_x, d_dt, d_A, d_B, d_C, d_state, *refs = refs
    x_wide, dt_wide, d_y_wide, added, d_x_wide, d_dt_wide, carry, d_A_sum, before = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = d_final[...]
        d_A_sum[...] = jnp.zeros_like(d_A_sum)

    for wide, narrow in ((x_wide, x), (dt_wide, dt), (d_y_wide, d_y)):
        wide[...] = narrow[...].astype(jnp.float32)
    added[...] = dt_wide[...] * x_wide[...]
    decay_rate = A[...]

    def recompute(group, carried):
        h, B = carried
        for i in range(_UNROLLED):
            t, at = _time(group, i)
            h = _drop(h, reset, t)
            before[t] = h
            h = jnp.exp(dt_wide[at, :] * decay_rate) * h + added[at, :] * _column(B, i)
        return h, _later(B)

    groups = _STEPS // _UNROLLED
    lax.fori_loop(0, groups, recompute, (starts[...], B[...]))
    lane = lax.broadcasted_iota(jnp.int32, B.shape, 1)

    def steps(done, carried):
        d_h, d_A, B, C, d_B, d_C = carried
        # The last group's columns to the front; those found so far move behind the ones to come.
        B, C, d_B, d_C = (_earlier(x) for x in (B, C, d_B, d_C))
        for i in reversed(range(_UNROLLED)):
            t, at = _time(groups - 1 - done, i)
            dt_t, added_t, d_y_t, h_before = dt_wide[at, :], added[at, :], d_y_wide[at, :], before[t]
            decay, B_t = jnp.exp(dt_t * decay_rate), _column(B, i)
            h = decay * h_before + added_t * B_t
            g = d_h + d_y_t * _column(C, i)
            d_h = g * decay
            w = d_h * h_before
            written = jnp.sum(g * B_t, axis=0, keepdims=True)
            d_x_wide[at, :] = dt_t * written
            d_dt_wide[at, :] = jnp.sum(w * decay_rate, axis=0, keepdims=True) + x_wide[at, :] * written
            d_B = jnp.where(lane == i, jnp.sum(g * added_t, axis=1, keepdims=True), d_B)
            d_C = jnp.where(lane == i, jnp.sum(h * d_y_t, axis=1, keepdims=True), d_C)
            d_h, d_A = _drop(d_h, reset, t), d_A + w * dt_t
        return d_h, d_A, B, C, d_B, d_C

    columns = jnp.zeros(B.shape, jnp.float32)
    carried = (carry[...], d_A_sum[...], B[...], C[...], columns, columns)
    d_h, d_A_so_far, _, _, d_B[...], d_C[...] = lax.fori_loop(0, groups, steps, carried)
    carry[...], d_A_sum[...] = d_h, d_A_so_far
    d_x[...] = d_x_wide[...].astype(d_x.dtype)
    d_dt[...] = d_dt_wide[...].astype(d_dt.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_A[...] = d_A_so_far
        d_state[...] = d_h


def _time(group, i):
    """A step, and its row."""
    t = pl.multiple_of(group * _UNROLLED, _UNROLLED) + i
    return t, pl.ds(t, 1)


def _column(columns, i):
    return columns[:, i : i + 1]


def _later(columns):
    """The block of columns turned, so that those of the next group are its first."""
    return pltpu.roll(columns, _STEPS - _UNROLLED, 1)


def _earlier(columns):
    return pltpu.roll(columns, _UNROLLED, 1)


def _drop(h, reset, t):
    """h, or zero where a document starts at step t: selected, so that what was there does not matter."""
    return h if reset is None else jnp.where(reset[0, t] != 0, 0.0, h)


# ---- layouts and the grid


class _Sizes:
    """Time padded to whole stretches with steps of dt = 0, which do nothing; channels to 128, numbers a channel to 8."""

    def __init__(self, x, A):
        self.batch, self.steps, self.channels = x.shape
        self.count = -(-self.steps // _STEPS)
        self.padded = -(-self.channels // 128) * 128
        self.states = -(-A.shape[1] // 8) * 8
        self.numbers = A.shape[1]
        # At most 16 numbers a channel are usual; with more, fewer channels keep the states of a stretch in VMEM.
        most = max(128, _CHANNELS * 16 // max(16, self.states) // 128 * 128)
        self.block = max(block for block in range(128, most + 1, 128) if self.padded % block == 0)

    def over_time(self, x):
        """[B, stretches * steps, E]."""
        return _pad(x, 1, self.count * _STEPS, self.padded)

    def of_time(self, x):
        return x[:, : self.steps, : self.channels]

    def columns(self, x):
        """[B, stretches, N, steps] float32 from [B, T, N]."""
        x = _pad(x.astype(jnp.float32), 1, self.count * _STEPS, self.states)
        return jnp.swapaxes(x.reshape(self.batch, self.count, _STEPS, self.states), 2, 3)

    def of_columns(self, x):
        """The sum over blocks of channels of [B, blocks, stretches, N, steps], as [B, T, N]."""
        x = jnp.swapaxes(jnp.sum(x, axis=1), 2, 3).reshape(self.batch, -1, self.states)
        return x[:, : self.steps, : self.numbers]

    def state(self, x):
        """[B, N, E] from [B, E, N]."""
        return _pad(jnp.swapaxes(x, 1, 2), 1, self.states, self.padded)

    def of_state(self, x):
        return jnp.swapaxes(x[:, : self.numbers, : self.channels], 1, 2)

    def decay(self, A):
        return _pad(A.astype(jnp.float32).T, 0, self.states, self.padded)

    def call(self, kernel, inputs, reset, *, outputs, scratch, reverse, interpret):
        """Runs ``kernel`` over rows of the batch, blocks of channels and, in order, stretches.

        ``inputs`` are (kind, array), ``outputs`` (kind, dtype), kinds those of ``shapes`` below. ``reset`` comes after the inputs.
        """
        batch, count, states, block, channels = self.batch, self.count, self.states, self.block, self.padded
        blocks = channels // block

        def at(n):
            return count - 1 - n if reverse else n

        shapes = {
            "time": (batch, count * _STEPS, channels),
            "columns": (batch, count, states, _STEPS),
            "summed": (batch, blocks, count, states, _STEPS),
            "start": (batch, count, states, channels),
            "state": (batch, states, channels),
        }
        specs = {
            "time": pl.BlockSpec((None, _STEPS, block), lambda b, e, n: (b, at(n), e)),
            "columns": pl.BlockSpec((None, None, states, _STEPS), lambda b, e, n: (b, at(n), 0, 0)),
            "summed": pl.BlockSpec((None, None, None, states, _STEPS), lambda b, e, n: (b, e, at(n), 0, 0)),
            "start": pl.BlockSpec((None, None, states, block), lambda b, e, n: (b, at(n), 0, e)),
            "state": pl.BlockSpec((None, states, block), lambda b, e, n: (b, 0, e)),
            "decay": pl.BlockSpec((states, block), lambda b, e, n: (0, e)),
            "marks": pl.BlockSpec((None, None, 1, _STEPS), lambda b, e, n: (b, at(n), 0, 0), memory_space=pltpu.SMEM),
        }
        if reset is not None:
            marks = _pad(reset, 1, count * _STEPS).astype(jnp.int32)
            inputs = [*inputs, ("marks", marks.reshape(batch, count, 1, _STEPS))]
        return pl.pallas_call(
            kernel,
            grid=(batch, blocks, count),
            in_specs=[specs[kind] for kind, _ in inputs],
            out_specs=[specs[kind] for kind, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=steps_in_order(3),
            interpret=interpret,
        )(*(x for _, x in inputs))


def _pad(x, axis, *sizes):
    """Zeros appended to the axes from ``axis`` on, up to ``sizes``."""
    missing = [0] * axis + [size - have for size, have in zip(sizes, x.shape[axis:])]
    return jnp.pad(x, [(0, m) for m in missing]) if any(missing) else x
