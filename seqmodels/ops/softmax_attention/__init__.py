"""Causal softmax attention to a circular KV cache, in all its forms.

    o_t = sum_s softmax_s(q_t . k_s) v_s,    s in t's document and t - window < s <= t     (arXiv 1706.03762, eq. 1)

Query head h reads key/value head h // (H / G) (grouped queries, arXiv 2305.13245). ``q`` arrives scaled and rotated.

| implementation | what it is |
|---|---|
| recurrent | one query at a time: write its key and value into the cache, then attend to what the cache holds |
| associative | raises: softmax does not split into a scan of this form |
| parallel | the softmax of the whole T x T matrix of scores |
| chunked | block by block, long sequences by tiles under a running softmax (arXiv 2205.14135); gradients recompute |
| pallas | a library's kernel: JAX's splash attention on a TPU, cuDNN's on an NVIDIA GPU (``kernels/*/softmax_attention.py``) |

Where time is split over devices, ``chunked`` passes keys and values round a ring of them (``ring.py``); the other forms raise.

Scores, softmax and sums are float32 whatever the inputs are; float32 inputs are multiplied as float32 everywhere.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.circumstances import num_cores
from seqmodels.ops import documents, kernels, sequence_parallel, target
from seqmodels.ops.dispatch import KernelForm, dispatch
from seqmodels.ops.placement import per_shard
from seqmodels.ops.softmax_attention import ring
from seqmodels.ops.softmax_attention.cache import Cache, fresh, init_cache, slot_ages, write
from seqmodels.ops.softmax_attention.products import NOWHERE, Points, by_head, by_kv_head, by_time, product_dtype, sees
from seqmodels.ops.softmax_attention.rows import Rows, rows
from seqmodels.ops.softmax_attention.tiles import Tiles, in_tiles

# At most so many blocks of queries are written out, each against all its keys; longer sequences loop over tiles.
MAX_ROWS = 4
MAX_ROW_KEYS = 2048
# Of scores at work at once on a CPU, for each core: a block of them and of their gradients stay in its second cache.
BYTES_IN_CACHE = 2**17

_CACHE_AXES = Cache(keys="b g", values="b g", cursor="b", live="b")


@per_shard(
    {"q": "b t h", "k": "b t g", "v": "b t g", "cache": _CACHE_AXES, "reset": "b t"},
    results=("b t h", _CACHE_AXES),
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
      cache: what was read before; None is an empty cache of capacity T (or ``window``) and costs nothing to read.
      reset: marks the steps at which a new document starts. Attention never crosses a start, and a NaN or an
        infinity in one document changes no other.
      window: a query sees the keys of the last ``window`` steps, its own among them; None sees everything.
      implementation: a row of the table above; None is recurrent for one step with a cache, else pallas where the device
        has the kernel for the call, else chunked.

    Returns:
      ``(o, cache)``, ``o`` in q's dtype. The cache has the structure, shapes and dtypes of the one that was given.
      Tokens that it has no room for push out the oldest; not to let live ones go is the caller's business.

    Raises:
      ValueError: shapes that do not fit, a window below 1, an unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what is missing.
    """
    _check(q, k, v, cache, reset, window)
    steps, devices = q.shape[1], sequence_parallel.num_devices()
    call = {"q": q, "k": k, "v": v, "cache": cache, "reset": reset, "window": window}
    form = dispatch(
        "softmax_attention" if devices == 1 else f"softmax_attention in a ring of {devices} devices",
        _FORMS if devices == 1 else _RING_FORMS,
        implementation, steps=steps, one_step=steps * devices == 1 and cache is not None,
        kernel_forms={"softmax_attention": KernelForm(_pallas, call)},
    )  # fmt: skip
    if cache is not None:
        k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
    return form(q, k, v, cache, reset, window)


