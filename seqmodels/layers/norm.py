"""Norms over features, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"] | None = None, *, eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32 (arXiv 1910.07467, eq. 4)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def l2_norm(x: Float[Array, "... K"], *, eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps): length 1, or a little less for short x; in float32, returned in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "... D"],
    gate: Float[Array, "... D"],
    scale: Float[Array, " D"] | None = None,
    *,
    eps: float,
    num_groups: int = 1,
) -> Float[Array, "... D"]:
    """RMSNorm of x * silu(gate), the mean taken over each of ``num_groups`` groups of neighbouring features.

    Mamba-2 gates before it normalises (arXiv 2405.21060, section 7.1); who gates after it writes ``silu(gate) *
    rms_norm(x)``. Computed in float32, returned in the dtype of ``x``.

    Raises:
      ValueError: the groups do not divide the features.
    """
    if x.shape[-1] % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the features of x {list(x.shape)}")
    wide = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
    if num_groups > 1:  # one group keeps its shape: an axis of 1 costs XLA's CPU compiler a copy, and half the speed
        grouped = wide.reshape(*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
        wide = rms_norm(grouped, eps=eps).reshape(x.shape)
    else:
        wide = rms_norm(wide, eps=eps)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis with a learned scale, initialised to 1."""

    def __init__(self, dim: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], eps=self.eps)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis with a learned scale and bias, initialised to 1 and 0 (arXiv 1607.06450, eq. 4)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = rms_norm(wide - jnp.mean(wide, axis=-1, keepdims=True), self.scale[...], eps=self.eps)
        return (wide + self.bias[...]).astype(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
