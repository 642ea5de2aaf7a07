"""Gated linear attention with one decay per head, or none, on a TPU: what a step of the grid does to its heads.

With g the log decays of a chunk, pairs j <= i visible (j < i if the state is read before it is written), and

    D_ij = sum of g over (j, i],   p_i = sum over [first, i],   s_j = sum over (j, last]     (reading before: up to i, without i)

a chunk does to the state S it starts from

    P  = (q k^T) * exp(D) where visible, else 0
    o  = P v + exp(p) * (q S)
    S' = exp(p_last) S + k^T (exp(s) * v)                                          p_last over the whole chunk

All exponents are sums of the decays themselves: D is a product of g with a matrix of zeros and ones on the matrix unit, g in
parts of 8 bits, p and s are sums over lanes. Nothing is subtracted, so that neither a closed gate nor a reset costs later steps
their digits, and exponents are <= 0. A decay of minus infinity is one of -1e30, whose exponential is as much zero, and which
the matrix's zeros do not turn into NaN.

Backwards, with d_S the cotangent of the state after the chunk, P and D are made again, and with d_D = d_P * P

    d_q = (d_P * exp(D)) k + exp(p) (d_o S^T)         d_v = P^T d_o + exp(s) (k d_S)
    d_k = (d_P * exp(D))^T q + (exp(s) v) d_S^T       d_S <- exp(p_last) d_S + q^T (exp(p) d_o)
    dg_t = sum of dD_ij over j < t <= i  +  sum over i >= t of q_i . dq_i, of its part through S
         + sum over j < t of v_j . dv_j, of its part through d_S  +  exp(p_last) <S, d_S>

sums alone again: no difference of large products stands for a small gradient.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops.kernels.tpu.common import Heads, operand_dtype, parts, product

_CLOSED = -1e30


class Sums(NamedTuple):
    """Of one head's log decays in a chunk."""

    pairs: Float[Array, "C C"]
    """exp(D) where visible, else 0."""
    prefix: Float[Array, "C 1"]
    """exp(p)."""
    suffix: Float[Array, "C 1"]
    """exp(s)."""
    total: Float[Array, "1 1"]
    """exp(p_last)."""


class Masks(NamedTuple):
    """Over pairs of steps, rows i and columns t, of a chunk."""

    reads: Array
    """i reads what t wrote, and what was written before it through the decay of t."""
    own: Array
    """t = i."""
    after: Array
    """t > i."""
    before: Array
    """t < i, as zeros and ones in a product's dtype."""


def masks_of(steps, read_before, operand):
    i, t = (lax.broadcasted_iota(jnp.int32, (steps, steps), axis) for axis in (0, 1))
    reads = t < i if read_before else t <= i
    return Masks(reads, t == i, t > i, jnp.where(t < i, 1.0, 0.0).astype(operand))


def local_sums(row, start_log_mask, masks: Masks, precision) -> Sums:
    """From the log decays [1, C] of the chunk, and what of the state each step may read, [1, C] or None."""
    row = jnp.maximum(row, _CLOSED)
    read = jnp.where(masks.reads, row, 0.0)
    if start_log_mask is not None:
        read = jnp.where(masks.own, start_log_mask, read)
    pairs = exact(read, masks.before, 0, precision)
    return Sums(
        pairs=jnp.where(masks.reads, jnp.exp(pairs), 0.0),
        prefix=jnp.exp(jnp.sum(read, axis=1, keepdims=True)),
        suffix=jnp.exp(jnp.sum(jnp.where(masks.after, row, 0.0), axis=1, keepdims=True)),
        total=jnp.exp(jnp.sum(row, axis=1, keepdims=True)),
    )


def exact(x, zeros_and_ones, axis, precision):
    """x @ a matrix of zeros and ones, contracted along its ``axis``; for narrow inputs to 16 bits of x, else to all."""
    if zeros_and_ones.dtype == jnp.float32:
        return product(x, zeros_and_ones, 1, axis, precision)
    high, low = parts(x)
    return product(high, zeros_and_ones, 1, axis, precision) + product(low, zeros_and_ones, 1, axis, precision)


def d_row(
    d_between: Float[Array, "C C"],
    read_part: Float[Array, "C 1"],
    written_part: Float[Array, "C 1"],
    kept_part: Float[Array, "K V"],
    masks: Masks,
    precision,
) -> Float[Array, "1 C"]:
    """The gradient of a head's log decays, from those of D, p, s and (its sum) p_last."""
    between = exact(d_between, masks.before, 1, precision)
    by_step = jnp.where(masks.reads, between + read_part, 0.0) + jnp.where(masks.after, written_part, 0.0)
    kept = jnp.sum(jnp.sum(kept_part, axis=0, keepdims=True), axis=1, keepdims=True)
    return jnp.sum(by_step, axis=0, keepdims=True) + kept