def _check(q, k, v, cache, reset, window):
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[1] == 0 or k.shape[2] == 0:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} are not [B,T,H,K], [B,T,G,K], [B,T,G,V] with T >= 1")
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
        (cached.shape[0], cached.shape[1], cached.shape[3]) != (B, *x.shape[2:])
        for cached, x in ((cache.keys, k), (cache.values, v))
    ):
        raise ValueError(f"a cache of {cache.keys.shape}, {cache.values.shape} does not fit k {k.shape}, v {v.shape}")


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
    """T = 1. The cache is written in place before it is read: what the write overwrites, no later query may see."""
    cache = write(cache, k, v, reset)
    reach = cache.live if window is None else jnp.minimum(cache.live, window)
    visible = (slot_ages(cache) < reach[:, None])[:, None, :]
    o = _plain_attention(by_head(q, k.shape[2]), cache.keys, cache.values, visible)
    return by_time(o).astype(q.dtype), cache


def _plain_attention(q, k, v, visible: Bool[Array, "#B T S"]) -> Float[Array, "B G R T V"]:
    """The textbook form, in float32: every query against every key."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, precision=lax.Precision.HIGHEST)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bgrts,bgsv->bgrtv", weights, v, precision=lax.Precision.HIGHEST)


# ---- all queries at once: who sees whom, and how a NaN stays in its document


def _parallel_over_queries(attend, q, k, v, cache, reset, window):
    """``attend(q, keys, values, query points, key points, window, num_old)`` over [cache | new]; writes the cache."""
    (B, T), G = q.shape[:2], k.shape[2]
    new_cache = fresh(k, v, reset, window) if cache is None else write(cache, k, v, reset)
    num_old = 0 if cache is None else cache.keys.shape[2]
    steps = sequence_parallel.device_index() * T + jnp.arange(T, dtype=jnp.int32)[None, :]
    key_steps, queries, keys, values = steps, by_head(q, G), by_kv_head(k), by_kv_head(v)
    if cache is not None:
        ages = slot_ages(cache)
        old_steps = jnp.where(ages < cache.live[:, None], -1 - ages, NOWHERE)
        key_steps = jnp.concatenate([old_steps, jnp.broadcast_to(steps, (B, T))], axis=1)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in ((cache.keys, keys), (cache.values, values)))
    if reset is None:
        o = attend(queries, keys, values, Points(steps, None), Points(key_steps, None), window, num_old)
        return by_time(o).astype(q.dtype), new_cache

    ids = documents.segment_ids(reset)
    ids += sequence_parallel.state_before(jnp.zeros((B,), jnp.int32), ids[:, -1], jnp.add)[:, None]
    key_ids = jnp.concatenate([jnp.zeros((B, num_old), jnp.int32), ids], axis=1)
    query_points, key_points = Points(steps, ids), Points(key_steps, key_ids)
    queries, bad_query = documents.quarantine(queries)
    keys, bad_key = documents.quarantine(keys)
    values, bad_value = documents.quarantine(values)
    o = attend(queries, keys, values, query_points, key_points, window, num_old)
    sees_bad = _sees_bad(jnp.swapaxes(bad_key | bad_value, 1, 2), key_steps, num_old, reset, window)
    tainted = bad_query | jnp.swapaxes(sees_bad, 1, 2)[:, :, None]
    return by_time(documents.set_nan(o, tainted)).astype(q.dtype), new_cache


def _sees_bad(bad: Bool[Array, "B S G"], key_steps: Int[Array, "#B S"], num_old: int, reset, window) -> Bool[Array, "B T G"]:
    """Whether a query sees a bad key or value: the latest one of its document, if the window still reaches it."""
    never, ids = -NOWHERE, documents.segment_ids(reset)
    bad_steps = jnp.where(bad, key_steps[:, :, None], never)

    def after_a_device(summary, latest):
        cut, latest_here = summary
        return jnp.where(cut[:, None], latest_here, jnp.maximum(latest, latest_here))

    in_the_last_document = ids == ids[:, -1:]
    latest_here = jnp.max(jnp.where(in_the_last_document[:, :, None], bad_steps[:, num_old:], never), axis=1)
    latest_old = jnp.max(bad_steps[:, :num_old], axis=1, initial=never)
    cut = sequence_parallel.has_reset(reset, bad.shape[0])
    latest_old = sequence_parallel.state_before(latest_old, (cut, latest_here), after_a_device)[:, None]
    latest_new = lax.cummax(bad_steps[:, num_old:], axis=1)
    old = (ids == 0)[:, :, None] & (latest_old > never)
    new = documents.nan_reach(bad[:, num_old:], reset)
    if window is None:
        return old | new
    beyond = key_steps[:, num_old:, None] - window
    return old & (latest_old > beyond) | new & (latest_new > beyond)


def _parallel(q, k, v, cache, reset, window):
    def attend(q, keys, values, query_points, key_points, window, num_old):
        return _plain_attention(q, keys, values, sees(query_points, key_points, window))

    return _parallel_over_queries(attend, q, k, v, cache, reset, window)


# ---- block by block


def _chunked(q, k, v, cache, reset, window):
    return _parallel_over_queries(_in_blocks, q, k, v, cache, reset, window)


def _in_blocks(q, k, v, query_points, key_points, window, num_old):
    T, S = q.shape[3], k.shape[2]
    q, k, v = (x.astype(product_dtype(q.dtype)) for x in (q, k, v))
    block = _block_length(T, window)
    if sequence_parallel.num_devices() > 1:
        return ring.attend(q, k, v, query_points, key_points, window, num_old, block)
    queries = min(block, T)
    if T <= MAX_ROWS * block and S <= MAX_ROW_KEYS:
        attend, keys = functools.partial(rows, Rows(block, num_old, window)), S
    else:
        attend, keys = functools.partial(in_tiles, Tiles(T, queries, block, num_old, window)), block
    return _in_cache(attend, 4 * q.shape[2] * queries * keys, q, k, v, query_points, key_points)


def _in_cache(attend, bytes_of_scores, q, k, v, query_points, key_points):
    """``attend``, on a CPU to so few heads at a time that a block of their scores stays in the cores' caches.

    Args:
      bytes_of_scores: of one key head's block.
    """
    (B, G), at_once = k.shape[:2], max(1, BYTES_IN_CACHE * num_cores() // bytes_of_scores)
    if target.device() != "cpu" or at_once >= B * G:
        return attend(q, k, v, query_points, key_points)
    # Whole rows of the batch, or heads of one row: either lies in one piece.
    b, g = (_largest_divisor(B, at_once // G), G) if at_once >= G else (1, _largest_divisor(G, at_once))
    points, structure = jax.tree.flatten((query_points, key_points))

    def heads_apart(x):
        return x.reshape(-1, b, g, *x.shape[2:])

    def rows_apart(x):
        return jnp.repeat(x.reshape(-1, b, x.shape[1]), G // g, axis=0)

    def part(arrays):
        *qkv, own = arrays
        return attend(*qkv, *structure.unflatten(x if mine is None else mine for x, mine in zip(points, own)))

    own = [None if x.shape[0] == 1 else rows_apart(x) for x in points]
    o = lax.map(part, (heads_apart(q), heads_apart(k), heads_apart(v), own))
    return o.reshape(B, G, *o.shape[3:])


def _largest_divisor(number: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if number % n == 0)


def _block_length(num_steps: int, window: int | None) -> int:
    """Queries per block. Small blocks skip more of what lies above the diagonal, large ones are better products."""

    def power_of_two(length):
        return 2 ** math.ceil(math.log2(length))

    length = min(max(power_of_two(num_steps / MAX_ROWS), 64), 256)
    return length if window is None else min(length, max(power_of_two(window), 64))


# ---- a library's kernel


def _pallas(q, k, v, cache, reset, window, *, kernel: kernels.Kernel):
    def attend(q, keys, values, query_points, key_points, window, num_old):
        attend = functools.partial(kernel.passes.attend, window=window, interpret=kernel.interpret)
        return attend(q, keys, values, query_points.documents)

    return _parallel_over_queries(attend, q, k, v, cache, reset, window)


_FORMS = {
    "recurrent": _recurrent,
    "associative": "softmax does not split into a scan of this form: use recurrent, parallel or chunked",
    "parallel": _parallel,
    "chunked": _chunked,
}
_WHOLE = "needs all keys on one device, and mesh.sequence splits them: use implementation='chunked'"
_RING_FORMS = _FORMS | {"recurrent": f"one query at a time {_WHOLE}", "parallel": f"the whole matrix of scores {_WHOLE}"}
