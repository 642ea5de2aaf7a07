"""What the mixers of the delta rule read from their inputs alike (DeltaNet, Gated DeltaNet, Kimi delta attention)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.layers.dense import dense
from seqmodels.layers.norm import l2_norm
from seqmodels.ops.causal_conv import causal_conv


class DeltaInputs(NamedTuple):
    """Queries of length K^-1/2 and keys of length 1, values, and the last inputs of the convolution."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    tail: Float[Array, "B tail X"]


def delta_inputs(
    x: Float[Array, "B T D"],
    input_kernel: Float[Array, "D X"],
    conv_kernel: Float[Array, "W X"],
    *,
    tail: Float[Array, "B tail X"] | None,
    reset: Bool[Array, "B T"] | None,
    key_heads: tuple[int, int],
    value_heads: tuple[int, int],
) -> DeltaInputs:
    """silu of a short convolution of one projection, cut into queries, keys and values (arXiv 2406.06484).

    Args:
      tail: from the call before, the last W - 1 inputs of the convolution; None: a sequence begins.
      key_heads: (G, K).
      value_heads: (H, V).
    """
    key_dim = key_heads[0] * key_heads[1]
    mixed, tail = causal_conv(dense(x, input_kernel), conv_kernel, state=tail, reset=reset)
    q, k, v = jnp.split(jax.nn.silu(mixed), [key_dim, 2 * key_dim], axis=-1)
    q, k, v = (each.reshape(*x.shape[:2], *heads) for each, heads in ((q, key_heads), (k, key_heads), (v, value_heads)))
    return DeltaInputs(l2_norm(q) * key_heads[1] ** -0.5, l2_norm(k), v, tail)


def delta_beta(x: Float[Array, "B T D"], kernel: Float[Array, "D H"], allow_neg_eigval: bool) -> Float[Array, "B T H"]:
    """beta_t in float32, in (0, 1), or in (0, 2) where eigenvalues may be negative (arXiv 2411.12537)."""
    beta = jax.nn.sigmoid(dense(x, kernel).astype(jnp.float32))
    return 2.0 * beta if allow_neg_eigval else beta
