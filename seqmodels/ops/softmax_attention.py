"""Causal softmax attention to a ring of keys and values, in all its forms.

    o_t = sum_s softmax_s(q_t . k_s) v_s,    s in t's document and t - window < s <= t     (arXiv 1706.03762, eq. 1)

Query head h reads key/value head h // (H / G) (grouped queries, arXiv 2305.13245). ``q`` arrives scaled and rotated.

| implementation | what it is |
|---|---|
| recurrent | one query at a time: write its key and value into the ring, then attend to what the ring holds |
| associative | raises: softmax does not split into a scan of this form |
| parallel | the softmax of the whole T x T matrix of scores |
| chunked | block by block, long sequences by tiles under a running softmax (arXiv 2205.14135); gradients recompute |
| pallas | a library's kernel: JAX's splash attention on a TPU, cuDNN's on an NVIDIA GPU (``kernels/softmax_attention_*``) |

Scores, softmax and sums are float32 whatever the inputs are; float32 inputs are multiplied as float32 everywhere.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops import documents, kernels, target
from seqmodels.ops.dispatch import KernelForm, dispatch

# The time of a key that no query may see: an empty slot of the ring, or padding.
NOWHERE = int(np.iinfo(np.int32).max)
# At most so many blocks of queries are written out, each against all its keys; longer sequences loop over tiles.
MAX_ROWS = 4
MAX_ROW_KEYS = 2048


class Cache(NamedTuple):
    """A ring of the newest S keys and values. A slot without a live token holds zeros, or what no query may see."""

    keys: Float[Array, "B G S K"]  # by head, as the products want them: a step must not transpose the ring
    values: Float[Array, "B G S V"]
    cursor: Int[Array, "B"]  # the slot that the next token takes
    live: Int[Array, "B"]  # how many of the newest tokens still count; a document start sets it to 0


def init_cache(
    batch_size: int,
    capacity: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None = None,
    dtype=jnp.float32,
) -> Cache:
    """The empty ring: ``capacity`` tokens, or ``window`` where that is fewer, as nothing older is ever seen."""
    size = capacity if window is None else min(capacity, window)
    return Cache(
        keys=jnp.zeros((batch_size, num_kv_heads, size, key_dim), dtype),
        values=jnp.zeros((batch_size, num_kv_heads, size, value_dim), dtype),
        cursor=jnp.zeros((batch_size,), jnp.int32),
        live=jnp.zeros((batch_size,), jnp.int32),
    )


def softmax_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    cache: Cache | None = None,
    reset: Bool[Array, "B T"] | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Cache]:
    """Attends to the cache and to the new tokens, and adds the new tokens to the cache.

    Args:
      q: queries, already scaled (nothing is scaled here) and rotated; H is a multiple of G.
      k: keys, already rotated.
      v: values; V may differ from K.
      cache: what was read before; None is an empty ring of capacity T (or ``window``) and costs nothing to read.
      reset: marks the steps at which a new document starts. Attention never crosses a start, and a NaN or an
        infinity in one document changes no other.
      window: a query sees the keys of the last ``window`` steps, its own among them; None sees everything.
      implementation: a row of the table above; None is recurrent for one step with a cache, else pallas where the device
        has the kernel for the call, else chunked.

    Returns:
      ``(o, cache)``, ``o`` in q's dtype. The ring has the structure, shapes and dtypes of the one that was given.
      Tokens that it has no room for push out the oldest; not to let live ones go is the caller's business.

    Raises:
      ValueError: shapes that do not fit, a window below 1, an unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what is missing.
    """
    _check(q, k, v, cache, reset, window)
    steps = q.shape[1]
    call = {"q": q, "k": k, "v": v, "cache": cache, "reset": reset, "window": window}
    form = dispatch(
        "softmax_attention", _FORMS, implementation, steps=steps, one_step=steps == 1 and cache is not None,
        kernel_forms={"softmax_attention": KernelForm(_pallas, call)},
    )  # fmt: skip
    if cache is not None:
        k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
    return form(q, k, v, cache, reset, window)


def _check(q, k, v, cache, reset, window):
    (B, T, H, K), G = q.shape, k.shape[2]
    if k.shape != (B, T, G, K) or v.shape[:3] != (B, T, G):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} are not [B,T,H,K], [B,T,G,K], [B,T,G,V]")
    if H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key/value heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: it counts the query's own step")
    if reset is not None and reset.shape != (B, T):
        raise ValueError(f"reset {reset.shape} is not [B,T] = {(B, T)}")
    if cache is not None and any(
        (ring.shape[0], ring.shape[1], ring.shape[3]) != (B, *x.shape[2:])
        for ring, x in ((cache.keys, k), (cache.values, v))
    ):
        raise ValueError(f"a ring of {cache.keys.shape}, {cache.values.shape} does not fit k {k.shape}, v {v.shape}")


# ---- the ring


def _ages(cache: Cache) -> Int[Array, "B S"]:
    """How many tokens were written after the one in each slot: 0 for the newest, whether or not it is live."""
    capacity = cache.keys.shape[2]
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.mod(cache.cursor[:, None] - 1 - slots[None, :], capacity)


def _write(cache: Cache, k, v, reset) -> Cache:
    """The ring after T more tokens."""
    B, T = k.shape[:2]
    capacity = cache.keys.shape[2]
    newest = slice(max(T - capacity, 0), T)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    slots = jnp.mod(cache.cursor[:, None] + jnp.arange(newest.start, T, dtype=jnp.int32)[None, :], capacity)
    written = Cache(
        keys=cache.keys.at[rows, :, slots].set(k[:, newest], unique_indices=True),
        values=cache.values.at[rows, :, slots].set(v[:, newest], unique_indices=True),
        cursor=jnp.mod(cache.cursor + T, capacity),
        live=jnp.minimum(_live_after(reset, T, cache.live), capacity),
    )
    return written if reset is None else _clear_dead(written)


def _fresh(k, v, reset, window) -> Cache:
    """The ring after T tokens and nothing before them: the keys and values as they are, no slot left over."""
    B, T = k.shape[:2]
    capacity = T if window is None else min(T, window)
    zero = jnp.zeros((B,), jnp.int32)
    live = jnp.minimum(_live_after(reset, T, zero), capacity)
    full = Cache(*(_by_kv_head(x[:, T - capacity :]) for x in (k, v)), cursor=zero, live=live)
    return full if reset is None else _clear_dead(full)


def _live_after(reset, num_steps: int, live: Int[Array, "B"]) -> Int[Array, "B"]:
    if reset is None:
        return live + num_steps
    latest_start = jnp.max(jnp.where(reset, jnp.arange(num_steps, dtype=jnp.int32)[None, :], -1), axis=1)
    return jnp.where(latest_start >= 0, num_steps - latest_start, live + num_steps)


def _clear_dead(cache: Cache) -> Cache:
    """Zeros the tokens of ended documents: a NaN among them would survive a weight of zero."""
    dead = (_ages(cache) >= cache.live[:, None])[:, None, :, None]
    return cache._replace(
        keys=jnp.where(dead, jnp.zeros((), cache.keys.dtype), cache.keys),
        values=jnp.where(dead, jnp.zeros((), cache.values.dtype), cache.values),
    )


# ---- one query at a time


def _recurrent(q, k, v, cache, reset, window):
    B, T = q.shape[:2]
    if cache is None:
        cache = init_cache(B, T, k.shape[2], k.shape[3], v.shape[3], window=window, dtype=k.dtype)
    if T == 1:
        return _one_step(q, k, v, cache, reset, window)

    def step(cache, inputs):
        o, cache = _one_step(*jax.tree.map(lambda x: x[:, None], inputs[:3]), cache, inputs[3], window)
        return cache, o[:, 0]

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, None if reset is None else reset[:, :, None]))
    cache, o = lax.scan(step, cache, by_step)
    return jnp.moveaxis(o, 0, 1), cache


def _one_step(q, k, v, cache, reset, window):
    """T = 1. The ring is written in place before it is read: what the write overwrites, no later query may see."""
    cache = _write(cache, k, v, reset)
    reach = cache.live if window is None else jnp.minimum(cache.live, window)
    visible = (_ages(cache) < reach[:, None])[:, None, :]
    o = _plain_attention(_by_head(q, k.shape[2]), cache.keys, cache.values, visible)
    return _by_time(o).astype(q.dtype), cache


def _plain_attention(q, k, v, visible: Bool[Array, "#B T S"]) -> Float[Array, "B G R T V"]:
    """The textbook form, in float32: every query against every key."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, precision=lax.Precision.HIGHEST)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bgrts,bgsv->bgrtv", weights, v, precision=lax.Precision.HIGHEST)


