"""Softmax attention on a TPU: splash attention, the flash attention kernel that JAX carries.

``jax.experimental.pallas.ops.tpu.splash_attention``: scores and softmax tile by tile under a running maximum, forward and
backward (arXiv 2205.14135). Tiles in which no query sees a key are not visited, so that causality and a window cost what
they cover; grouped heads read their keys where they lie; documents are segment ids. Scores, softmax and sums are float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from seqmodels.ops.placement import split_of

LANES = 128  # what lengths of tiles are multiples of
MAX_TILE = 512  # queries, keys of a tile: scores of 1 MiB


def unsupported_reason(q, k, v, cache, reset, window) -> str | None:
    """What keeps a call of ``softmax_attention`` from this kernel; None if nothing does."""
    if {q.dtype, k.dtype, v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"splash attention multiplies in bfloat16, and inputs are {q.dtype}, {k.dtype}, {v.dtype}"
    if split_of("t").axes:
        return "splash attention sees no keys of other devices (mesh.sequence)"
    if cache is not None:
        return "splash attention reads no KV cache (cache)"
    return None


def attend(
    q: Float[Array, "B G R T K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T V"],
    documents: Int[Array, "B T"] | None,
    window: int | None,
    *,
    interpret: bool,
) -> Float[Array, "B G R T V"]:
    """Causal attention within documents, over the last ``window`` steps. ``q`` arrives scaled."""
    B, G, R, T, K = q.shape
    tile, padding = _tiles(T, window)
    # What is padded comes last, where no query of the sequence sees it.
    q = jnp.pad(q.reshape(B, G * R, T, K), ((0, 0), (0, 0), (0, padding), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (k, v))
    segments = None
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, padding)))
        segments = splash.SegmentIds(documents, documents)
    kernel = _kernel(G * R, T + padding, tile, window, interpret)
    o = jax.vmap(kernel)(q, k, v, segments)
    return o[:, :, :T].reshape(B, G, R, T, v.shape[-1])


def _tiles(num_steps: int, window: int | None) -> tuple[int, int]:
    """The length of a tile, and how many steps to add so that tiles fill the sequence: tiles as even as can be."""
    largest = MAX_TILE if window is None else min(MAX_TILE, _lanes(window))
    count = -(-num_steps // largest)
    tile = _lanes(-(-num_steps // count))
    return tile, count * tile - num_steps


def _lanes(length: int) -> int:
    return -(-length // LANES) * LANES


def _kernel(num_heads: int, num_steps: int, tile: int, window: int | None, interpret: bool):
    shape = (num_steps, num_steps)
    # The library's window counts the steps before the query.
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), offset=0)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        interpret=interpret,
    )
