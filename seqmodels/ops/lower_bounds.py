"""Gates that never close below a bound, and bounds that grow with depth (HGRN, arXiv 2311.04823; HGRN2, arXiv 2404.07904).

    alpha = bound + (1 - bound) sigmoid(gate_logit)                    a forget gate in (bound, 1)
    bound_l = sum over j = 1 .. l of softmax_j(P),  bound_0 = 0        P: one row per layer, softmax over the layers

Lower layers may forget everything, upper ones must remember (arXiv 2311.04823, section 3.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LowerBounds(NamedTuple):
    """What the layers of one kind share: the bounds of all, and the index of the current layer."""

    bounds: Float[Array, "layers D"]
    layer: Int[Array, ""]

    @classmethod
    def of_layers(cls, logits: Float[Array, "layers D"]) -> "LowerBounds":
        """The bounds of all layers, in order of depth, from the rows P; exactly zero in the first layer."""
        shares = jax.nn.softmax(logits.astype(jnp.float32), axis=0)
        bounds = jnp.concatenate([jnp.zeros_like(shares[:1]), jnp.cumsum(shares[1:], axis=0)])
        return cls(bounds, jnp.zeros((), jnp.int32))

    def current(self) -> Float[Array, " D"]:
        """The bound of the current layer."""
        return self.bounds[self.layer]

    def next_layer(self) -> "LowerBounds":
        """The same with the index of the next layer."""
        return self._replace(layer=self.layer + 1)


def bounded_gate(
    gate_logit: Float[Array, "... D"], bound: Float[Array, " D"]
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """The gate's logarithm and its complement, in float32.

    Neither is computed from the other, nor from alpha, which has lost both where it rounds to 0 or 1. A bound of zero
    has no logarithm and needs none.

    Args:
      gate_logit: any real numbers.
      bound: in [0, 1).

    Returns:
      ``(log alpha, 1 - alpha)``.
    """
    logit, bound = gate_logit.astype(jnp.float32), bound.astype(jnp.float32)
    log_sigmoid, log_complement = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    is_bounded = bound > 0.0
    log_bound = jnp.log(jnp.where(is_bounded, bound, 1.0))
    log_alpha = jnp.where(is_bounded, jnp.logaddexp(log_sigmoid, log_bound + log_complement), log_sigmoid)
    return log_alpha, (1.0 - bound) * jnp.exp(log_complement)
