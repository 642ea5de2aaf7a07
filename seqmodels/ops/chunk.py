"""What a chunk of a matrix-state recurrence does to the state it starts from, and the local sums it is prepared with.

A sequence is cut into chunks of C steps. What a chunk does to the state it starts from is linear in that state:

    u  = U - W S                 (W only for the delta rule)
    o  = (q~ S) * b_read + O     (O = P u for the delta rule, whose u needs S)
    S' = gamma[:, None] * S * b_keep[None, :] + k~^T u

A recurrence turns a chunk's inputs into these arrays (a ``Chunk``); ``chunk_scan.py`` runs it over the chunks.

*Why local sums.* The decay between steps j < i is exp(g_{j+1} + ... + g_i). Written as exp(G_i - G_j) with G a cumulative sum,
it loses digits to cancellation; written as exp(G_i) exp(-G_j), it overflows. ``LocalSums`` instead splits every pair at the
highest bit in which i and j differ: i lies in the upper, j in the lower of two neighbouring blocks of m steps, and
the sum is (what i's block adds up to and including i) + (what is left of j's block after j). Both parts are sums of values
<= 0, so both factors are <= 1 for any decay down to minus infinity, and plain differentiation yields sums only: no
subtraction, forward or backward. log2(C) levels give all pairs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Inputs = Any
"""A tuple of arrays [B, T, heads, features]; ``None`` for what a parameterisation does not have."""


class LocalSums(NamedTuple):
    """Sums of log decays over stretches of a chunk; C is a power of two and X is K, V or 1.

    Attributes:
      levels: for blocks of m = 1, 2, 4, ..., C/2 steps: ``(upper, lower)``, both [..., C/2m, m, X]. ``upper``: from the start
        of an upper block up to what step i reads; ``lower``: after step j to the end of a lower block.
      prefix: from the start of the chunk up to what step i reads, [..., C, X].
      suffix: after step j to the end of the chunk, [..., C, X].
      total: over the whole chunk, [..., X].
    """

    levels: tuple[tuple[Float[Array, "*n m X"], Float[Array, "*n m X"]], ...]
    prefix: Float[Array, "*b C X"]
    suffix: Float[Array, "*b C X"]
    total: Float[Array, "*b X"]


class Chunk(NamedTuple):
    """What a chunk does to the state it starts from (the equations above); leading axes are the callers'."""

    read: Float[Array, "*b C K"]
    """q~: queries, decayed since the start of the chunk."""
    write: Float[Array, "*b C K"]
    """k~: keys, decayed until the end of the chunk."""
    value: Float[Array, "*b C V"]
    """U."""
    inside: Float[Array, "*b C V"] | None = None
    """O: what the chunk's own steps contribute to its output, where that is known before the state is."""
    scores: Float[Array, "*b C C"] | None = None
    """P: how each step reads the updates of the chunk's own steps, where O is not."""
    keep: Float[Array, "*b K"] | None = None
    """gamma: decay of the state over the chunk, per key channel or one for all."""
    erase: Float[Array, "*b C K"] | None = None
    """W."""
    value_read: Float[Array, "*b C V"] | None = None
    """b_read: value-side decay since the start of the chunk."""
    value_keep: Float[Array, "*b V"] | None = None
    """b_keep: value-side decay of the state over the chunk."""


def lower_half(x: Float[Array, "*b C X"], block: int) -> Float[Array, "*b n m X"]:
    """The lower block of each pair of neighbouring blocks of ``block`` steps."""
    return _pairs(x, block)[..., 0, :, :]


def upper_half(x: Float[Array, "*b C X"], block: int) -> Float[Array, "*b n m X"]:
    """The upper block of each pair of neighbouring blocks of ``block`` steps."""
    return _pairs(x, block)[..., 1, :, :]