# Products run by head, [B, G, R, T, K] and [B, G, S, K]: the matrices of a head contiguous, R queries to a key.


def _by_head(q: Float[Array, "B T H K"], num_kv_heads: int) -> Float[Array, "B G R T K"]:
    B, T, H, K = q.shape
    return q.reshape(B, T, num_kv_heads, H // num_kv_heads, K).transpose(0, 2, 3, 1, 4)


def _by_kv_head(x: Float[Array, "B T G X"]) -> Float[Array, "B G T X"]:
    return x.transpose(0, 2, 1, 3)


def _by_time(o: Float[Array, "B G R T V"]) -> Float[Array, "B T H V"]:
    B, G, R, T, V = o.shape
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, V)


# ---- all queries at once: who sees whom, and how a NaN stays in its document


class Points(NamedTuple):
    """Where tokens stand. A leading axis of 1 means: alike in every row of the batch."""

    steps: Int[Array, "#B T"]  # time; negative in the ring, NOWHERE where there is no token
    documents: Int[Array, "B T"] | None  # None: no reset was given


def _visible(queries: Points, keys: Points, window: int | None) -> Bool[Array, "#B T S"]:
    distance = queries.steps[:, :, None] - keys.steps[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if queries.documents is not None:
        visible &= documents.same_document(queries.documents, keys.documents)
    return visible


def _parallel_over_queries(attend, q, k, v, cache, reset, window):
    """``attend(q, keys, values, query points, key points, window, num_old)`` over [ring | new]; writes the ring."""
    (B, T), G = q.shape[:2], k.shape[2]
    new_cache = _fresh(k, v, reset, window) if cache is None else _write(cache, k, v, reset)
    num_old = 0 if cache is None else cache.keys.shape[2]
    steps = jnp.arange(T, dtype=jnp.int32)[None, :]
    key_steps, queries, keys, values = steps, _by_head(q, G), _by_kv_head(k), _by_kv_head(v)
    if cache is not None:
        ages = _ages(cache)
        old_steps = jnp.where(ages < cache.live[:, None], -1 - ages, NOWHERE)
        key_steps = jnp.concatenate([old_steps, jnp.broadcast_to(steps, (B, T))], axis=1)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in ((cache.keys, keys), (cache.values, values)))
    if reset is None:
        o = attend(queries, keys, values, Points(steps, None), Points(key_steps, None), window, num_old)
        return _by_time(o).astype(q.dtype), new_cache

    ids = documents.segment_ids(reset)
    key_ids = jnp.concatenate([jnp.zeros((B, num_old), jnp.int32), ids], axis=1)
    query_points, key_points = Points(steps, ids), Points(key_steps, key_ids)
    queries, bad_query = documents.quarantine(queries)
    keys, bad_key = documents.quarantine(keys)
    values, bad_value = documents.quarantine(values)
    o = attend(queries, keys, values, query_points, key_points, window, num_old)
    sees_bad = _sees_bad(jnp.swapaxes(bad_key | bad_value, 1, 2), query_points, key_points, reset, window)
    tainted = bad_query | jnp.swapaxes(sees_bad, 1, 2)[:, :, None]
    return _by_time(documents.set_nan(o, tainted)).astype(q.dtype), new_cache


