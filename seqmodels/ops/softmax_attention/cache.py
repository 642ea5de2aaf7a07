"""The circular KV cache: the newest S keys and values of every row."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqmodels.ops import sequence_parallel
from seqmodels.ops.softmax_attention.products import by_kv_head


class Cache(NamedTuple):
    """A circular buffer of the newest S keys and values. A slot without a live token holds zeros, or a masked token."""

    keys: Float[Array, "B G S K"]  # by head, as the products want them: a step must not transpose the cache
    values: Float[Array, "B G S V"]
    cursor: Int[Array, " B"]  # the slot that the next token takes
    live: Int[Array, " B"]  # how many of the newest tokens still count; a document start sets it to 0


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
    """The empty cache: ``capacity`` tokens, or ``window`` where that is fewer, as nothing older is ever seen.

    Raises:
      ValueError: it would hold no token.
    """
    if capacity < 1:
        raise ValueError(f"a cache of {capacity} tokens holds none: its capacity (max_len of a state) must be at least 1")
    size = capacity if window is None else min(capacity, window)
    return Cache(
        keys=jnp.zeros((batch_size, num_kv_heads, size, key_dim), dtype),
        values=jnp.zeros((batch_size, num_kv_heads, size, value_dim), dtype),
        cursor=jnp.zeros((batch_size,), jnp.int32),
        live=jnp.zeros((batch_size,), jnp.int32),
    )


def slot_ages(cache: Cache) -> Int[Array, "B S"]:
    """How many tokens were written after the one in each slot: 0 for the newest, whether or not it is live."""
    capacity = cache.keys.shape[2]
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.mod(cache.cursor[:, None] - 1 - slots[None, :], capacity)


def write(cache: Cache, k, v, reset) -> Cache:
    """The cache after T more tokens, of all devices where time is split."""
    B, T = k.shape[0], k.shape[1] * sequence_parallel.num_devices()
    capacity = cache.keys.shape[2]
    first = max(T - capacity, 0)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    slots = jnp.mod(cache.cursor[:, None] + jnp.arange(first, T, dtype=jnp.int32)[None, :], capacity)
    keys, values = (sequence_parallel.last_steps(x, T - first) for x in (k, v))
    written = Cache(
        keys=cache.keys.at[rows, :, slots].set(keys, unique_indices=True),
        values=cache.values.at[rows, :, slots].set(values, unique_indices=True),
        cursor=jnp.mod(cache.cursor + T, capacity),
        live=jnp.minimum(_live_after(reset, k.shape[1], cache.live), capacity),
    )
    return written if reset is None else _clear_dead(written)


def fresh(k, v, reset, window) -> Cache:
    """The cache after T tokens, of all devices, and nothing before them: keys and values as they are, no slot left over."""
    T = k.shape[1] * sequence_parallel.num_devices()
    capacity = T if window is None else min(T, window)
    zero = jnp.zeros((k.shape[0],), jnp.int32)
    live = jnp.minimum(_live_after(reset, k.shape[1], zero), capacity)
    full = Cache(*(by_kv_head(sequence_parallel.last_steps(x, capacity)) for x in (k, v)), cursor=zero, live=live)
    return full if reset is None else _clear_dead(full)


def _live_after(reset, num_steps: int, live: Int[Array, " B"]) -> Int[Array, " B"]:
    if reset is None:
        return live + num_steps * sequence_parallel.num_devices()
    live = sequence_parallel.steps_since_start(reset, live, num_steps)
    latest_start = jnp.max(jnp.where(reset, jnp.arange(num_steps, dtype=jnp.int32)[None, :], -1), axis=1)
    return sequence_parallel.from_last_device(jnp.where(latest_start >= 0, num_steps - latest_start, live + num_steps))


def _clear_dead(cache: Cache) -> Cache:
    """Zeros the tokens of ended documents: a NaN among them would survive a weight of zero."""
    dead = (slot_ages(cache) >= cache.live[:, None])[:, None, :, None]
    return cache._replace(
        keys=jnp.where(dead, jnp.zeros((), cache.keys.dtype), cache.keys),
        values=jnp.where(dead, jnp.zeros((), cache.values.dtype), cache.values),
    )
