"""Gated linear attention with a decay for every key channel on a TPU: what a step of the grid does to its heads.

No one matrix of decays serves all channels, but one for each level of the chunk does (``chunk.py``): a pair i > j is
split at the highest bit in which i and j differ, into what i reads of its block of m steps and what is left of j's block
after j, two sums of log decays <= 0. With E the exponential of the one or the other, by the half that a step is in, and X
of q * E in upper and k * E in lower halves,

    P_ij = (X X^T)_ij for the pairs of that level        log2(C) products, of which each gives its pairs
    o    = P v + (q * e^prefix) S,   S' = e^total * S + (k * e^suffix)^T v

The sums of a level are those of the one below plus the total of a neighbouring block, one addition: nothing is subtracted,
so that neither a closed gate nor a reset costs later steps their digits.

Backwards, with Y = (dP + dP^T at that level) X, the level adds E * Y to dq in upper and to dk in lower halves. The gradient
of a step's log decay adds up X * Y of all steps whose sum it is part of, a product with zeros and ones, and likewise for prefix
and suffix: sums alone, no difference of large products stands for a small gradient.

States are transposed, [V, K], so that a decay is a row of lanes.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops.kernels.tpu.common import Heads, operand_dtype, product


class _Pairs(NamedTuple):
    """Rows and columns of a matrix over the steps of a chunk."""

    row: Int[Array, "C C"]
    column: Int[Array, "C C"]

    @property
    def apart(self) -> Int[Array, "C C"]:
        """The bits in which they differ."""
        return self.row ^ self.column


def _pairs(steps):
    return _Pairs(*(lax.broadcasted_iota(jnp.int32, (steps, steps), axis) for axis in (0, 1)))


class _Sums(NamedTuple):
    """Log decays summed within blocks of ``block`` steps."""

    block: int
    read: Float[Array, "C K"]
    """From the start of its block up to what step i reads."""
    left: Float[Array, "C K"]
    """After step j to the end of its block."""
    total: Float[Array, "C K"]
    """From the start of its block up to step i, with it: in the last row of a block, of all of it."""

    def upper(self) -> Bool[Array, "C K"]:
        """Steps in the upper one of two neighbouring blocks."""
        return (lax.broadcasted_iota(jnp.int32, self.read.shape, 0) & self.block) != 0

    def halves(self, if_upper, if_lower):
        return jnp.where(self.upper(), if_upper, if_lower)


def _levels(log_decay: Float[Array, "C K"], own: Float[Array, "C K"] | None) -> Iterator[_Sums]:
    """Blocks of 1, 2, 4, ... steps, the last of all steps. ``own``: what a step that reads before its decay still sees as one."""
    sums = _Sums(1, log_decay if own is None else own, jnp.zeros_like(log_decay), log_decay)
    while sums.block < log_decay.shape[0]:
        yield sums
        m = sums.block
        below = sums.halves(_row_of_blocks(sums.total, 2 * m, m - 1), 0.0)
        above = sums.halves(0.0, _row_of_blocks(sums.total, 2 * m, 2 * m - 1))
        read = sums.read + below
        sums = _Sums(2 * m, read, sums.left + above, read if own is None else sums.total + below)
    yield sums


def _row_of_blocks(x: Float[Array, "C K"], size: int, row: int) -> Float[Array, "C K"]:
    """In every block of ``size`` rows its row ``row``, for all of its rows. A register holds 8."""
    steps, channels = x.shape
    if size >= 8:
        blocks = x.reshape(steps // size, size, channels)
        return jnp.broadcast_to(blocks[:, row : row + 1], blocks.shape).reshape(steps, channels)
    blocks = x.reshape(steps // 8, 8, channels)
    place = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    found = jnp.broadcast_to(blocks[:, row : row + 1], blocks.shape)
    for start in range(size, 8, size):
        there = jnp.broadcast_to(blocks[:, start + row : start + row + 1], blocks.shape)
        found = jnp.where(place >= start, there, found)
    return found.reshape(steps, channels)


def _own(start_log_mask, pairs, shape, read_before):
    if not read_before:
        return None
    if start_log_mask is None:
        return jnp.zeros(shape, jnp.float32)
    # The row as a column: of its sums of one number and zeros all are exact.
    column = jnp.sum(jnp.where(pairs.row == pairs.column, start_log_mask[...], 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(column, shape)


def forward(states, q, k, v, o, decays, start_log_mask=None, starts=None, *, heads: Heads, read_before, precision):
    """Advances ``states`` [heads, V, K] over one chunk; refs as in ``tpu/gated_linear_attention.py``, decays like q."""
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    pairs = _pairs(q.shape[0])
    own = _own(start_log_mask, pairs, (q.shape[0], heads.channels), read_before)
    level = jnp.where(pairs.row > pairs.column, pairs.apart, 0)
    for group in range(heads.groups):
        q_g, k_g = (ref[:, heads.keys(group)].astype(jnp.float32) for ref in (q, k))
        alike = jnp.sum(q_g * k_g, axis=1, keepdims=True)
        for head in heads.of(group):
            v_h, state = v[:, heads.values(head)].astype(operand), states[head]
            scores = jnp.zeros(level.shape, jnp.float32)
            if not read_before:
                scores = jnp.where(pairs.row == pairs.column, alike, 0.0)
            for sums in _levels(decays[:, heads.decays(head)], own):
                if sums.block < q.shape[0]:
                    x = (sums.halves(q_g, k_g) * jnp.exp(sums.halves(sums.read, sums.left))).astype(operand)
                    scores = jnp.where((level >= sums.block) & (level < 2 * sums.block), dot(x, x, 1, 1), scores)
            if starts is not None:
                starts[head] = state.astype(starts.dtype)
            read = (q_g * jnp.exp(sums.read)).astype(operand)
            written = (k_g * jnp.exp(sums.left)).astype(operand)
            output = dot(scores.astype(operand), v_h, 1, 0) + dot(read, state.astype(operand), 1, 1)
            o[:, heads.values(head)] = output.astype(o.dtype)
            states[head] = state * jnp.exp(sums.total[-1:]) + dot(v_h, written, 0, 0)


def backward(
    d_states,
    q,
    k,
    v,
    d_output,
    starts,
    dq,
    dk,
    dv,
    decays,
    d_decays,
    start_log_mask=None,
    *,
    heads: Heads,
    read_before,
    precision,
):
    """Takes ``d_states`` [heads, V, K] back over one chunk, and gives the gradients of its inputs."""
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    pairs = _pairs(q.shape[0])
    own = _own(start_log_mask, pairs, (q.shape[0], heads.channels), read_before)
    level = jnp.where(pairs.row > pairs.column, pairs.apart, 0)
    # Of a step t in a row: whether it is part of the sum that step i, in a column, reads, or of what is left after it.
    is_read = pairs.row < pairs.column if read_before else pairs.row <= pairs.column
    is_left = pairs.row > pairs.column

    def adding(parts, x):
        return dot(jnp.where(parts, 1.0, 0.0).astype(operand), x.astype(operand), 1, 0)

    for group in range(heads.groups):
        q_g, k_g = (ref[:, heads.keys(group)].astype(jnp.float32) for ref in (q, k))
        dq_g, dk_g = jnp.zeros_like(q_g), jnp.zeros_like(k_g)
        for head in heads.of(group):
            v_h, do_h = (ref[:, heads.values(head)].astype(operand) for ref in (v, d_output))
            state, d_state = starts[head], d_states[head]
            d_scores = dot(do_h, v_h, 1, 1)
            below = jnp.where(is_left, d_scores, 0.0)
            both = below + below.T
            scores = jnp.zeros(level.shape, jnp.float32)
            if not read_before:
                diagonal = pairs.row == pairs.column
                scores = jnp.where(diagonal, jnp.sum(q_g * k_g, axis=1, keepdims=True), 0.0)
                d_alike = jnp.sum(jnp.where(diagonal, d_scores, 0.0), axis=1, keepdims=True)
                dq_g, dk_g = dq_g + d_alike * k_g, dk_g + d_alike * q_g
            d_decay = jnp.zeros_like(q_g)
            for sums in _levels(decays[:, heads.decays(head)], own):
                m = sums.block
                if m == q.shape[0]:
                    break
                decay = jnp.exp(sums.halves(sums.read, sums.left))
                x = sums.halves(q_g, k_g) * decay
                narrow = x.astype(operand)
                scores = jnp.where((level >= m) & (level < 2 * m), dot(narrow, narrow, 1, 1), scores)
                here = (pairs.apart >= m) & (pairs.apart < 2 * m)
                y = dot(jnp.where(here, both, 0.0).astype(operand), narrow, 1, 0)
                dx = decay * y
                dq_g, dk_g = dq_g + sums.halves(dx, 0.0), dk_g + sums.halves(0.0, dx)
                half = pairs.column & m
                summed = (pairs.apart < m) & (((half != 0) & is_read) | ((half == 0) & is_left))
                d_decay += adding(summed, x * y)
            decay_read, decay_left, decay_all = jnp.exp(sums.read), jnp.exp(sums.left), jnp.exp(sums.total[-1:])
            dq_read = decay_read * dot(do_h, state.astype(operand), 1, 0)
            dk_written = decay_left * dot(v_h, d_state.astype(operand), 1, 0)
            d_kept = d_state * decay_all
            d_decay += adding(is_read, q_g * dq_read) + adding(is_left, k_g * dk_written)
            d_decays[:, heads.decays(head)] = d_decay + jnp.sum(state.astype(jnp.float32) * d_kept, axis=0, keepdims=True)
            dq_g, dk_g = dq_g + dq_read, dk_g + dk_written
            written = (k_g * decay_left).astype(operand)
            dv_h = dot(scores.astype(operand), do_h, 0, 0) + dot(written, d_state.astype(operand), 1, 1)
            dv[:, heads.values(head)] = dv_h.astype(dv.dtype)
            d_states[head] = d_kept + dot(do_h, (q_g * decay_read).astype(operand), 0, 0)
        dq[:, heads.keys(group)] = dq_g.astype(dq.dtype)
        dk[:, heads.keys(group)] = dk_g.astype(dk.dtype)