def _sees_bad(bad: Bool[Array, "B S G"], queries: Points, keys: Points, reset, window) -> Bool[Array, "B T G"]:
    """Whether a query sees a bad key or value: the latest one of its document, if the window still reaches it."""
    num_old = bad.shape[1] - reset.shape[1]
    never = -NOWHERE
    bad_steps = jnp.where(bad, keys.steps[:, :, None], never)
    latest_old = jnp.max(bad_steps[:, :num_old], axis=1, initial=never)[:, None]
    latest_new = lax.cummax(bad_steps[:, num_old:], axis=1)
    old = (queries.documents == 0)[:, :, None] & (latest_old > never)
    new = documents.nan_reach(bad[:, num_old:], reset)
    if window is None:
        return old | new
    beyond = queries.steps[:, :, None] - window
    return old & (latest_old > beyond) | new & (latest_new > beyond)


def _parallel(q, k, v, cache, reset, window):
    def attend(q, keys, values, query_points, key_points, window, num_old):
        return _plain_attention(q, keys, values, _visible(query_points, key_points, window))

    return _parallel_over_queries(attend, q, k, v, cache, reset, window)


# ---- block by block


def _chunked(q, k, v, cache, reset, window):
    return _parallel_over_queries(_in_blocks, q, k, v, cache, reset, window)