def states(state: Float[Array, "B H K V"], heads: Heads) -> Float[Array, "B H K V"]:
    """States as the kernel wants them: as they are."""
    return state


of_states = states


def forward(states, q, k, v, o, decays=None, start_log_mask=None, starts=None, *, heads: Heads, read_before, precision):
    """Advances ``states`` [heads, K, V] over one chunk; refs as in ``tpu/gated_linear_attention.py``, decays as rows [heads, C]."""
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    masks = masks_of(q.shape[0], read_before, operand)
    start_log_mask = None if start_log_mask is None else jnp.maximum(start_log_mask[...], _CLOSED)
    for group in range(heads.groups):
        q_g, k_g = (ref[:, heads.keys(group)].astype(operand) for ref in (q, k))
        scores = dot(q_g, k_g, 1, 1)
        for head in heads.of(group):
            v_h, state = v[:, heads.values(head)], states[head]
            read = dot(q_g, state.astype(operand), 1, 0)
            if decays is None:
                kept, written, shown = state, v_h, jnp.where(masks.reads, scores, 0.0)
            else:
                sums = local_sums(decays[head : head + 1, :], start_log_mask, masks, precision)
                kept, shown, read = state * sums.total, scores * sums.pairs, read * sums.prefix
                written = v_h.astype(jnp.float32) * sums.suffix
            if starts is not None:
                starts[head] = state.astype(starts.dtype)
            output = dot(shown.astype(operand), v_h.astype(operand), 1, 0) + read
            o[:, heads.values(head)] = output.astype(o.dtype)
            states[head] = kept + dot(k_g, written.astype(operand), 0, 0)


def backward(
    d_states,
    q,
    k,
    v,
    d_output,
    starts,
    d_q,
    d_k,
    d_v,
    decays=None,
    start_log_mask=None,
    d_decays=None,
    *,
    heads: Heads,
    read_before,
    precision,
):
    """Takes ``d_states`` [heads, K, V] back over one chunk, and gives the gradients of its inputs."""
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    masks = masks_of(q.shape[0], read_before, operand)
    start_log_mask = None if start_log_mask is None else jnp.maximum(start_log_mask[...], _CLOSED)
    for group in range(heads.groups):
        q_g, k_g = (ref[:, heads.keys(group)].astype(operand) for ref in (q, k))
        scores = dot(q_g, k_g, 1, 1)
        d_q_g = d_k_g = jnp.zeros(q_g.shape, jnp.float32)
        d_scores = jnp.zeros(scores.shape, jnp.float32)
        for head in heads.of(group):
            v_h, d_o_h = v[:, heads.values(head)], d_output[:, heads.values(head)]
            state, d_state = starts[head], d_states[head]
            d_shown = dot(d_o_h.astype(operand), v_h.astype(operand), 1, 1)
            d_written = dot(k_g, d_state.astype(operand), 1, 0)
            if decays is None:
                shown = jnp.where(masks.reads, scores, 0.0)
                d_scores += jnp.where(masks.reads, d_shown, 0.0)
                d_kept, d_read, written = d_state, d_o_h, v_h
                d_v_h = d_written
            else:
                sums = local_sums(decays[head : head + 1, :], start_log_mask, masks, precision)
                shown, d_pairs = scores * sums.pairs, d_shown * sums.pairs
                d_scores += d_pairs
                d_kept = d_state * sums.total
                d_read = d_o_h.astype(jnp.float32) * sums.prefix
                written = v_h.astype(jnp.float32) * sums.suffix
                d_v_h = d_written * sums.suffix
            d_read, written = d_read.astype(operand), written.astype(operand)
            d_q_read = dot(d_read, state.astype(operand), 1, 1)
            if decays is not None:
                read_part = jnp.sum(q_g.astype(jnp.float32) * d_q_read, axis=1, keepdims=True)
                written_part = jnp.sum(v_h.astype(jnp.float32) * d_v_h, axis=1, keepdims=True)
                kept_part = state.astype(jnp.float32) * d_kept
                d_decays[head : head + 1, :] = d_row(d_pairs * scores, read_part, written_part, kept_part, masks, precision)
            d_v[:, heads.values(head)] = (d_v_h + dot(shown.astype(operand), d_o_h.astype(operand), 0, 0)).astype(d_v.dtype)
            d_q_g += d_q_read
            d_k_g += dot(written, d_state.astype(operand), 1, 1)
            d_states[head] = d_kept + dot(q_g, d_read, 0, 0)
        d_scores = d_scores.astype(operand)
        d_q[:, heads.keys(group)] = (d_q_g + dot(d_scores, k_g, 1, 0)).astype(d_q.dtype)
        d_k[:, heads.keys(group)] = (d_k_g + dot(d_scores, q_g, 0, 0)).astype(d_k.dtype)
