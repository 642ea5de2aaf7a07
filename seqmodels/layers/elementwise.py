"""Elementwise functions of the residual stream and of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap tanh(logits / cap), which stays within +-cap; None: the logits as they are (arXiv 2408.00118, section 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def dropout(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Inverted dropout; the identity when ``rate`` is 0 or no key is given (evaluation)."""
    if rate == 0.0 or key is None:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))
