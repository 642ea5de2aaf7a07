"""Initial values of parameters, in float32."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normal_init(key: Array, shape: tuple[int, ...], stddev: float | None = None) -> Float[Array, "..."]:
    """Normal initialisation in float32; ``stddev=None`` means 1/sqrt(fan in), fan in = ``shape[-2]``."""
    stddev = shape[-2] ** -0.5 if stddev is None else stddev
    return stddev * jax.random.normal(key, shape, jnp.float32)


def xavier_uniform_init(key: Array, shape: tuple[int, int], *, gain: float = 1.0) -> Float[Array, "i o"]:
    """Uniform in +-gain sqrt(6 / (fan in + fan out)), float32 (Glorot and Bengio 2010, eq. 16, which has gain 1)."""
    bound = gain * (6.0 / sum(shape)) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def fan_in_uniform_init(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in +-1/sqrt(fan in), fan in = ``shape[-2]``, float32: torch's default for linear and depthwise layers."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def step_size_bias_init(
    key: Array, shape: tuple[int, ...], *, smallest: float = 1e-3, largest: float = 0.1
) -> Float[Array, "..."]:
    """Biases b for which softplus(b) is log-uniform in [smallest, largest] (arXiv 2312.00752, section 3.6), float32."""
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(smallest), math.log(largest)))
    return dt + jnp.log(-jnp.expm1(-dt))
