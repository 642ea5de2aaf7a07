"""Causal softmax attention over a ring of keys and values: every form of it.

    o_t = sum_s softmax_s(q_t . k_s) v_s,   s in t's document, t - window < s <= t          (arXiv 1706.03762, eq. 1)

Query head h reads key/value head h // (H / G) (grouped queries, arXiv 2305.13245). ``q`` arrives scaled and rotated.

| implementation | what it is |
|---|---|
| recurrent | one query at a time: write its key and value into the ring, then attend to what the ring holds |
| associative | raises: softmax does not split into a scan of this form |
| parallel | the softmax of the whole T x T matrix of scores |

Scores, softmax and sums are float32 whatever the inputs are, and float32 inputs are multiplied as float32 on every device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops import documents

# Position of a key that no query may see: an empty slot of the ring, or padding.
NOWHERE = np.iinfo(np.int32).max


class Cache(NamedTuple):
    """A ring of the newest S keys and values. Slots without a live token hold zeros."""

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G V"]
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
    """The empty ring: ``capacity`` tokens, or ``window`` where that is fewer, since nothing older is ever read."""
    size = capacity if window is None else min(capacity, window)
    return Cache(
        keys=jnp.zeros((batch_size, size, num_kv_heads, key_dim), dtype),
        values=jnp.zeros((batch_size, size, num_kv_heads, value_dim), dtype),
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
    """Causal softmax attention to the cache and to the new tokens.

    Args:
      q: queries, already scaled (nothing is scaled here) and rotated; H is a multiple of G.
      k: keys, already rotated.
      v: values; V may differ from K.
      cache: what was read before; None is an empty ring of capacity T (or ``window``) and costs nothing to read.
      reset: marks the steps at which a new document starts; attention never crosses a start, and a NaN or an infinity in
        one document changes no other.
      window: a query sees the keys of the last ``window`` steps, its own among them; None sees everything.
      implementation: a row of the table above; None picks the fastest form for the device and the shape.

    Returns:
      ``(o, cache)``, ``o`` in q's dtype. The returned ring has the structure, shapes and dtypes of the given one. More live
      tokens than the ring holds (with a window: than the window holds) push the oldest out; counting them is the caller's.

    Raises:
      ValueError: shapes that do not fit, a window below 1, an unknown implementation.
      NotImplementedError: the named implementation cannot do this; the message says what is missing.
    """
    _check(q, k, v, cache, reset, window)
    if implementation is None:
        implementation = _fastest(q, k, v, cache, reset)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}")
    if cache is not None:
        k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
    return _IMPLEMENTATIONS[implementation](q, k, v, cache, reset, window)


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
    if cache is not None and (cache.keys.shape[2:], cache.values.shape[2:]) != (k.shape[2:], v.shape[2:]):
        raise ValueError(f"a cache of {cache.keys.shape}, {cache.values.shape} does not fit k {k.shape}, v {v.shape}")


def _fastest(q, k, v, cache, reset) -> str:
    if cache is not None and q.shape[1] == 1:
        return "recurrent"
    return "parallel"


# ---- the ring


def _ages(cache: Cache) -> Int[Array, "B S"]:
    """How many tokens were written after the one in each slot: 0 for the newest, whether or not it is live."""
    capacity = cache.keys.shape[1]
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.mod(cache.cursor[:, None] - 1 - slots[None, :], capacity)


def _write(cache: Cache, k, v, reset) -> Cache:
    """The ring after T more tokens. Slots whose document has ended are zeroed, so that no NaN of theirs is ever multiplied."""
    B, T = k.shape[:2]
    capacity = cache.keys.shape[1]
    newest = min(T, capacity)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    slots = jnp.mod(cache.cursor[:, None] + jnp.arange(T - newest, T, dtype=jnp.int32)[None, :], capacity)
    keys = cache.keys.at[rows, slots].set(k[:, T - newest :], unique_indices=True)
    values = cache.values.at[rows, slots].set(v[:, T - newest :], unique_indices=True)
    cursor = jnp.mod(cache.cursor + T, capacity)
    live = jnp.minimum(_live_after(reset, T, cache.live), capacity)
    cache = Cache(keys, values, cursor, live)
    return cache if reset is None else _clear_dead(cache)


def _live_after(reset, num_steps: int, live: Int[Array, "B"]) -> Int[Array, "B"]:
    if reset is None:
        return live + num_steps
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    start = jnp.max(jnp.where(reset, steps[None, :], -1), axis=1)
    return jnp.where(start >= 0, num_steps - start, live + num_steps)


def _clear_dead(cache: Cache) -> Cache:
    dead = (_ages(cache) >= cache.live[:, None])[:, :, None, None]
    return cache._replace(
        keys=jnp.where(dead, jnp.zeros((), cache.keys.dtype), cache.keys),
        values=jnp.where(dead, jnp.zeros((), cache.values.dtype), cache.values),
    )


def _fresh(k, v, reset, window) -> Cache:
    """The ring after T tokens and nothing before them: the keys and values as they are, no slot left over."""
    B, T = k.shape[:2]
    capacity = T if window is None else min(T, window)
    none = jnp.zeros((B,), jnp.int32)
    live = jnp.minimum(_live_after(reset, T, none), capacity)
    cache = Cache(k[:, T - capacity :], v[:, T - capacity :], cursor=none, live=live)
    return cache if reset is None else _clear_dead(cache)


# ---- one query at a time


def _recurrent(q, k, v, cache, reset, window):
    B, T = q.shape[:2]
    if cache is None:
        cache = init_cache(B, T, k.shape[2], k.shape[3], v.shape[3], window=window, dtype=k.dtype)
    if T == 1:
        return _one_step(q, k, v, cache, reset, window)

    def step(cache, inputs):
        q, k, v, reset = (None if x is None else x[:, None] for x in inputs)
        o, cache = _one_step(q, k, v, cache, reset, window)
        return cache, o[:, 0]

    inputs = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (q, k, v, reset))
    cache, o = lax.scan(step, cache, inputs)
    return jnp.moveaxis(o, 0, 1), cache


def _one_step(q, k, v, cache, reset, window):
    """T = 1. The ring is written in place before it is read: what the write overwrites no later query may see."""
    cache = _write(cache, k, v, reset)
    reach = cache.live if window is None else jnp.minimum(cache.live, window)
    visible = (_ages(cache) < reach[:, None])[:, None, :]
    return _softmax_attention(q, cache.keys, cache.values, visible), cache


def _softmax_attention(q, k, v, visible: Bool[Array, "#B T S"]) -> Float[Array, "B T H V"]:
    """The textbook form, in float32: every query against every key it is given."""
    B, T, H, _ = q.shape
    q, k, v = _by_head(q, k, v, dtype=jnp.float32)
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, precision=lax.Precision.HIGHEST)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    o = jnp.einsum("bgrts,bgsv->bgrtv", weights, v, precision=lax.Precision.HIGHEST)
    return _by_time(o).astype(q.dtype)


# ---- all queries at once: what they may see, and how a NaN stays in its document


class Places(NamedTuple):
    """Where queries and keys stand in time; who sees whom follows from it. A leading 1 means: alike in every row."""

    query_steps: Int[Array, "#B T"]
    key_steps: Int[Array, "#B S"]  # negative in the cache, NOWHERE in an empty slot
    query_ids: Int[Array, "B T"] | None  # documents; None: one document, marked by no reset
    key_ids: Int[Array, "B S"] | None


def _visible(places: Places, window: int | None) -> Bool[Array, "#B T S"]:
    distance = places.query_steps[:, :, None] - places.key_steps[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if places.query_ids is not None:
        visible &= documents.same_document(places.query_ids, places.key_ids)
    return visible


def _together(attend, q, k, v, cache, reset, window):
    """Runs ``attend(q, keys, values, places, window, num_old)`` on [old ring | new keys], and writes the ring."""
    steps = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    places = Places(steps, steps, None, None)
    keys, values, num_old = k, v, 0
    if cache is not None:
        num_old = cache.keys.shape[1]
        ages = _ages(cache)
        old_steps = jnp.where(ages < cache.live[:, None], -1 - ages, NOWHERE)
        new_steps = jnp.broadcast_to(steps, (q.shape[0], q.shape[1]))
        places = places._replace(key_steps=jnp.concatenate([old_steps, new_steps], axis=1))
        keys, values = jnp.concatenate([cache.keys, k], axis=1), jnp.concatenate([cache.values, v], axis=1)
    spoiled = None
    if reset is not None:
        ids = documents.segment_ids(reset)
        old_ids = jnp.zeros((q.shape[0], num_old), jnp.int32)
        places = places._replace(query_ids=ids, key_ids=jnp.concatenate([old_ids, ids], axis=1))
        q, bad_query = documents.quarantine(q)
        keys, bad_key = documents.quarantine(keys)
        values, bad_value = documents.quarantine(values)
        spoiled = bad_query | _sees_bad(bad_key | bad_value, places, reset, window, q.shape[2])
    o = attend(q, keys, values, places, window, num_old)
    new_cache = _fresh(k, v, reset, window) if cache is None else _write(cache, k, v, reset)
    return o if spoiled is None else documents.poison(o, spoiled), new_cache


def _sees_bad(bad: Bool[Array, "B S G"], places: Places, reset, window, num_heads: int) -> Bool[Array, "B T H"]:
    """Whether a query sees a bad key or value: the latest bad one of its document, if the window still reaches it."""
    num_old = bad.shape[1] - reset.shape[1]
    never = -NOWHERE
    bad_step = jnp.where(bad, places.key_steps[:, :, None], never)
    latest_old = jnp.max(bad_step[:, :num_old], axis=1, initial=never)
    latest_new = lax.cummax(bad_step[:, num_old:], axis=1)
    spoiled = documents.spread(bad[:, num_old:], reset)
    carried = (places.query_ids == 0)[:, :, None] & (latest_old > never)[:, None]
    if window is not None:
        oldest_seen = places.query_steps[:, :, None] - window + 1
        spoiled &= latest_new >= oldest_seen
        carried &= latest_old[:, None] >= oldest_seen
    return jnp.repeat(spoiled | carried, num_heads // bad.shape[2], axis=2)


def _by_head(q, k, v, dtype):
    """[B,T,H,K], [B,S,G,K], [B,S,G,V] to [B,G,R,T,K], [B,G,S,K], [B,G,S,V]: each head's matrices contiguous."""
    B, T, H, K = q.shape
    G = k.shape[2]
    q = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    return tuple(x.astype(dtype) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))


def _by_time(o: Float[Array, "B G R T V"]) -> Float[Array, "B T H V"]:
    B, G, R, T, V = o.shape
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, V)


def _parallel(q, k, v, cache, reset, window):
    def attend(q, keys, values, places, window, num_old):
        return _softmax_attention(q, keys, values, _visible(places, window))

    return _together(attend, q, k, v, cache, reset, window)


def _associative(q, k, v, cache, reset, window):
    raise NotImplementedError("softmax does not split into a scan of this form: use recurrent, parallel or chunked")


_IMPLEMENTATIONS = {
    "recurrent": _recurrent,
    "associative": _associative,
    "parallel": _parallel,
}
