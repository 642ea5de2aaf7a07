"""Long sequences: a loop over tiles of queries x keys under a running softmax (arXiv 2205.14135).

A tile that nobody sees is not in the list, so that causality and a window cost what they cover. Arrays are cut into blocks
beforehand: [number of blocks, B, G, ...].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops.softmax_attention.products import (
    NOWHERE,
    bias,
    features_first,
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


def in_tiles(plan: Tiles, q, k, v, query_points, key_points):
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
        stack_group(query_blocks(q, axis=3)),
        key_blocks(k, 2, 0.0),
        key_blocks(v, 2, 0.0),
        query_points,
        key_points,
    )
    o = jnp.moveaxis(split_group(o, q.shape[2]), 0, 3)
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


def _tile_scores(plan: Tiles, q, k, query_points, key_points) -> Float[Array, "B G rows S"]:
    visible = sees(query_points, key_points, plan.window)
    return product("bgmk,bgsk->bgms", q, k, q.dtype) + bias(visible, q.shape[2] // plan.num_queries)


def _tiles_forward(plan, q, k, v, query_points, key_points):
    def tile(running, pair):
        i, j = pair
        (q_i, points_i), (k_j, v_j, points_j) = _block((q, query_points), i), _block((k, v, key_points), j)
        top, total, o = _block(running, i)
        scores = _tile_scores(plan, q_i, k_j, points_i, points_j)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        new_total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        new_o = o * shrink + product("bgms,bgsv->bgmv", weights, v_j, v.dtype)
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
    by_feature = tuple(jnp.squeeze(features_first(x[:, :, :, None]), axis=4) for x in (q, o_bar))
    queries = (q, o_bar, log_total, correction, query_points, *by_feature)

    def tile(gradients, pair):
        i, j = pair
        q_i, o_bar_i, log_total_i, correction_i, points_i, q_i_by_feature, o_bar_i_by_feature = _block(queries, i)
        k_j, v_j, points_j = _block((k, v, key_points), j)
        weights = jnp.exp(_tile_scores(plan, q_i, k_j, points_i, points_j) - log_total_i)
        scores_bar = weights * (product("bgmv,bgsv->bgms", o_bar_i, v_j, v.dtype) - correction_i)
        q_bar, k_bar, v_bar = gradients
        q_bar_i = _block(q_bar, i) + product("bgms,bgsk->bgmk", scores_bar, k_j, k.dtype)
        k_bar_j = _block(k_bar, j) + product("bgkm,bgms->bgks", q_i_by_feature, scores_bar, q.dtype)
        v_bar_j = _block(v_bar, j) + product("bgvm,bgms->bgvs", o_bar_i_by_feature, weights, v.dtype)
        return (_set_block(q_bar, q_bar_i, i), *_set_block((k_bar, v_bar), (k_bar_j, v_bar_j), j)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, jnp.swapaxes(k, 3, 4), jnp.swapaxes(v, 3, 4)))
    (q_bar, k_bar, v_bar), _ = lax.scan(tile, zeros, tuple(plan.pairs().T))
    k_bar, v_bar = (jnp.swapaxes(x, 3, 4) for x in (k_bar, v_bar))
    return q_bar.astype(q.dtype), k_bar.astype(k.dtype), v_bar.astype(v.dtype), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)
