"""Gated linear attention with a decay for every key channel on a TPU: what a step of the grid does to its heads.

No one matrix of decays serves all channels, but one for each level of the chunk does (``chunk.py``): a pair i > j is
split at the highest bit in which i and j differ, into what i reads of its block of m steps and what is left of j's block
after j, two sums of log decays <= 0. With E the exponential of the one or the other, by the half that a step is in, and X
of q * E in upper and k * E in lower halves,

    P_ij = (X X^T)_ij for the pairs of that level        log2(C) products, of which each gives its pairs
    o    = P v + (q * e^prefix) S,   S' = e^total * S + (k * e^suffix)^T v

The sums of a level are those of the one below plus the total of a neighbouring block, one addition: nothing is subtracted,
so that neither a closed gate nor a reset costs later steps their digits.

Backwards, with Y = (d_P + d_P^T at that level) X, the level adds d_X = E * Y to d_q in upper and to d_k in lower halves. The
gradient of a log decay is the transpose of the sums: from the longest blocks to those of a register's eight steps, what a
block's steps have of X * Y is added up and given to the neighbouring block whose total it was made with; within eight steps it is a
product with zeros and ones. Sums alone: no difference of large products stands for a small gradient.

Registers hold eight steps of 128 channels: where blocks have eight steps or more, halves are registers, not selections in
them, and where heads have fewer channels, several lie side by side in the lanes (``Heads.abreast``): what is elementwise is
done for all of them at once, and products keep them apart by zeros. States are transposed, [V, n K], so that a decay is a
row of lanes.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqmodels.ops.kernels.tpu.common import Heads, joined, operand_dtype, product, split

_REGISTER = 8  # rows of one
_WITHIN = 3  # levels of blocks shorter than that


class Pairs(NamedTuple):
    """Rows and columns of a matrix over the steps of a chunk, and the level of each pair."""

    row: Int[Array, "C C"]
    column: Int[Array, "C C"]

    @property
    def level(self) -> Int[Array, "C C"]:
        """The number of the highest bit in which they differ; negative on the diagonal."""
        # The exponent of the difference as a float.
        return (lax.bitcast_convert_type((self.row ^ self.column).astype(jnp.float32), jnp.int32) >> 23) - 127


def pairs_of(steps):
    return Pairs(*(lax.broadcasted_iota(jnp.int32, (steps, steps), axis) for axis in (0, 1)))


# ---- halves of blocks


def _halves(if_upper: Float[Array, "C X"], if_lower: Float[Array, "C X"], block: int) -> Float[Array, "C X"]:
    """The one's rows in the upper of two neighbouring blocks, the other's in the lower."""
    if block >= _REGISTER:
        return joined(split(if_lower, block)[0], split(if_upper, block)[1])
    return jnp.where(_is_upper(if_upper.shape, block), if_upper, if_lower)


def _is_upper(shape, block):
    return (lax.broadcasted_iota(jnp.int32, shape, 0) & block) != 0


# ---- sums of log decays


class _Sums(NamedTuple):
    """Log decays summed within blocks of ``block`` steps."""

    block: int
    read: Float[Array, "C X"]
    """From the start of its block up to what step i reads."""
    left: Float[Array, "C X"]
    """After step j to the end of its block."""
    total: Float[Array, "..."]
    """Of blocks shorter than a register [C, X], from the start of its block up to step i, with it. Of others [C/m, 8, X], of the
    whole block, in all rows."""

    @property
    def exponent(self) -> Float[Array, "C X"]:
        """Of a level: what the upper halves read, what is left of the lower ones."""
        return _halves(self.read, self.left, self.block)


def levels(log_decay: Float[Array, "C X"], own: Float[Array, "C X"] | None) -> Iterator[_Sums]:
    """Blocks of 1, 2, 4, ... steps, the last of all steps. ``own``: what a step that reads before its decay still sees as one."""
    sums = _Sums(1, log_decay if own is None else own, jnp.zeros_like(log_decay), log_decay)
    while sums.block < log_decay.shape[0]:
        yield sums
        sums = (_doubled if sums.block >= _REGISTER else _doubled_in_registers)(sums, own)
    yield sums


def _doubled_in_registers(sums: _Sums, own) -> _Sums:
    m, shape = sums.block, sums.read.shape
    below = jnp.where(_is_upper(shape, m), _row_of_blocks(sums.total, 2 * m, m - 1), 0.0)
    above = jnp.where(_is_upper(shape, m), 0.0, _row_of_blocks(sums.total, 2 * m, 2 * m - 1))
    read = sums.read + below
    total = read if own is None else sums.total + below
    if 2 * m == _REGISTER:
        total = _row_of_blocks(total, _REGISTER, _REGISTER - 1).reshape(-1, _REGISTER, shape[1])
    return _Sums(2 * m, read, sums.left + above, total)


def _doubled(sums: _Sums, own) -> _Sums:
    totals = sums.total.reshape(-1, 2, *sums.total.shape[1:])
    lower, upper = totals[:, 0], totals[:, 1]
    (read_lower, read_upper), (left_lower, left_upper) = (split(x, sums.block) for x in (sums.read, sums.left))
    return _Sums(
        2 * sums.block,
        joined(read_lower, _added(read_upper, lower)),
        joined(_added(left_lower, upper), left_upper),
        lower + upper,
    )


def _added(x: Float[Array, "n m X"], rows: Float[Array, "n 8 X"]) -> Float[Array, "n m X"]:
    return (x.reshape(x.shape[0], -1, *rows.shape[1:]) + rows[:, None]).reshape(x.shape)


def _added_by_halves(if_upper, if_lower, x: Float[Array, "C X"], block: int) -> tuple[Float[Array, "C X"], Float[Array, "C X"]]:
    """x added in the upper ones of two neighbouring blocks to the one, in the lower ones to the other."""
    if block < _REGISTER:
        upper = _is_upper(x.shape, block)
        return if_upper + jnp.where(upper, x, 0.0), if_lower + jnp.where(upper, 0.0, x)
    (lower, upper), (kept, own), (other, rest) = (split(array, block) for array in (x, if_upper, if_lower))
    return joined(kept, own + upper), joined(other + lower, rest)


def _row_of_blocks(x: Float[Array, "C X"], size: int, row: int) -> Float[Array, "C X"]:
    """In every block of ``size`` rows, at most a register's, its row ``row``, for all of its rows."""
    blocks = x.reshape(-1, _REGISTER, x.shape[1])
    place = lax.broadcasted_iota(jnp.int32, blocks.shape, 1)
    found = jnp.broadcast_to(blocks[:, row : row + 1], blocks.shape)
    for start in range(size, _REGISTER, size):
        there = jnp.broadcast_to(blocks[:, start + row : start + row + 1], blocks.shape)
        found = jnp.where(place >= start, there, found)
    return found.reshape(x.shape)


