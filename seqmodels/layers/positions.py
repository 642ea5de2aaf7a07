"""Absolute positions."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def sinusoids(length: int, d_model: int, *, base: float = 10000.0) -> Float[Array, "T D"]:
    """Positions 0..T-1 as sines (even features) and cosines (odd) of wavelengths 2 pi .. 2 pi base (arXiv 1706.03762, 3.5)."""
    frequencies = base ** (-jnp.arange(0, d_model, 2) / d_model)
    angles = jnp.arange(length)[:, None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, -1)[:, :d_model]