def _pairs(x, block):
    *lead, steps, features = x.shape
    return x.reshape(*lead, steps // (2 * block), 2, block, features)


def local_sums(log_decay: Float[Array, "*b C X"], before: Float[Array, "*b C X"] | None = None) -> LocalSums:
    """All local sums of a chunk, each made from those of half the length by one addition.

    Args:
      log_decay: the decay of step i. A reset before step i is a log decay of minus infinity there.
      before: given when step i reads the state *before* its decay: what then still lies between step i - 1 and the reading at i,
        0, or minus infinity where a reset does. Without it, step i reads after its decay.
    """
    total = log_decay[..., :, None, :]
    prefix = total if before is None else before[..., :, None, :]
    suffix = jnp.zeros_like(total)
    levels = []
    while total.shape[-3] > 1:
        total_low, total_high = total[..., 0::2, :, :], total[..., 1::2, :, :]
        prefix_low, prefix_high = prefix[..., 0::2, :, :], prefix[..., 1::2, :, :]
        suffix_low, suffix_high = suffix[..., 0::2, :, :], suffix[..., 1::2, :, :]
        levels.append((prefix_high, suffix_low))
        prefix = jnp.concatenate([prefix_low, total_low + prefix_high], axis=-2)
        suffix = jnp.concatenate([suffix_low + total_high, suffix_high], axis=-2)
        total = total_low + total_high
    return LocalSums(tuple(levels), prefix[..., 0, :, :], suffix[..., 0, :, :], total[..., 0, 0, :])


def lower_triangle(
    diagonal: Float[Array, "*b C"], blocks: list[Float[Array, "*b _ _ _"]], above: float
) -> Float[Array, "*b C C"]:
    """Puts a lower triangular matrix together from its diagonal and the off-diagonal block of each level."""
    matrix = diagonal[..., :, None, None]
    for block in blocks:
        corner = jnp.full_like(block, above)
        matrix = jnp.concatenate(
            [
                jnp.concatenate([matrix[..., 0::2, :, :], corner], axis=-1),
                jnp.concatenate([block, matrix[..., 1::2, :, :]], axis=-1),
            ],
            axis=-2,
        )
    return matrix[..., 0, :, :]


def pair_log_decay(sums: LocalSums, diagonal: Float[Array, "*b C"]) -> Float[Array, "*b C C"]:
    """Log decay between every pair of steps of a chunk, for one decay per head (X = 1); minus infinity above the diagonal."""
    blocks = [upper + jnp.swapaxes(lower, -1, -2) for upper, lower in sums.levels]
    return lower_triangle(diagonal, blocks, above=-jnp.inf)


def pair_scores(
    rows: Float[Array, "*b C K"],
    keys: Float[Array, "*b C K"],
    sums: LocalSums,
    diagonal: Float[Array, "*b C"],
    precision: lax.Precision,
) -> Float[Array, "*b C C"]:
    """rows_i . diag(exp(sum of log decay between j and i)) keys_j for i > j, ``diagonal`` at i = j, zero above."""
    blocks = [
        jnp.einsum(
            "...ik,...jk->...ij",
            upper_half(rows, upper.shape[-2]) * jnp.exp(upper),
            lower_half(keys, upper.shape[-2]) * jnp.exp(lower),
            precision=precision,
        )
        for upper, lower in sums.levels
    ]
    return lower_triangle(diagonal, blocks, above=0.0)


@jax.custom_vjp
def unit_lower_inverse(matrix: Float[Array, "*b C C"]) -> Float[Array, "*b C C"]:
    """T = (I + L)^-1 with L the part of ``matrix`` below the diagonal (the rest is not read); C is a power of two.

    By blocks of m = 1, 2, 4, ... steps: if T holds the inverses of the diagonal blocks of m steps, those of 2 m steps
    differ by -T L T, L cut down to what joins two neighbouring blocks. Every number formed is one of an inverse.
    (Neumann's series and Newton-Schulz have powers of L in them, which for alike keys grow to 1e8 before they cancel.)
    Products are float32 on every device.
    """
    size = matrix.shape[-1]
    row, column = np.indices((size, size))
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape)
    block = 1
    while block < size:
        joins = (row > column) & ((row ^ column) >= block) & ((row ^ column) < 2 * block)
        below = jnp.where(joins, matrix, 0.0)
        if block > 1:  # else the inverses so far are 1
            below = _exact(inverse, _exact(below, inverse))
        inverse = inverse - below
        block *= 2
    return inverse


