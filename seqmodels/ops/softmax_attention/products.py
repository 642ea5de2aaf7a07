"""What the forms of softmax attention share: who sees whom, arrays by head, and products of blocks.

Products run by head, [B, G, R, T, K] and [B, G, S, K]: the matrices of a head contiguous, R queries to a key. Those of blocks contract
the last axis of their left side, because only those go to the CPU's fast kernel (16 times [256, 256] x [256, 32]: 0.8 ms of CPU
time against 2.5 to 6); gradients of keys and values come out transposed.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops import documents, target

# The time of a key that no query may see: an empty slot of the cache, or padding.
NOWHERE = int(np.iinfo(np.int32).max)
_FEW = 16  # numbers, as many as a vector register holds


class Points(NamedTuple):
    """Where tokens stand. A leading axis of 1 means: alike in every row of the batch."""

    steps: Int[Array, "#B T"]  # time; negative in the cache, NOWHERE where there is no token
    documents: Int[Array, "B T"] | None  # None: no reset was given


def sees(queries: Points, keys: Points, window: int | None) -> Bool[Array, "#B T S"]:
    """Whether each query sees each key: causal, within ``window`` steps and the query's document."""
    distance = queries.steps[:, :, None] - keys.steps[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if queries.documents is not None:
        visible &= documents.same_document(queries.documents, keys.documents)
    return visible


def by_head(q: Float[Array, "B T H K"], num_kv_heads: int) -> Float[Array, "B G R T K"]:
    B, T, H, K = q.shape
    return q.reshape(B, T, num_kv_heads, H // num_kv_heads, K).transpose(0, 2, 3, 1, 4)


def by_kv_head(x: Float[Array, "B T G X"]) -> Float[Array, "B G T X"]:
    return x.transpose(0, 2, 1, 3)


def by_time(o: Float[Array, "B G R T V"]) -> Float[Array, "B T H V"]:
    B, G, R, T, V = o.shape
    return o.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, V)


def product_dtype(dtype):
    """Narrow operands pay off on matrix units; a CPU has none and would widen them at every product."""
    return jnp.float32 if target.device() == "cpu" else dtype


def product(subscripts: str, a, b, dtype) -> Float[Array, "..."]:
    """An einsum of operands in ``dtype``, summed in float32; float32 operands are not rounded on the way in."""
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def bias(visible: Bool[Array, "#B T S"], group: int) -> Float[Array, "#B 1 rows S"]:
    """0 where a query sees a key, minus infinity elsewhere; the queries of a group one under the other.

    Added, not selected: a sum is part of the loop over scores that follows.
    """
    bias = jnp.where(visible, 0.0, -jnp.inf).astype(jnp.float32)
    return jnp.tile(bias, (1, group, 1))[:, None]


def largest(scores: Float[Array, "*n S"]) -> Float[Array, "*n 1"]:
    """The largest score of each row; NaN where there is one.

    On a CPU XLA finds the maximum of neighbouring numbers one by one; of halves it takes 0.9 ms instead of 5.9 (4 million numbers).
    """
    while target.device() == "cpu" and scores.shape[-1] > _FEW:
        half = -(-scores.shape[-1] // 2)  # of an odd number the halves share one
        scores = jnp.maximum(scores[..., :half], scores[..., -half:])
    return jnp.max(scores, axis=-1, keepdims=True)


def stack_group(x: Float[Array, "*n R T X"]) -> Float[Array, "*n rows X"]:
    """The queries of a group of heads one under the other, M = R T: they meet the same keys in one product."""
    *lead, R, T, X = x.shape
    return x.reshape(*lead, R * T, X)


def split_group(x: Float[Array, "*n rows X"], group: int) -> Float[Array, "*n R T X"]:
    *lead, M, X = x.shape
    return x.reshape(*lead, group, M // group, X)


def features_first(x: Float[Array, "*n R T X"]) -> Float[Array, "*n X R T"]:
    """A transposed copy. XLA would fold it into the product, and give the product to a slower kernel on a CPU."""
    return lax.optimization_barrier(jnp.moveaxis(x, -1, -3))