def _in_blocks(q, k, v, query_points, key_points, window, num_old):
    T, S = q.shape[3], k.shape[2]
    q, k, v = (x.astype(_product_dtype(q.dtype)) for x in (q, k, v))
    block = _block_length(T, window)
    if T <= MAX_ROWS * block and S <= MAX_ROW_KEYS:
        return _rows(Rows(block, num_old, window), q, k, v, query_points, key_points)
    return _in_tiles(Tiles(T, min(block, T), block, num_old, window), q, k, v, query_points, key_points)


def _block_length(num_steps: int, window: int | None) -> int:
    """Queries per block. Small blocks skip more of what lies above the diagonal, large ones are better products."""

    def power_of_two(length):
        return 2 ** math.ceil(math.log2(length))

    length = min(max(power_of_two(num_steps / MAX_ROWS), 64), 256)
    return length if window is None else min(length, max(power_of_two(window), 64))


def _product_dtype(dtype):
    """Narrow operands pay off on matrix units; a CPU has none and would widen them at every product."""
    return jnp.float32 if target.device() == "cpu" else dtype


def _product(subscripts: str, a, b, dtype) -> Float[Array, "..."]:
    """An einsum of operands in ``dtype``, summed in float32; float32 operands are not rounded on the way in."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _bias(visible: Bool[Array, "#B T S"], group: int) -> Float[Array, "#B 1 M S"]:
    """0 where a query sees a key, minus infinity elsewhere; the queries of a group one under the other.

    Added, not selected: XLA on a CPU runs product, bias, softmax and product as one kernel; a select breaks it.
    """
    bias = jnp.where(visible, 0.0, -jnp.inf).astype(jnp.float32)
    return jnp.tile(bias, (1, group, 1))[:, None]


def _stack_group(x: Float[Array, "*n R T X"]) -> Float[Array, "*n M X"]:
    """The queries of a group of heads one under the other, M = R T: they meet the same keys in one product."""
    *lead, R, T, X = x.shape
    return x.reshape(*lead, R * T, X)


def _split_group(x: Float[Array, "*n M X"], group: int) -> Float[Array, "*n R T X"]:
    *lead, M, X = x.shape
    return x.reshape(*lead, group, M // group, X)


def _features_first(x: Float[Array, "*n R T X"]) -> Float[Array, "*n X R T"]:
    """A transposed copy. XLA would fold it into the product, and give the product to a slower kernel on a CPU."""
    return lax.optimization_barrier(jnp.moveaxis(x, -1, -3))


# In both plans below every product contracts the last axis of its left side, because only those go to the CPU's fast
# kernel (16 times [256, 256] x [256, 32]: 0.8 ms of CPU time against 2.5 to 6); k_bar and v_bar come out transposed.
#
# Short sequences: a few blocks of queries, each against all the keys it can see, in one softmax.


class Rows(NamedTuple):
    block: int  # queries
    num_old: int  # keys of the ring, which come before the new ones
    window: int | None

    def spans(self, num_steps: int) -> list[tuple[slice, slice]]:
        """The queries of each block, and the keys that they can see. The ring is in no order: all of it, or none."""
        spans = []
        for start in range(0, num_steps, self.block):
            stop = min(start + self.block, num_steps)
            oldest = -1 if self.window is None else start - self.window + 1
            first = 0 if oldest < 0 else self.num_old + oldest
            spans.append((slice(start, stop), slice(first, self.num_old + stop)))
        return spans


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(plan: Rows, q, k, v, query_points, key_points):
    return _rows_forward(plan, q, k, v, query_points, key_points)[0]


def _row_weights(plan: Rows, q, k, query_points, key_points, queries, keys) -> Float[Array, "B G M S"]:
    query_points = jax.tree.map(lambda x: x[:, queries], query_points)
    key_points = jax.tree.map(lambda x: x[:, keys], key_points)
    scores = _product("bgmk,bgsk->bgms", _stack_group(q[:, :, :, queries]), k[:, :, keys], q.dtype)
    return jax.nn.softmax(scores + _bias(_visible(query_points, key_points, plan.window), q.shape[2]), axis=-1)


def _rows_forward(plan, q, k, v, query_points, key_points):
    blocks = []
    for queries, keys in plan.spans(q.shape[3]):
        weights = _row_weights(plan, q, k, query_points, key_points, queries, keys)
        blocks.append(_split_group(_product("bgms,bgsv->bgmv", weights, v[:, :, keys], v.dtype), q.shape[2]))
    return jnp.concatenate(blocks, axis=3), (q, k, v, query_points, key_points)


def _rows_backward(plan, saved, o_bar):
    # Only the inputs are saved: at these lengths computing the weights anew beats writing and reading them.
    q, k, v, query_points, key_points = saved
    S = k.shape[2]
    q_by_feature, o_bar_by_feature = _features_first(q), _features_first(o_bar)
    q_bars, k_bar, v_bar = [], 0.0, 0.0
    for queries, keys in plan.spans(q.shape[3]):
        weights = _row_weights(plan, q, k, query_points, key_points, queries, keys)
        o_block_bar = _stack_group(o_bar[:, :, :, queries])
        weights_bar = _product("bgmv,bgsv->bgms", o_block_bar, v[:, :, keys], v.dtype)
        scores_bar = weights * (weights_bar - jnp.sum(weights * weights_bar, axis=-1, keepdims=True))
        q_bars.append(_split_group(_product("bgms,bgsk->bgmk", scores_bar, k[:, :, keys], k.dtype), q.shape[2]))
        unseen = ((0, 0), (0, 0), (0, 0), (keys.start, S - keys.stop))
        q_block, o_block_bar = (x[..., queries].reshape(*x.shape[:3], -1) for x in (q_by_feature, o_bar_by_feature))
        k_bar += jnp.pad(_product("bgkm,bgms->bgks", q_block, scores_bar, q.dtype), unseen)
        v_bar += jnp.pad(_product("bgvm,bgms->bgvs", o_block_bar, weights, v.dtype), unseen)
    q_bar = jnp.concatenate(q_bars, axis=3).astype(q.dtype)
    k_bar, v_bar = (jnp.swapaxes(x, 2, 3) for x in (k_bar, v_bar))
    return q_bar, k_bar.astype(k.dtype), v_bar.astype(v.dtype), None, None


_rows.defvjp(_rows_forward, _rows_backward)


# Long sequences: a loop over tiles of queries x keys. A tile that nobody sees is not in the list, so that causality
# and a window cost what they cover. Arrays are cut into blocks beforehand: [number of blocks, B, G, ...].


class Tiles(NamedTuple):
    num_steps: int
    num_queries: int  # of a tile
    num_keys: int
    num_old: int  # keys of the ring, which come before the new ones
    window: int | None

    def pairs(self) -> np.ndarray:
        """(query block, key block) of each tile. A block's own keys come first: there every query sees one."""
        old_blocks = -(-self.num_old // self.num_keys)
        pairs = []
        for i, start in enumerate(range(0, self.num_steps, self.num_queries)):
            oldest = -1 if self.window is None else start - self.window + 1
            first, own = max(oldest, 0) // self.num_keys, start // self.num_keys
            pairs += [(i, old_blocks + j) for j in range(own, first - 1, -1)]
            pairs += [(i, j) for j in range(old_blocks) if oldest < 0]
        return np.array(pairs, np.int32)


def _in_tiles(plan: Tiles, q, k, v, query_points, key_points):
    """Cuts into blocks, attends tile by tile, joins. A padded query repeats the last one, so that it too sees a key."""

    def key_blocks(x, axis, empty):
        old, new = jnp.split(x, [plan.num_old], axis=axis)
        parts = [_cut(part, plan.num_keys, axis, constant_values=empty) for part in (old, new) if part.shape[axis]]
        return jnp.concatenate(parts)

    query_blocks = functools.partial(_cut, size=plan.num_queries, mode="edge")
    query_points = jax.tree.map(lambda x: query_blocks(x, axis=1), query_points)
    key_points = jax.tree.map(lambda x: key_blocks(x, 1, NOWHERE), key_points)
    o = _tiles(
        plan,
        _stack_group(query_blocks(q, axis=3)),
        key_blocks(k, 2, 0.0),
        key_blocks(v, 2, 0.0),
        query_points,
        key_points,
    )
    o = jnp.moveaxis(_split_group(o, q.shape[2]), 0, 3)
    return o.reshape(o.shape[:3] + (-1, o.shape[-1]))[:, :, :, : plan.num_steps]


def _cut(x, size: int, axis: int, **padding):
    """[.., n, ..] to [n / size, .., size, ..], padded at the end as ``jnp.pad`` is told."""
    num_blocks = -(-x.shape[axis] // size)
    widths = [(0, num_blocks * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths, **padding)
    return jnp.moveaxis(x.reshape(x.shape[:axis] + (num_blocks, size) + x.shape[axis + 1 :]), axis, 0)


def _block(blocks, index):
    """One block of each array."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def _set_block(blocks, block, index):
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, index, 0), blocks, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiles(plan: Tiles, q, k, v, query_points, key_points):
    return _tiles_forward(plan, q, k, v, query_points, key_points)[0]


def _tile_scores(plan: Tiles, q, k, query_points, key_points) -> Float[Array, "B G M S"]:
    visible = _visible(query_points, key_points, plan.window)
    return _product("bgmk,bgsk->bgms", q, k, q.dtype) + _bias(visible, q.shape[2] // plan.num_queries)


def _tiles_forward(plan, q, k, v, query_points, key_points):
    def tile(running, pair):
        i, j = pair
        (q_i, points_i), (k_j, v_j, points_j) = _block((q, query_points), i), _block((k, v, key_points), j)
        top, total, o = _block(running, i)
        scores = _tile_scores(plan, q_i, k_j, points_i, points_j)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        new_total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        new_o = o * shrink + _product("bgms,bgsv->bgmv", weights, v_j, v.dtype)
        return _set_block(running, (new_top, new_total, new_o), i), None

    column = q.shape[:-1] + (1,)
    nothing = (
        jnp.full(column, -jnp.inf, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros(q.shape[:-1] + v.shape[-1:], jnp.float32),
    )
    (top, total, o), _ = lax.scan(tile, nothing, tuple(plan.pairs().T))
    o = o / total
    return o, (q, k, v, query_points, key_points, o, top + jnp.log(total))


def _tiles_backward(plan, saved, o_bar):
    q, k, v, query_points, key_points, o, log_total = saved
    correction = jnp.sum(o * o_bar, axis=-1, keepdims=True)
    by_feature = tuple(jnp.squeeze(_features_first(x[:, :, :, None]), axis=4) for x in (q, o_bar))
    queries = (q, o_bar, log_total, correction, query_points, *by_feature)

    def tile(gradients, pair):
        i, j = pair
        q_i, o_bar_i, log_total_i, correction_i, points_i, q_i_by_feature, o_bar_i_by_feature = _block(queries, i)
        k_j, v_j, points_j = _block((k, v, key_points), j)
        weights = jnp.exp(_tile_scores(plan, q_i, k_j, points_i, points_j) - log_total_i)
        scores_bar = weights * (_product("bgmv,bgsv->bgms", o_bar_i, v_j, v.dtype) - correction_i)
        q_bar, k_bar, v_bar = gradients
        q_bar_i = _block(q_bar, i) + _product("bgms,bgsk->bgmk", scores_bar, k_j, k.dtype)
        k_bar_j = _block(k_bar, j) + _product("bgkm,bgms->bgks", q_i_by_feature, scores_bar, q.dtype)
        v_bar_j = _block(v_bar, j) + _product("bgvm,bgms->bgvs", o_bar_i_by_feature, weights, v.dtype)
        return (_set_block(q_bar, q_bar_i, i), *_set_block((k_bar, v_bar), (k_bar_j, v_bar_j), j)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, jnp.swapaxes(k, 3, 4), jnp.swapaxes(v, 3, 4)))
    (q_bar, k_bar, v_bar), _ = lax.scan(tile, zeros, tuple(plan.pairs().T))
    k_bar, v_bar = (jnp.swapaxes(x, 3, 4) for x in (k_bar, v_bar))
    return q_bar.astype(q.dtype), k_bar.astype(k.dtype), v_bar.astype(v.dtype), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


# ---- a library's kernel


def _pallas(q, k, v, cache, reset, window, *, kernel: kernels.Kernel):
    def attend(q, keys, values, query_points, key_points, window, num_old):
        attend = functools.partial(kernel.passes.attend, window=window, interpret=kernel.interpret)
        return target.by_rows(attend, q, keys, values, query_points.documents)

    return _parallel_over_queries(attend, q, k, v, cache, reset, window)


_FORMS = {
    "recurrent": _recurrent,
    "associative": "softmax does not split into a scan of this form: use recurrent, parallel or chunked",
    "parallel": _parallel,
    "chunked": _chunked,
}
