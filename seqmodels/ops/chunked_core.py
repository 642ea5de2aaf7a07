"""The inter-chunk core shared by every matrix-state recurrence, and the local sums their chunks are prepared with.

A sequence is cut into chunks of C steps. What a chunk does to the state it starts from is linear in that state:

    u  = U - W S                 (W only for the delta rule)
    o  = (q~ S) * b_read + O     (O = P u for the delta rule, whose u needs S)
    S' = gamma[:, None] * S * b_keep[None, :] + k~^T u

``prepare`` turns a chunk's inputs into these arrays (a ``Chunk``). It knows the parameterisation and nothing of the state, so
all chunks can be prepared at once. ``chunk_scan`` runs the recurrence over chunks. Its own derivative rule keeps the inputs
and the states at the starts of chunks, N K V numbers a head, and prepares every chunk again on the way back.

*Why local sums.* The decay between steps j < i is exp(g_{j+1} + ... + g_i). Written as exp(G_i - G_j) with G a cumulative sum,
it loses digits to cancellation; written as exp(G_i) exp(-G_j), it overflows. ``LocalSums`` instead splits every pair at the
highest bit in which i and j differ: i lies in the upper, j in the lower of two neighbouring blocks of m steps, and
the sum is (what i's block adds up to and including i) + (what is left of j's block after j). Both parts are sums of values
<= 0, so both factors are <= 1 for any decay down to minus infinity, and plain differentiation yields sums only: no
subtraction, forward or backward. log2(C) levels give all pairs.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops import choices, kernels, target, tuning

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


def local_sums(
    log_decay: Float[Array, "*b C X"], before: Float[Array, "*b C X"] | None = None
) -> LocalSums:
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
    diagonal: Float[Array, "*b C"], blocks: list[Float[Array, "*b n m m"]], above: float
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


Prepare = Callable[[Inputs], Chunk]


class Schedule(enum.Enum):
    """Which chunk is prepared when; the numbers are the same. The third schedule is a kernel's (``kernels.Kernel``)."""

    ONE_BY_ONE = "each chunk is prepared when its turn comes, so that it stays in cache: fastest on a CPU"
    TOGETHER = "all chunks are prepared before the recurrence starts, in parallel: for a device with many cores"


def schedule() -> Schedule:
    """The device's, without a kernel."""
    return Schedule.ONE_BY_ONE if target.device() == "cpu" else Schedule.TOGETHER


def run(
    op: str,
    implementation: str | None,
    prepare: Prepare,
    chunk_size: int | None,
    precision: lax.Precision,
    inputs: Inputs,
    state: Float[Array, "B *heads K V"],
) -> tuple[Float[Array, "B T *heads V"], Float[Array, "B *heads K V"]]:
    """``chunk_scan`` over any number of steps, with the kernel of this device where ``implementation`` means it.

    Args:
      op: who asks, for its chunk size, the record of choices and the message.
      implementation: ``"chunked"``, ``"pallas"``, or ``None`` for the better of the two that this device has.
      chunk_size: steps per chunk; None is the device's.

    Raises:
      NotImplementedError: ``"pallas"``, and the kernel cannot run; the message says why.
    """
    steps = jax.tree.leaves(inputs)[0].shape[1]
    chunk_size = tuning.chunk_size(op, steps, chunk_size)
    kernel = kernels.choose(
        implementation, "chunk_core", op,
        precision=precision, channels=state.shape[-2], width=state.shape[-1], chunk_size=power_of_two(chunk_size),
    )  # fmt: skip
    choices.note(op, "chunked" if kernel is None else "pallas", chunk_size)
    padding = -steps % chunk_size
    if padding:
        inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)), inputs)
    scan = functools.partial(chunk_scan, prepare, chunk_size, precision, schedule() if kernel is None else kernel)
    outputs, final = scan(inputs, state) if kernel is None else target.by_rows(scan, inputs, state)
    return outputs[:, :steps], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def chunk_scan(
    prepare: Prepare,
    chunk_size: int,
    precision: lax.Precision,
    schedule: Schedule | kernels.Kernel,
    inputs: Inputs,
    state: Float[Array, "B *heads K V"],
) -> tuple[Float[Array, "B T *heads V"], Float[Array, "B *heads K V"]]:
    """Runs a recurrence over the chunks of a sequence.

    Args:
      prepare: the parameterisation: takes the inputs of one chunk, [..., *heads, C, features] with C a power of two, and leading
        axes of its own if several are prepared at once.
      chunk_size: any number of steps; chunks are padded with zeros to a power of two inside.
      precision: of the matrix products.
      schedule: which chunk is prepared when; with a kernel (``chunk_core``) all chunks together, and the kernel runs the recurrence.
        For chunks [N, B, *heads, C, X], where a head axis may be 1 in some arrays, and a state [B, *heads, K, V] it has
        ``forward``: (outputs [N, B, *heads, C, V], final state, and with ``keep_starts`` the states at chunk starts
        [N, B, *heads, K, V], else None), float32 but for those, which may have the products' dtype;
        ``backward``, of the state alone, from d_outputs and d_final: (the cotangents of the states after every chunk
        [N, B, *heads, K, V], that of the first state). It needs no state:

            dS = gamma[:, None] dS' b_keep[None, :] + q~^T (do b_read) - W^T (P^T do + k~ dS')
      inputs: a tuple of [B, T, *heads, features] (or None), T a multiple of ``chunk_size``; a zero vector must mean "nothing happens"
        in each.
      state: the state before the first step.

    Returns:
      ``(output, state)``, float32.
    """
    return _run(prepare, chunk_size, precision, schedule, inputs, state, keep_starts=False)[:2]


