"""Short sequences: a few blocks of queries, each against all the keys it can see, in one softmax."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.ops.softmax_attention.products import bias, features_first, product, sees, split_group, stack_group


class Rows(NamedTuple):
    block: int  # queries
    num_old: int  # keys of the cache, which come before the new ones
    window: int | None

    def spans(self, num_steps: int) -> list[tuple[slice, slice]]:
        """The queries of each block, and the keys that they can see. The cache is in no order: all of it, or none."""
        spans = []
        for start in range(0, num_steps, self.block):
            stop = min(start + self.block, num_steps)
            oldest = -1 if self.window is None else start - self.window + 1
            first = 0 if oldest < 0 else self.num_old + oldest
            spans.append((slice(start, stop), slice(first, self.num_old + stop)))
        return spans


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rows(plan: Rows, q, k, v, query_points, key_points):
    return _rows_forward(plan, q, k, v, query_points, key_points)[0]


def _row_weights(plan: Rows, q, k, query_points, key_points, queries, keys) -> Float[Array, "B G rows S"]:
    query_points = jax.tree.map(lambda x: x[:, queries], query_points)
    key_points = jax.tree.map(lambda x: x[:, keys], key_points)
    scores = product("bgmk,bgsk->bgms", stack_group(q[:, :, :, queries]), k[:, :, keys], q.dtype)
    return jax.nn.softmax(scores + bias(sees(query_points, key_points, plan.window), q.shape[2]), axis=-1)


def _rows_forward(plan, q, k, v, query_points, key_points):
    blocks = []
    for queries, keys in plan.spans(q.shape[3]):
        weights = _row_weights(plan, q, k, query_points, key_points, queries, keys)
        blocks.append(split_group(product("bgms,bgsv->bgmv", weights, v[:, :, keys], v.dtype), q.shape[2]))
    return jnp.concatenate(blocks, axis=3), (q, k, v, query_points, key_points)


def _rows_backward(plan, saved, o_bar):
    # Only the inputs are saved: at these lengths computing the weights anew beats writing and reading them.
    q, k, v, query_points, key_points = saved
    S = k.shape[2]
    q_by_feature, o_bar_by_feature = features_first(q), features_first(o_bar)
    q_bars, k_bar, v_bar = [], 0.0, 0.0
    for queries, keys in plan.spans(q.shape[3]):
        weights = _row_weights(plan, q, k, query_points, key_points, queries, keys)
        o_block_bar = stack_group(o_bar[:, :, :, queries])
        weights_bar = product("bgmv,bgsv->bgms", o_block_bar, v[:, :, keys], v.dtype)
        scores_bar = weights * (weights_bar - jnp.sum(weights * weights_bar, axis=-1, keepdims=True))
        q_bars.append(split_group(product("bgms,bgsk->bgmk", scores_bar, k[:, :, keys], k.dtype), q.shape[2]))
        unseen = ((0, 0), (0, 0), (0, 0), (keys.start, S - keys.stop))
        q_block, o_block_bar = (x[..., queries].reshape(*x.shape[:3], -1) for x in (q_by_feature, o_bar_by_feature))
        k_bar += jnp.pad(product("bgkm,bgms->bgks", q_block, scores_bar, q.dtype), unseen)
        v_bar += jnp.pad(product("bgvm,bgms->bgvs", o_block_bar, weights, v.dtype), unseen)
    q_bar = jnp.concatenate(q_bars, axis=3).astype(q.dtype)
    k_bar, v_bar = (jnp.swapaxes(x, 2, 3) for x in (k_bar, v_bar))
    return q_bar, k_bar.astype(k.dtype), v_bar.astype(v.dtype), None, None


rows.defvjp(_rows_forward, _rows_backward)