def _own(start_log_mask, pairs, shape, read_before):
    if not read_before:
        return None
    if start_log_mask is None:
        return jnp.zeros(shape, jnp.float32)
    # The row as a column: of its sums of one number and zeros all are exact.
    column = jnp.sum(jnp.where(pairs.row == pairs.column, start_log_mask[...], 0.0), axis=1, keepdims=True)
    return jnp.broadcast_to(column, shape)


# ---- heads side by side


def states(state: Float[Array, "B H K V"], heads: Heads) -> Float[Array, "B b V nK"]:
    """States as the kernel wants them: transposed, those of heads side by side in one row of lanes."""
    batch, _, channels, width = state.shape
    return jnp.moveaxis(state.reshape(batch, -1, heads.abreast, channels, width), 4, 2).reshape(
        batch, -1, width, heads.abreast * channels
    )


def of_states(x: Float[Array, "B b V nK"], heads: Heads) -> Float[Array, "B H K V"]:
    """The backward pass of ``states``."""
    batch, _, width, _ = x.shape
    x = x.reshape(batch, -1, width, heads.abreast, heads.channels)
    return jnp.moveaxis(x, 2, 4).reshape(batch, -1, heads.channels, width)


def _one_each(x: Float[Array, "R nX"], count: int, dtype: DTypeLike) -> Float[Array, "nR nX"]:
    """Below each other copies of x of which each has one head's lanes, and zeros."""
    if count == 1:
        return x.astype(dtype)
    x = x.astype(jnp.float32)  # whose lanes are selected in fewer operations
    return jnp.concatenate([_only(x, head, count).astype(dtype) for head in range(count)], axis=0)


