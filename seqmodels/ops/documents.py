"""Documents packed in one row: masks between them, and NaN isolation.

``reset[b, t]`` (bool) says that a new document starts at step ``t`` of row ``b``: everything an operation carries from
step ``t - 1`` to step ``t`` is dropped. Two things follow, and every op takes both from here.

*Masks.* ``segment_ids`` numbers the documents of a row; 0 is the one that continues the incoming state.

*NaN isolation.* An operation that multiplies a masked weight of zero by another document's value spreads that document's
NaN to the whole row, since ``0 * nan`` is ``nan``. A scan that selects its carry with ``where`` is safe; a matrix product is
not. So an op built on matrix products first takes non-finite vectors out (``quarantine``), computes on the rest, and puts
NaN back (``set_nan``) exactly where the definition would have had one (``nan_reach``). Only a call with ``reset`` pays for it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def segment_ids(reset: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of the document each step belongs to: 0 continues the incoming state, then 1, 2, ... (int32)."""
    return jnp.cumsum(reset, axis=1, dtype=jnp.int32)


def same_document(query_ids: Int[Array, "B T"], key_ids: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Whether query step t and key step s lie in one document (says nothing about their order)."""
    return query_ids[:, :, None] == key_ids[:, None, :]


def quarantine(
    x: Float[Array, "*dims X"], *, allow_negative_infinity: bool = False
) -> tuple[Float[Array, "*dims X"], Bool[Array, "*dims"]]:
    """Replaces every vector that holds a non-finite number by zeros.

    Args:
      x: values; a vector is the last axis.
      allow_negative_infinity: for log decays, where minus infinity means "forget everything" and is valid.

    Returns:
      ``(clean, bad)``: ``x`` with zeros for the bad vectors (their gradient is zero), and the mark of the bad ones.
    """
    invalid = jnp.logical_not(x < jnp.inf) if allow_negative_infinity else jnp.logical_not(jnp.isfinite(x))
    bad = jnp.any(invalid, axis=-1)
    return jnp.where(bad[..., None], jnp.zeros((), x.dtype), x), bad


def nan_reach(
    bad: Bool[Array, "B T *heads"],
    reset: Bool[Array, "B T"],
    *,
    carried: Bool[Array, " B *heads"] | None = None,
) -> Bool[Array, "B T *heads"]:
    """Whether anything bad happened at or before step t within t's own document.

    Args:
      bad: where a bad value enters.
      reset: starts of documents.
      carried: whether the incoming state is bad, which concerns document 0 alone.
    """
    extra = bad.ndim - reset.ndim
    steps = lax.broadcasted_iota(jnp.int32, bad.shape, 1)
    per_head = reset.reshape(reset.shape + (1,) * extra)
    latest_bad = lax.cummax(jnp.where(bad, steps, -1), axis=1)
    document_start = lax.cummax(jnp.where(per_head, steps, 0), axis=1)
    tainted = latest_bad >= document_start
    if carried is not None:
        continues = (segment_ids(reset) == 0).reshape(per_head.shape)
        tainted |= continues & carried[:, None]
    return tainted


def set_nan(x: Float[Array, "*dims X"], tainted: Bool[Array, "*#dims"]) -> Float[Array, "*dims X"]:
    """Puts NaN into the marked vectors; their gradient is zero, so a bad document leaves others' gradients finite."""
    return jnp.where(tainted[..., None], jnp.asarray(jnp.nan, x.dtype), x)
