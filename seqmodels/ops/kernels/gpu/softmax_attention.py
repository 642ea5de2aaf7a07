"""Softmax attention on an NVIDIA GPU: cuDNN's, through ``jax.nn.dot_product_attention``.

cuDNN is loaded with the GPU: without one, this can be neither run nor compiled.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.ops import target
from seqmodels.ops.placement import split_of


def unsupported_reason(q, k, v, cache, reset, window) -> str | None:
    """What keeps a call of ``softmax_attention`` from this kernel; None if nothing does."""
    if target.interpreting() or "cuda" not in jax.devices()[0].client.platform_version:
        return "cuDNN's attention needs an NVIDIA GPU at hand, also to be compiled"
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f"cuDNN's attention takes bfloat16 or float16 alike, not {q.dtype}, {k.dtype}, {v.dtype}"
    if split_of("t").axes:
        return "cuDNN's attention sees no keys of other devices (mesh.sequence)"
    if cache is not None:
        return "cuDNN's attention reads no KV cache (cache)"
    if reset is not None:
        return "cuDNN's attention knows no documents (reset)"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN's attention needs K = V, a multiple of 8 up to 128, not K={q.shape[-1]}, V={v.shape[-1]}"
    return None


def attend(
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T V"],
    documents: None,
    window: int | None,
    *,
    interpret: bool,
) -> Float[Array, "B G R T V"]:
    """Causal attention over the last ``window`` steps. ``q`` arrives scaled."""
    B, G, R, T, K = q.shape
    # The library's window counts the steps before the query.
    before = None if window is None else (window - 1, 0)
    # To the library's layout, [B, T, heads, K]: XLA drops these transpositions and the caller's.
    q, k, v = (jnp.moveaxis(x, -2, 1) for x in (q, k, v))
    o = jax.nn.dot_product_attention(
        q.reshape(B, T, G * R, K), k, v, scale=1.0, is_causal=True, local_window_size=before, implementation="cudnn"
    )
    return jnp.moveaxis(o.reshape(B, T, G, R, K), 1, -2)
