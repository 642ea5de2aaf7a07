"""The delta rule on a TPU, without decay, with one per head or per key channel: one kernel forwards and one backwards.

The grid is that of ``tpu/gated_linear_attention.py``: a step of it reads one chunk of 128 steps of a few heads and advances their
states, which stay in scratch memory. Nothing is prepared and nothing in between is stored. With p the decays since the start of
the chunk, s those until its end, gamma their product and D_ij the decay between two steps, all of them <= 1, a chunk makes of the
state S that it starts from (DeltaNet, arXiv 2406.06484, section 3; Gated DeltaNet, arXiv 2412.06464, section 3.3)

    L_ij = beta_i (k_i . k_j) D_ij  for i > j,       T = (I + L)^-1,       P_ij = (q_i . k_j) D_ij  for i >= j
    u = T beta (v - p k S),       o = p q S + P u,       S' = gamma S + (s k)^T u

With a decay per key channel D is inside of the products (``tpu/delta_decays.py``). Backwards all of this is made again from S, and
with d_S' the cotangent of the state after the chunk

    d_u = P^T d_o + s k d_S',       d_r = T^T d_u,       d_S = gamma d_S' + (p q)^T d_o - (p k)^T beta d_r
    d_v = beta d_r,       d_P = tril(d_o u^T),       d_E = -beta tril(d_r u^T, -1)
    d_(p q) = d_o S^T,       d_(p k) = -d_v S^T,       d_(s k) = u d_S'^T
    d_beta = sum(d_r (v - p k S)) - sum(tril(d_r u^T, -1) (k k^T) D)

with d_E the gradient of (k k^T) D. The inverse needs no derivative of its own: (I + L) u = r gives d_L = -d_r u^T, as for any linear
system.

*T*: its blocks of 16 steps on the diagonal are inverted all at once, by substitution, one column after another. Then neighbouring
blocks are joined as in ``chunk.unit_lower_inverse``, T - T L T with L cut down to what joins them. Every number formed is one of an
inverse, so that alike keys cost no digits. These products, T r and T^T d_u are of float32, or of 16 bits where the inputs are
narrow: their sums are of changing sign (256 steps, 64 channels, keys of pairwise correlation 0.95: d_v is off by 6e-3 to 7e-3 of its
largest value, with T and d_u in bfloat16 by 1.2e-2 to 1.4e-2).

States are transposed, [V, K], so that a decay is a row of lanes.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops.chunk import power_of_two, product_precision
from seqmodels.ops.kernels.tpu import decay_per_head
from seqmodels.ops.kernels.tpu.common import (
    VMEM_LIMIT_BYTES,
    WANTED,
    Heads,
    Walk,
    heads_at_once,
    joined,
    operand_dtype,
    parts,
    product,
    split,
    tile_bytes,
    unsupported_dtype,
)
from seqmodels.ops.kernels.tpu.delta_decays import Decays, Prepared, decays_of

_STEPS = 128  # of a chunk
_BLOCK = 16  # steps whose triangle is inverted by substitution


def unsupported_reason(*, q: Array, k: Array, v: Array, decays: int, precision: lax.Precision, chunk_size: int) -> str | None:
    """What keeps a call from this kernel; ``decays``: how many a head has, 0, 1 or one per channel."""
    reason = unsupported_dtype(q=q, k=k, v=v)
    if reason is not None:
        return reason
    if chunk_size < q.shape[1] and chunk_size != _STEPS:
        return f"its chunks have {_STEPS} steps, not {chunk_size}"
    heads = heads_at_once(q.shape[2], v.shape[2] // q.shape[2], q.shape[3], v.shape[3], _wanted(q, v, precision))
    if heads is None:
        return f"heads of {q.shape[3]} and {v.shape[3]} channels do not fill whole registers"
    needed = _step_bytes(heads, decays, jnp.dtype(operand_dtype(precision)).itemsize)
    if needed > VMEM_LIMIT_BYTES:
        return f"its step needs about {needed / 2**20:.0f} MiB of VMEM, of {VMEM_LIMIT_BYTES / 2**20:.0f}"
    return None


def forward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H X"] | None,
    state: Float[Array, "B H K V"],
    *,
    keep_starts: bool,
    interpret,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"], Float[Array, "N B H V K"] | None]:
    """Outputs in the dtype of ``v``, the final state, and (if kept) the states at chunk starts."""
    precision = product_precision(q, k)
    walk = Walk(q, v, _steps(q.shape[1]), reverse=False, wanted=_wanted(q, v, precision))
    outputs = {"o": ("values", v.dtype)}
    if keep_starts:
        outputs["starts"] = ("starts", operand_dtype(precision))
    final, found = walk.call(
        functools.partial(_forward, heads=walk.heads, decays_of=decays_of(log_decay), precision=precision),
        _inputs(walk, q, k, v, beta, log_decay),
        outputs,
        jnp.swapaxes(state, 2, 3),
        interpret=interpret,
    )
    return walk.of_lanes(found["o"], v.shape), jnp.swapaxes(final, 2, 3), found["starts"] if keep_starts else None


def backward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H X"] | None,
    starts: Float[Array, "N B H V K"],
    d_output: Float[Array, "B T H V"],
    d_final: Float[Array, "B H K V"],
    *,
    interpret,
) -> tuple[Array, Array, Array, Array, Array | None, Array]:
    """Gradients of q, k, v, beta, log_decay (None without one) and the state."""
    precision = product_precision(q, k)
    walk = Walk(q, v, _steps(q.shape[1]), reverse=True, wanted=_wanted(q, v, precision))
    inputs = _inputs(walk, q, k, v, beta, log_decay)
    outputs = walk.d_keys(q, k) | {"d_v": ("values", v.dtype)}
    outputs |= {f"d_{name}": (inputs[name][0], jnp.float32) for name in ("beta", "decays") if name in inputs}
    d_state, found = walk.call(
        functools.partial(_backward, heads=walk.heads, decays_of=decays_of(log_decay), precision=precision),
        inputs | {"d_output": ("values", walk.lanes(d_output)), "starts": ("starts", starts)},
        outputs,
        jnp.swapaxes(d_final, 2, 3),
        interpret=interpret,
    )
    return (
        *walk.of_d_keys(found, q, k),
        walk.of_lanes(found["d_v"], v.shape),
        walk.of_rows(found["d_beta"])[..., 0].astype(beta.dtype),
        None if log_decay is None else walk.of_decays(found["d_decays"], log_decay),
        jnp.swapaxes(d_state, 2, 3),
    )


def _inputs(walk, q, k, v, beta, log_decay):
    inputs = {"q": ("keys", walk.lanes(q)), "k": ("keys", walk.lanes(k)), "v": ("values", walk.lanes(v))}
    inputs["beta"] = ("rows", walk.rows(beta.astype(jnp.float32)[..., None]))
    if log_decay is not None:
        inputs["decays"] = walk.decays(log_decay)
    return inputs


def _steps(steps: int) -> int:
    """The steps of a chunk: a power of two of whole blocks."""
    return min(_STEPS, max(_BLOCK, power_of_two(steps)))


def _wanted(q, v, precision) -> int:
    """Heads of a step of the grid: fewer of wide states, as what lies between the operations of a step grows with them."""
    size = max(128, q.shape[3], v.shape[3]) * jnp.dtype(operand_dtype(precision)).itemsize
    return max(1, WANTED * 128 * 2 // size)


def _step_bytes(heads: Heads, decays: int, size: int) -> int:
    """VMEM of a step of the backward pass, the larger one, with operands of ``size`` bytes; blocks are held twice, to load ahead."""
    count = heads.groups * heads.repeats
    by_chunk = 4 * tile_bytes(_STEPS, heads.groups * heads.channels, size) + 3 * tile_bytes(_STEPS, count * heads.width, size)
    by_chunk += 2 * tile_bytes(count, _STEPS, 4)
    by_chunk += 2 * (tile_bytes(count, _STEPS, 4) if decays <= 1 else tile_bytes(_STEPS, count * heads.channels, 4))
    state = count * tile_bytes(heads.width, heads.channels, 1)
    # What lies between operations, read off compiled kernels: so many arrays of a head, three times as many in float32.
    between = (
        count * (32 if decays > 1 else 12) * (1 if size == 2 else 3) * tile_bytes(_STEPS, max(heads.channels, heads.width), 4)
    )
    return 2 * (by_chunk + (4 + 4 + size) * state) + 4 * state + between


# ---- the kernels: refs hold one chunk of a few heads, [C, heads X], or rows of C numbers


class _Head(NamedTuple):
    """What both passes want of a chunk of one head."""

    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    decays: Array | None
    prepared: Prepared
    beta: Float[Array, "C 1"]
    inverse: Float[Array, "C C"]
    """T, in float32."""


def _heads_of(q, k, beta, decays, heads: Heads, of_decays: Decays) -> list[_Head]:
    found, matrices = [], []
    for group in range(heads.groups):
        q_g, k_g = (ref[:, heads.keys(group)].astype(of_decays.operand) for ref in (q, k))
        for head in heads.of(group):
            row = None if decays is None else decays[of_decays.place(heads, head)]
            prepared = of_decays.prepare(q_g, k_g, row)
            # The row as a column: sums of one number and zeros are exact.
            column = jnp.sum(jnp.where(of_decays.masks.own, beta[head : head + 1, :], 0.0), axis=1, keepdims=True)
            found.append((q_g, k_g, row, prepared, column))
            matrices.append(column * prepared.overlaps)
    inverses = _unit_lower_inverses(matrices, of_decays.precision)
    return [_Head(*of_head, inverse) for of_head, inverse in zip(found, inverses)]


def _updates(of_head: _Head, values, state, dot) -> tuple[Float[Array, "C V"], Float[Array, "C V"]]:
    """v - p k S and u, from v [C, V] and the state that the chunk starts from, in the dtype of products."""
    lacking = values.astype(jnp.float32) - dot(of_head.prepared.erase, state, 1, 1)
    return lacking, _exact(of_head.inverse, of_head.beta * lacking, 1, state.dtype)


def _unit_lower_inverses(matrices: list[Float[Array, "C C"]], precision) -> list[Float[Array, "C C"]]:
    """(I + L)^-1 of matrices L that are zero on the diagonal and above it.

    Of all at once, as each step waits for the last: the blocks on the diagonals lie side by side in the lanes.
    """
    steps, count, operand = matrices[0].shape[0], len(matrices), operand_dtype(precision)
    exact = functools.partial(decay_per_head.exact, precision=precision)
    row, column = (lax.broadcasted_iota(jnp.int32, (steps, steps), axis) for axis in (0, 1))
    in_block = (row ^ column) < _BLOCK
    from_lane, lane = (lax.broadcasted_iota(jnp.int32, (steps, count * _BLOCK), axis) for axis in (0, 1))
    lanes_of = [
        jnp.where(((from_lane & (_BLOCK - 1)) + head * _BLOCK) == lane, 1.0, 0.0).astype(operand) for head in range(count)
    ]
    blocks = sum(exact(jnp.where(in_block, matrix, 0.0), lanes, 0) for matrix, lanes in zip(matrices, lanes_of))
    a, b = (lax.broadcasted_iota(jnp.int32, (count * _BLOCK,) * 2, axis) for axis in (0, 1))
    inverses = jnp.where((from_lane & (_BLOCK - 1)) == (lane & (_BLOCK - 1)), 1.0, 0.0).reshape(-1, _BLOCK, count * _BLOCK)
    for step in range(_BLOCK - 1):
        # Of each block, from the rows below this one: their multiples of it, for all lanes of a block.
        spread = jnp.where((a ^ b < _BLOCK) & ((a & (_BLOCK - 1)) == step), 1.0, 0.0).astype(operand)
        inverses -= exact(blocks, spread, 0).reshape(inverses.shape) * inverses[:, step : step + 1]
    inverses = inverses.reshape(blocks.shape)
    inverses = [jnp.where(in_block, exact(inverses, lanes, 1), 0.0) for lanes in lanes_of]
    block = _BLOCK
    while block < steps:
        joins = ((row ^ column) >= block) & ((row ^ column) < 2 * block)
        halves = [split(inverse, block) for inverse in inverses]
        shape = halves[0][1].shape
        below = [split(jnp.where(joins, matrix, 0.0), block)[1].reshape(-1, steps) for matrix in matrices]
        below = [_exact(x, inverse, 1, operand).reshape(shape) for x, inverse in zip(below, inverses)]
        below = [joined(jnp.zeros(shape, jnp.float32), x) for x in below]
        below = [_exact(upper.reshape(-1, steps), x, 1, operand).reshape(shape) for (_, upper), x in zip(halves, below)]
        inverses = [joined(lower, upper - x) for (lower, upper), x in zip(halves, below)]
        block *= 2
    return inverses


def _exact(a: Float[Array, "..."], b: Float[Array, "m p"], axis: int, operand) -> Float[Array, "n p"]:
    """a @ b in float32, or a.T @ b (``axis`` 0); where products read bfloat16, of numbers with 16 bits."""
    if operand == jnp.float32:
        return product(a, b, axis, 0, lax.Precision.HIGHEST)
    (a_high, a_low), (b_high, b_low) = (parts(x) for x in (a, b))
    dot = functools.partial(product, a_axis=axis, b_axis=0, precision=lax.Precision.DEFAULT)
    high = dot(jnp.concatenate([a_high, a_low], axis=1 - axis), b_high)
    return jnp.split(high, 2)[0] + jnp.split(high, 2)[1] + dot(a_high, b_low)


def _forward(states, q, k, v, beta, o, decays=None, starts=None, *, heads: Heads, decays_of: type[Decays], precision):
    """Advances ``states`` [heads, V, K] over one chunk."""
    of_decays = decays_of(q.shape[0], precision)
    dot, operand = of_decays.dot, of_decays.operand
    for head, of_head in enumerate(_heads_of(q, k, beta, decays, heads, of_decays)):
        values, kept, prepared = heads.values(head), states[head], of_head.prepared
        state = kept.astype(operand)
        if starts is not None:
            starts[head] = state
        update = _updates(of_head, v[:, values], state, dot)[1].astype(operand)
        output = dot(prepared.read, state, 1, 1) + dot(prepared.scores.astype(operand), update, 1, 0)
        o[:, values] = output.astype(o.dtype)
        states[head] = _kept(kept, prepared) + dot(update, prepared.write, 0, 0)


def _backward(
    d_states, q, k, v, beta, d_output, starts, d_q, d_k, d_v, d_beta, decays=None, d_decays=None, *, heads, decays_of, precision
):
    """Takes ``d_states`` [heads, V, K] back over one chunk, and gives the gradients of its inputs."""
    of_decays = decays_of(q.shape[0], precision)
    dot, operand = of_decays.dot, of_decays.operand
    of_heads = _heads_of(q, k, beta, decays, heads, of_decays)
    for group in range(heads.groups):
        d_keys = []
        for head in heads.of(group):
            of_head, values, state = of_heads[head], heads.values(head), starts[head]
            prepared, d_state, d_o = of_head.prepared, d_states[head].astype(operand), d_output[:, values].astype(operand)
            lacking, update = _updates(of_head, v[:, values], state, dot)
            update = update.astype(operand)
            d_update = dot(prepared.scores.astype(operand), d_o, 0, 0) + dot(prepared.write, d_state, 1, 1)
            d_right = _exact(of_head.inverse, d_update, 0, operand)
            d_values = of_head.beta * d_right
            d_v[:, values] = d_values.astype(d_v.dtype)
            d_values = d_values.astype(operand)

            by_update = jnp.where(of_decays.below, dot(d_right.astype(operand), update, 1, 1), 0.0)
            column = jnp.sum(d_right * lacking, axis=1, keepdims=True)
            column -= jnp.sum(by_update * prepared.overlaps, axis=1, keepdims=True)
            d_beta[head : head + 1, :] = jnp.sum(jnp.where(of_decays.masks.own, column, 0.0), axis=0, keepdims=True)

            kept = _kept(d_states[head], prepared)
            d_prepared = Prepared(
                read=dot(d_o, state, 1, 0),
                erase=-dot(d_values, state, 1, 0),
                write=dot(update, d_state, 1, 0),
                scores=jnp.where(of_decays.masks.reads, dot(d_o, update, 1, 1), 0.0),
                overlaps=-of_head.beta * by_update,
                keep=jnp.sum(state.astype(jnp.float32) * kept, axis=0, keepdims=True),
            )
            d_states[head] = kept + dot(d_o, prepared.read, 0, 0) - dot(d_values, prepared.erase, 0, 0)
            *of_keys, d_row = of_decays.gradients(of_head.q, of_head.k, of_head.decays, prepared, d_prepared)
            d_keys.append(of_keys)
            if d_decays is not None:
                d_decays[of_decays.place(heads, head)] = d_row
        for ref, of_head in zip((d_q, d_k), zip(*d_keys)):
            ref[:, heads.keys(group)] = sum(of_head).astype(ref.dtype)


def _kept(state: Float[Array, "V K"], prepared: Prepared) -> Float[Array, "V K"]:
    return state if prepared.keep is None else state * prepared.keep