def _only(x, head, count):
    if count == 1:
        return x
    size = x.shape[1] // count
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= head * size) & (lane < (head + 1) * size), x, 0.0)


def _lanes_of_groups(ref, heads: Heads, first: int) -> Float[Array, "C nK"]:
    """q or k of the heads side by side from ``first`` on; those of one group see the same."""
    if heads.repeats == 1:
        return ref[:, first * heads.channels : (first + heads.abreast) * heads.channels].astype(jnp.float32)
    return jnp.concatenate([ref[:, heads.keys(first // heads.repeats)].astype(jnp.float32)] * heads.abreast, axis=1)


def _lanes(first: int, heads: Heads, each: int) -> slice:
    return slice(first * each, (first + heads.abreast) * each)


def _alike(x: Float[Array, "C nK"], heads: Heads) -> Float[Array, "C nC"]:
    """Of each head its row's sum, on the diagonal."""
    steps = x.shape[0]
    pairs = pairs_of(steps)
    sums = [jnp.sum(_only(x, head, heads.abreast), axis=1, keepdims=True) for head in range(heads.abreast)]
    return jnp.concatenate([jnp.where(pairs.row == pairs.column, x, 0.0) for x in sums], axis=1)


# ---- the kernels


def forward(states, q, k, v, o, decays, start_log_mask=None, starts=None, *, heads: Heads, read_before, precision):
    """Advances ``states`` [blocks, V, n K] over one chunk; refs as in ``tpu/gated_linear_attention.py``, decays like q."""
    steps, count = q.shape[0], heads.abreast
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    pairs = pairs_of(steps)
    own = _own(start_log_mask, pairs, (steps, count * heads.channels), read_before)
    level = jnp.concatenate([jnp.where(pairs.row > pairs.column, pairs.level, -1)] * count, axis=1)
    for block in range(states.shape[0]):
        first = block * count
        queries, keys = (_lanes_of_groups(ref, heads, first) for ref in (q, k))
        scores = jnp.zeros(level.shape, jnp.float32) if read_before else _alike(queries * keys, heads)
        for number, sums in enumerate(levels(decays[:, _lanes(first, heads, heads.channels)], own)):
            if sums.block < steps:
                x = _halves(queries, keys, sums.block) * jnp.exp(sums.exponent)
                scores = jnp.where(level == number, dot(x.astype(operand), _one_each(x, count, operand), 1, 1), scores)
        values = _lanes(first, heads, heads.width)
        v_b, state = v[:, values], states[block]
        if starts is not None:
            starts[block] = state.astype(starts.dtype)
        read, written = (queries * jnp.exp(sums.read)).astype(operand), (keys * jnp.exp(sums.left)).astype(operand)
        output = dot(scores.astype(operand), _one_each(v_b, count, operand), 1, 0)
        o[:, values] = (output + dot(read, _one_each(state, count, operand), 1, 1)).astype(o.dtype)
        states[block] = state * jnp.exp(sums.total[0, :1]) + _outer(v_b.astype(operand), written, count, dot)


def _outer(values: Float[Array, "C nV"], rows: Float[Array, "C nK"], count: int, dot) -> Float[Array, "V nK"]:
    """values^T rows of each head."""
    found = dot(values, rows, 0, 0).reshape(count, -1, rows.shape[1])
    return sum(_only(found[head], head, count) for head in range(count))


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
    decays,
    d_decays,
    start_log_mask=None,
    *,
    heads: Heads,
    read_before,
    precision,
):
    """Takes ``d_states`` [blocks, V, n K] back over one chunk, and gives the gradients of its inputs."""
    steps, count = q.shape[0], heads.abreast
    operand = operand_dtype(precision)
    dot = functools.partial(product, precision=precision)
    pairs = pairs_of(steps)
    own = _own(start_log_mask, pairs, (steps, count * heads.channels), read_before)
    row, column, level = (jnp.concatenate([x] * count, axis=1) for x in (pairs.row, pairs.column, pairs.level))
    ones = within_registers(pairs, read_before).astype(operand)
    d_groups = {}
    for block in range(d_states.shape[0]):
        first = block * count
        values, decay_lanes = _lanes(first, heads, heads.width), _lanes(first, heads, heads.channels)
        queries, keys = (_lanes_of_groups(ref, heads, first) for ref in (q, k))
        v_b, d_o_b = v[:, values], d_output[:, values]
        d_o_each = _one_each(d_o_b, count, operand)
        v_b, d_o_b = v_b.astype(operand), d_o_b.astype(operand)
        by_output = dot(d_o_b, _one_each(v[:, values], count, operand), 1, 1)  # d_P, or of all pairs do_i . v_j
        transposed = [by_output[:, head * steps : (head + 1) * steps].T for head in range(count)]
        both = jnp.where(row > column, by_output, jnp.concatenate(transposed, axis=1))
        scores = jnp.zeros_like(both) if read_before else _alike(queries * keys, heads)  # P^T

        d_rows = []
        for number, sums in enumerate(levels(decays[:, decay_lanes], own)):
            if sums.block == steps:
                break
            decay = jnp.exp(sums.exponent)
            x = _halves(queries, keys, sums.block) * decay
            x_each, here = _one_each(x, count, operand), level == number
            scores = jnp.where(here & (row < column), dot(x.astype(operand), x_each, 1, 1), scores)
            d_rows.append(decay * dot(jnp.where(here, both, 0.0).astype(operand), x_each, 1, 0))

        state, d_state = starts[block], d_states[block]
        d_state_each = _one_each(d_state, count, operand)
        decay_read, decay_left = jnp.exp(sums.read), jnp.exp(sums.left)
        d_q_b = decay_read * dot(d_o_b, _one_each(state, count, operand), 1, 0)
        d_k_b = decay_left * dot(v_b, d_state_each, 1, 0)
        written = dot((keys * decay_left).astype(operand), d_state_each, 1, 1)
        d_v[:, values] = (dot(scores.astype(operand), d_o_each, 1, 0) + written).astype(d_v.dtype)
        d_kept = d_state * jnp.exp(sums.total[0, :1])
        d_states[block] = d_kept + _outer(d_o_b, (queries * decay_read).astype(operand), count, dot)

        # As in ``d_sums``. In this order the compiler spills fewer registers, by 8 %.
        total = jnp.zeros((1, _REGISTER, queries.shape[1]), jnp.float32)
        for number in reversed(range(_WITHIN, len(d_rows))):
            m = 1 << number
            read_upper = split(queries, m)[1] * split(d_q_b, m)[1]
            left_lower = split(keys, m)[0] * split(d_k_b, m)[0]
            total = jnp.stack([total + _folded(read_upper), total + _folded(left_lower)], axis=1)
            total = total.reshape(-1, *total.shape[2:])
            d_q_b, d_k_b = _added_by_halves(d_q_b, d_k_b, d_rows[number], m)
        parts = [queries * d_q_b, keys * d_k_b]
        parts += [_halves(queries, keys, 1 << number) * d_rows[number] for number in reversed(range(1, _WITHIN))]
        d_decay = dot(ones, jnp.concatenate([part.astype(operand) for part in parts], axis=0), 1, 0)
        if not read_before:
            d_decay += jnp.where(_is_upper(d_decay.shape, 1), queries * d_rows[0], 0.0)
        total = jnp.sum(total, axis=1, keepdims=True)
        total += jnp.sum(state.astype(jnp.float32) * d_kept, axis=0, keepdims=True)
        d_decays[:, decay_lanes] = (d_decay.reshape(-1, _REGISTER, d_decay.shape[1]) + total).reshape(d_decay.shape)

        for number in range(_WITHIN):
            d_q_b, d_k_b = _added_by_halves(d_q_b, d_k_b, d_rows[number], 1 << number)
        if not read_before:
            diagonal = jnp.where(row == column, by_output, 0.0)
            of_head = [jnp.sum(diagonal[:, h * steps : (h + 1) * steps], axis=1, keepdims=True) for h in range(count)]
            alike = jnp.concatenate([jnp.broadcast_to(x, (steps, heads.channels)) for x in of_head], axis=1)
            d_q_b, d_k_b = d_q_b + alike * keys, d_k_b + alike * queries
        if heads.repeats == 1:
            d_q[:, decay_lanes], d_k[:, decay_lanes] = d_q_b.astype(d_q.dtype), d_k_b.astype(d_k.dtype)
            continue
        for head in range(first, first + count):
            own_lanes = slice((head - first) * heads.channels, (head - first + 1) * heads.channels)
            found, group = (d_q_b[:, own_lanes], d_k_b[:, own_lanes]), head // heads.repeats
            before = d_groups.get(group)
            d_groups[group] = found if before is None else (before[0] + found[0], before[1] + found[1])
    for group, (d_q_g, d_k_g) in d_groups.items():
        d_q[:, heads.keys(group)], d_k[:, heads.keys(group)] = d_q_g.astype(d_q.dtype), d_k_g.astype(d_k.dtype)


def d_sums(
    reading: Float[Array, "C X"],
    leaving: Float[Array, "C X"],
    by_level: list[Float[Array, "C X"]],
    kept: Float[Array, "1 X"],
    ones: Float[Array, "C 4*C"],
    precision,
) -> Float[Array, "C X"]:
    """The gradient of log decays that are read after the step's own, from exponentials of their sums times their cotangents.

    Args:
      reading: of e^prefix.
      leaving: of e^suffix.
      by_level: of what a level's upper halves read, and of what is left of its lower ones.
      kept: of e^total.
      ones: ``within_registers``.
    """
    total = jnp.zeros((1, _REGISTER, reading.shape[1]), jnp.float32)  # of a block's; the sum of its rows is meant
    for number in reversed(range(_WITHIN, len(by_level))):
        m = 1 << number
        total = jnp.stack([total + _folded(split(reading, m)[1]), total + _folded(split(leaving, m)[0])], axis=1)
        total = total.reshape(-1, *total.shape[2:])
        reading, leaving = _added_by_halves(reading, leaving, by_level[number], m)
    parts = [part.astype(ones.dtype) for part in (reading, leaving, *reversed(by_level[1:_WITHIN]))]
    found = product(ones, jnp.concatenate(parts, axis=0), 1, 0, precision)
    found += jnp.where(_is_upper(found.shape, 1), by_level[0], 0.0)
    total = jnp.sum(total, axis=1, keepdims=True) + kept
    return (found.reshape(-1, _REGISTER, found.shape[1]) + total).reshape(found.shape)


def within_registers(pairs: Pairs, read_before) -> Float[Array, "C 4*C"]:
    """For steps t and i of one register, ones where the decay of t is part of what i reads of it, of what is left of it after i,
    of the one or the other by the half of four steps that i is in, and of two."""
    level, column = pairs.level, pairs.column
    is_read = pairs.row < column if read_before else pairs.row <= column
    is_left = pairs.row > column
    whole = level < _WITHIN
    parts = [whole & is_read, whole & is_left]
    for number in (2, 1):
        upper = (column & (1 << number)) != 0
        parts.append((level < number) & ((upper & is_read) | (jnp.logical_not(upper) & is_left)))
    return jnp.concatenate([jnp.where(part, 1.0, 0.0) for part in parts], axis=1)


def _folded(x: Float[Array, "n m X"]) -> Float[Array, "n 8 X"]:
    return jnp.sum(x.reshape(x.shape[0], -1, _REGISTER, x.shape[-1]), axis=1)
