"""Short sequences: a few blocks of queries, each against all the keys it can see, in one softmax."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.ops.softmax_attention.products import bias, features_first, largest, product, sees, split_group, stack_group


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


def _row_scores(plan: Rows, q, k, query_points, key_points, queries, keys) -> Float[Array, "B G rows S"]:
    query_points = jax.tree.map(lambda x: x[:, queries], query_points)
    key_points = jax.tree.map(lambda x: x[:, keys], key_points)
    scores = product("bgmk,bgsk->bgms", stack_group(q[:, :, :, queries]), k[:, :, keys], q.dtype)
    return scores + bias(sees(query_points, key_points, plan.window), q.shape[2])


def _rows_forward(plan, q, k, v, query_points, key_points):
    blocks, log_totals = [], []
    for queries, keys in plan.spans(q.shape[3]):
        scores = _row_scores(plan, q, k, query_points, key_points, queries, keys)
        top = largest(scores)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = product("bgms,bgsv->bgmv", weights, v[:, :, keys], v.dtype) / total
        blocks.append(split_group(o, q.shape[2]))
        log_totals.append(top + jnp.log(total))
    o = jnp.concatenate(blocks, axis=3)
    return o, (q, k, v, query_points, key_points, o, tuple(log_totals))


def _rows_backward(plan, saved, d_o):
    # The weights are not saved: computing them anew beats writing and reading them.
    q, k, v, query_points, key_points, o, log_totals = saved
    S = k.shape[2]
    correction = jnp.sum(o * d_o, axis=-1, keepdims=True)
    q_by_feature, d_o_by_feature = features_first(q), features_first(d_o)
    d_q_blocks, d_k, d_v = [], 0.0, 0.0
    for (queries, keys), log_total in zip(plan.spans(q.shape[3]), log_totals):
        weights = jnp.exp(_row_scores(plan, q, k, query_points, key_points, queries, keys) - log_total)
        d_o_block = stack_group(d_o[:, :, :, queries])
        d_weights = product("bgmv,bgsv->bgms", d_o_block, v[:, :, keys], v.dtype)
        d_scores = weights * (d_weights - stack_group(correction[:, :, :, queries]))
        d_q_blocks.append(split_group(product("bgms,bgsk->bgmk", d_scores, k[:, :, keys], k.dtype), q.shape[2]))
        unseen = ((0, 0), (0, 0), (0, 0), (keys.start, S - keys.stop))
        q_block, d_o_block = (jax.lax.collapse(x[..., queries], 3) for x in (q_by_feature, d_o_by_feature))
        d_k += jnp.pad(product("bgkm,bgms->bgks", q_block, d_scores, q.dtype), unseen)
        d_v += jnp.pad(product("bgvm,bgms->bgvs", d_o_block, weights, v.dtype), unseen)
    d_q = jnp.concatenate(d_q_blocks, axis=3).astype(q.dtype)
    d_k, d_v = (jnp.swapaxes(x, 2, 3) for x in (d_k, d_v))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


rows.defvjp(_rows_forward, _rows_backward)
