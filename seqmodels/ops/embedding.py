"""The rows of a table: what a token enters a model as."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from seqmodels.ops.placement import per_shard, split_of


@per_shard({"table": "v", "tokens": "b t"}, results="b t")
def embedding(table: Float[Array, "L D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Row ``tokens[b, t]`` of the table.

    On a mesh that splits the vocabulary a device looks up the tokens whose rows it has, and the sum over devices joins them
    (arXiv 1909.08053, section 3).
    """
    vocabulary = split_of("v")
    if not vocabulary.axes:
        return jnp.take(table, tokens, axis=0)
    place = tokens - lax.axis_index(vocabulary.axes) * table.shape[0]
    here = (place >= 0) & (place < table.shape[0])
    rows = jnp.take(table, jnp.where(here, place, 0), axis=0)
    return lax.psum(jnp.where(here[:, :, None], rows, jnp.zeros((), table.dtype)), vocabulary.axes)