def _unit_lower_inverse_forward(matrix):
    inverse = unit_lower_inverse(matrix)
    return inverse, inverse


def _unit_lower_inverse_backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    below = np.tri(inverse.shape[-1], k=-1, dtype=bool)
    return (jnp.where(below, -_exact(transposed, _exact(cotangent, transposed)), 0.0),)


unit_lower_inverse.defvjp(_unit_lower_inverse_forward, _unit_lower_inverse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def solve_unit_lower(
    matrix: Float[Array, "*b C C"], right: tuple[Float[Array, "*b C _"], ...], precision: lax.Precision
) -> tuple[Float[Array, "*b C _"], ...]:
    """x of (I + L) x = r for every r of ``right``, by ``unit_lower_inverse``; ``precision`` is that of the products T r.

    Backward d_r = T^T d_x and d_L = -sum(d_r x^T) below the diagonal: the inverse is not differentiated, which would take two
    more products of the size of L.
    """
    return _solve_unit_lower_forward(matrix, right, precision)[0]


def _solve_unit_lower_forward(matrix, right, precision):
    inverse = unit_lower_inverse(matrix)
    solved = tuple(jnp.einsum("...ij,...jx->...ix", inverse, r, precision=precision) for r in right)
    return solved, (inverse, solved)


def _solve_unit_lower_backward(precision, residuals, cotangents):
    inverse, solved = residuals
    d_right = tuple(jnp.einsum("...ji,...jx->...ix", inverse, d, precision=precision) for d in cotangents)
    d_matrix = sum(jnp.einsum("...ix,...jx->...ij", d, x, precision=precision) for d, x in zip(d_right, solved))
    below = np.tri(inverse.shape[-1], k=-1, dtype=bool)
    return jnp.where(below, -d_matrix, 0.0), d_right


solve_unit_lower.defvjp(_solve_unit_lower_forward, _solve_unit_lower_backward)


def _exact(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def advance(
    chunk: Chunk, state: Float[Array, "*b K V"], precision: lax.Precision
) -> tuple[Float[Array, "*b C V"], Float[Array, "*b K V"]]:
    """One step of the recurrence over chunks: the chunk's output, and the state after it."""
    product = functools.partial(jnp.einsum, precision=precision)
    update = chunk.value
    if chunk.erase is not None:
        update = update - product("...ck,...kv->...cv", chunk.erase, state)
    output = product("...ck,...kv->...cv", chunk.read, state)
    if chunk.value_read is not None:
        output = output * chunk.value_read
    if chunk.keep is not None:
        state = state * chunk.keep[..., :, None]
    if chunk.value_keep is not None:
        state = state * chunk.value_keep[..., None, :]
    inside = product("...ij,...jv->...iv", chunk.scores, update) if chunk.inside is None else chunk.inside
    return output + inside, state + product("...ck,...cv->...kv", chunk.write, update)


def product_precision(q: Float[Array, "..."], k: Float[Array, "..."]) -> lax.Precision:
    """float32 queries and keys ask for float32 products; for narrower ones the device's fastest are exact enough."""
    narrow = min(jnp.finfo(q.dtype).bits, jnp.finfo(k.dtype).bits) < 32
    return lax.Precision.DEFAULT if narrow else lax.Precision.HIGHEST


def float32(tree: Inputs) -> Inputs:
    """The arrays of a tree in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def pad_steps(x: Float[Array, "*b C X"], steps: int) -> Float[Array, "*b steps X"]:
    """Zeros appended along the last axis but one."""
    missing = steps - x.shape[-2]
    return x if missing == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])


def power_of_two(steps: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (steps - 1).bit_length()