def _chunk_scan_forward(prepare, chunk_size, precision, schedule, inputs, state):
    outputs, final, starts = _run(prepare, chunk_size, precision, schedule, inputs, state, keep_starts=True)
    return (outputs, final), (inputs, starts)


def _run(prepare, chunk_size, precision, schedule, inputs, state, *, keep_starts):
    """Outputs, the final state, and the states at chunk starts (a kernel makes them only if they are kept)."""
    batch, steps = jax.tree.leaves(inputs)[0].shape[:2]
    count = steps // chunk_size
    if schedule is Schedule.ONE_BY_ONE:

        def step(n, carry):
            state, outputs, starts = carry
            chunk = prepare(_take(inputs, n, chunk_size))
            output, following = advance(chunk, state, precision)
            outputs = _put(outputs, output, n, chunk_size)
            return following, outputs, lax.dynamic_update_index_in_dim(starts, state, n, 0)

        outputs = jnp.zeros((batch, steps, *state.shape[1:-2], state.shape[-1]), jnp.float32)
        starts = jnp.zeros((count, *state.shape), jnp.float32)
        final, outputs, starts = lax.fori_loop(0, count, step, (state, outputs, starts))
    elif schedule is Schedule.TOGETHER:
        chunks = prepare(_split(inputs, chunk_size))
        final, starts = lax.scan(lambda state, chunk: (advance(chunk, state, precision)[1], state), state, chunks)
        outputs = _join(advance(chunks, starts, precision)[0], chunk_size)
    else:
        outputs, final, starts = schedule.passes.forward(
            prepare(_split(inputs, chunk_size)),
            state,
            precision=precision,
            keep_starts=keep_starts,
            interpret=schedule.interpret,
        )
        outputs = _join(outputs, chunk_size)
    return outputs, final, starts


def _chunk_scan_backward(prepare, chunk_size, precision, schedule, residuals, cotangents):
    inputs, starts = residuals
    d_outputs, d_state = cotangents
    count = starts.shape[0]

    def run(chunk_inputs, state):
        return advance(prepare(chunk_inputs), state, precision)

    if schedule is Schedule.ONE_BY_ONE:

        def step(i, carry):
            d_state, d_inputs = carry
            n = count - 1 - i
            start = lax.dynamic_index_in_dim(starts, n, 0, keepdims=False)
            _, pull = jax.vjp(run, _take(inputs, n, chunk_size), start)
            d_chunk, d_state = pull((_take(d_outputs, n, chunk_size), d_state))
            return d_state, jax.tree.map(lambda x, d: _put(x, d, n, chunk_size), d_inputs, d_chunk)

        d_state, d_inputs = lax.fori_loop(0, count, step, (d_state, jax.tree.map(jnp.zeros_like, inputs)))
    else:
        split_inputs, d_split_outputs = _split((inputs, d_outputs), chunk_size)
        chunks = prepare(split_inputs)
        if schedule is Schedule.TOGETHER:

            def step(d_state, x):
                chunk, start, d_output = x
                _, pull = jax.vjp(lambda state: advance(chunk, state, precision), start)
                return pull((d_output, d_state))[0], d_state

            d_state, d_ends = lax.scan(step, d_state, (chunks, starts, d_split_outputs), reverse=True)
        else:
            d_ends, d_state = schedule.passes.backward(
                chunks, d_split_outputs, d_state, precision=precision, interpret=schedule.interpret
            )
        _, pull = jax.vjp(lambda chunk_inputs: run(chunk_inputs, starts), split_inputs)
        (d_split_inputs,) = pull((d_split_outputs, d_ends))
        d_inputs = jax.tree.map(lambda d: _join(d, chunk_size), d_split_inputs)
    return d_inputs, d_state


chunk_scan.defvjp(_chunk_scan_forward, _chunk_scan_backward)


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


def _take(tree, n, chunk_size):
    """Chunk n of [B, T, *heads, X] arrays, as [B, *heads, C, X] with C the padded chunk size."""

    def take(x):
        steps = lax.dynamic_slice_in_dim(x, n * chunk_size, chunk_size, axis=1)
        return pad_steps(jnp.moveaxis(steps, 1, -2), power_of_two(chunk_size))

    return jax.tree.map(take, tree)


def _put(whole, chunk, n, chunk_size):
    """Writes [B, *heads, C, X] over chunk n of [B, T, *heads, X]."""
    steps = jnp.moveaxis(chunk[..., :chunk_size, :], -2, 1).astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, steps, n * chunk_size, axis=1)


def _split(tree, chunk_size):
    """[B, T, *heads, X] arrays as [N, B, *heads, C, X], with C the padded chunk size."""

    def split(x):
        batch, steps, *rest = x.shape
        x = x.reshape(batch, steps // chunk_size, chunk_size, *rest)
        return pad_steps(jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0), power_of_two(chunk_size))

    return jax.tree.map(split, tree)


def _join(chunks, chunk_size):
    """[N, B, *heads, C, X] as [B, T, *heads, X]."""
    x = jnp.moveaxis(jnp.moveaxis(chunks[..., :chunk_size, :], 0, 1), -2, 2)
    batch, count, size, *rest = x.shape
    return x.reshape(batch, count * size, *rest)
