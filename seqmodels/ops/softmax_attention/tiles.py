"""Long sequences: a loop over tiles of queries x keys under a running softmax (arXiv 2205.14135).

A tile that nobody sees is not in the list, so that causality and a window cost what they cover. Arrays are cut into blocks
beforehand: [number of blocks, B, G, ...]. Where time is split over devices, the running softmax goes on over the keys that arrive
from other devices (``Leg``, see ``ring.py``); on one device there are none.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops.softmax_attention.products import (
    NOWHERE,
    Points,
    bias,
    features_first,
    largest,
    product,
    sees,
    split_group,
    stack_group,
)


class Tiles(NamedTuple):
    num_steps: int
    num_queries: int  # of a tile
    num_keys: int
    num_old: int  # keys of the cache, which come before the new ones
    window: int | None

    @property
    def old_blocks(self) -> int:
        return -(-self.num_old // self.num_keys)

    def pairs(self) -> np.ndarray:
        """(query block, key block) of each tile: of each block of queries its own keys, where every query sees one, those before
        them, and then those of the cache. A million steps have millions of tiles."""
        starts = np.arange(0, self.num_steps, self.num_queries)
        oldest = starts * 0 - 1 if self.window is None else starts - self.window + 1
        first, own = np.maximum(oldest, 0) // self.num_keys, starts // self.num_keys
        new, old = own - first + 1, np.where(oldest < 0, self.old_blocks, 0)
        i = np.repeat(np.arange(len(starts)), new + old)
        place = np.arange(len(i)) - np.repeat(np.cumsum(new + old) - new - old, new + old)  # among the tiles of its queries
        j = np.where(place < new[i], self.old_blocks + own[i] - place, place - new[i])
        return np.stack([i, j], axis=1).astype(np.int32)


class Keys(NamedTuple):
    """Blocks of keys, with what comes with them."""

    k: Float[Array, "blocks B G S K"]
    v: Float[Array, "blocks B G S V"]
    points: Points  # [blocks, #B, S]


@runtime_checkable
class Leg(Protocol):
    """Keys that are not here: how they arrive, are visited, and get their gradients."""

    def forward(self, visit: Callable, running: Any, keys: Keys) -> Any:
        """``visit(running, pairs, keys) -> running`` over what arrives."""

    def backward(self, visit: Callable, d_q: Array, keys: Keys) -> tuple[Array, Array, Array]:
        """``visit(d_q, pairs, keys) -> (d_q, d_k, d_v)`` likewise; d_q, and d_k and d_v of the keys that left here."""


def in_tiles(plan: Tiles, q, k, v, query_points, key_points):
    """Softmax attention of all queries to all keys, [cache | new]."""
    queries, here = cut(plan, q, k, v, query_points, key_points)
    return join(plan, tiles(plan, (), *queries, here, ()), q.shape[2])


def cut(plan: Tiles, q, k, v, query_points, key_points) -> tuple[tuple[Array, Points], Keys]:
    """Blocks of queries and of keys. A padded query repeats the last one, so that it too sees a key."""
    query_blocks = functools.partial(_cut, size=plan.num_queries, mode="edge")
    queries = stack_group(query_blocks(q, axis=3)), jax.tree.map(lambda x: query_blocks(x, axis=1), query_points)
    return queries, cut_keys(k, v, key_points, plan.num_keys, plan.num_old)


def cut_keys(k, v, points: Points, size: int, num_old: int = 0) -> Keys:
    """Blocks of keys, those of the cache apart from the new ones."""

    def key_blocks(x, axis, empty):
        parts = jnp.split(x, [num_old], axis=axis)
        return jnp.concatenate([_cut(part, size, axis, constant_values=empty) for part in parts if part.shape[axis]])

    return Keys(key_blocks(k, 2, 0.0), key_blocks(v, 2, 0.0), jax.tree.map(lambda x: key_blocks(x, 1, NOWHERE), points))


def join(plan: Tiles, o: Float[Array, "blocks B G rows V"], group: int) -> Float[Array, "B G R T V"]:
    """The outputs of blocks of queries, without the padding."""
    o = jnp.moveaxis(split_group(o, group), 0, 3)
    return jax.lax.collapse(o, 3, 5)[:, :, :, : plan.num_steps]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiles(plan: Tiles, legs: tuple[Leg, ...], q, query_points, here: Keys, sent: tuple[Keys | None, ...]):
    """Attention of blocks of queries to the keys that are here, and to those that arrive for what each leg sends.

    Args:
      sent: by leg; None sends the new keys that are here.
    """
    return _tiles_forward(plan, legs, q, query_points, here, sent)[0]


def _tile_scores(plan: Tiles, q, k, query_points, key_points) -> Float[Array, "B G rows S"]:
    visible = sees(query_points, key_points, plan.window)
    return product("bgmk,bgsk->bgms", q, k, q.dtype) + bias(visible, q.shape[2] // plan.num_queries)


def _in_one_piece(arrays):
    """As they are. Else JAX makes the masks of all tiles, T x T, before a loop over layers, as points are alike in each of them."""
    return lax.optimization_barrier(arrays)


def _tiles_forward(plan, legs, *arrays):
    q, query_points, here, sent = _in_one_piece(arrays)

    def visit(running, pairs, keys):
        def tile(running, pair):
            i, j = pair
            (q_i, points_i), (k_j, v_j, points_j) = _block((q, query_points), i), _block(keys, j)
            top, total, o = _block(running, i)
            scores = _tile_scores(plan, q_i, k_j, points_i, points_j)
            new_top = jnp.maximum(top, largest(scores))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            new_total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            new_o = o * shrink + product("bgms,bgsv->bgmv", weights, v_j, v_j.dtype)
            return _set_block(running, (new_top, new_total, new_o), i), None

        return lax.scan(tile, running, tuple(pairs.T))[0]

    column = q.shape[:-1] + (1,)
    nothing = (
        jnp.full(column, -jnp.inf, jnp.float32),
        jnp.zeros(column, jnp.float32),
        jnp.zeros(q.shape[:-1] + here.v.shape[-1:], jnp.float32),
    )
    running = visit(nothing, plan.pairs(), here)
    for leg, keys in zip(legs, sent):
        running = leg.forward(visit, running, _new(plan, here) if keys is None else keys)
    top, total, o = running
    o = o / total
    return o, (q, query_points, here, sent, o, top + jnp.log(total))


def _tiles_backward(plan, legs, saved, d_o):
    q, query_points, here, sent, o, log_total, d_o = _in_one_piece((*saved, d_o))
    correction = jnp.sum(o * d_o, axis=-1, keepdims=True)
    by_feature = tuple(jnp.squeeze(features_first(x[:, :, :, None]), axis=4) for x in (q, d_o))
    queries = (q, d_o, log_total, correction, query_points, *by_feature)

    def visit(d_q, pairs, keys):
        def tile(gradients, pair):
            i, j = pair
            q_i, d_o_i, log_total_i, correction_i, points_i, q_i_by_feature, d_o_i_by_feature = _block(queries, i)
            k_j, v_j, points_j = _block(keys, j)
            weights = jnp.exp(_tile_scores(plan, q_i, k_j, points_i, points_j) - log_total_i)
            d_scores = weights * (product("bgmv,bgsv->bgms", d_o_i, v_j, v_j.dtype) - correction_i)
            d_q, d_k, d_v = gradients
            d_q_i = _block(d_q, i) + product("bgms,bgsk->bgmk", d_scores, k_j, k_j.dtype)
            d_k_j = _block(d_k, j) + product("bgkm,bgms->bgks", q_i_by_feature, d_scores, q.dtype)
            d_v_j = _block(d_v, j) + product("bgvm,bgms->bgvs", d_o_i_by_feature, weights, v_j.dtype)
            return (_set_block(d_q, d_q_i, i), *_set_block((d_k, d_v), (d_k_j, d_v_j), j)), None

        zeros = (jnp.zeros(jnp.swapaxes(x, 3, 4).shape, jnp.float32) for x in (keys.k, keys.v))
        d_q, *by_feature = lax.scan(tile, (d_q, *zeros), tuple(pairs.T))[0]
        return d_q, *(jnp.swapaxes(x, 3, 4) for x in by_feature)

    def in_dtype(d_keys, keys):
        return Keys(d_keys[0].astype(keys.k.dtype), d_keys[1].astype(keys.v.dtype), None)

    d_q, *d_here = visit(jnp.zeros(q.shape, jnp.float32), plan.pairs(), here)
    d_sent = []
    for leg, keys in zip(legs, sent):
        d_q, *d_keys = leg.backward(visit, d_q, _new(plan, here) if keys is None else keys)
        if keys is None:
            d_here = [x.at[plan.old_blocks :].add(more) for x, more in zip(d_here, d_keys)]
        d_sent.append(None if keys is None else in_dtype(d_keys, keys))
    return d_q.astype(q.dtype), None, in_dtype(d_here, here), tuple(d_sent)


def _new(plan: Tiles, here: Keys) -> Keys:
    return jax.tree.map(lambda x: x[plan.old_blocks :], here)


tiles.defvjp(_tiles_forward, _tiles_backward)
