"""Rotary position embedding: each pair of features turns by an angle that grows with the position.

    (x_a, x_b) -> (x_a cos - x_b sin, x_a sin + x_b cos),  angle = position * base^(-2i/K),  i = 0 .. K/2 - 1

(RoFormer, arXiv 2104.09864, eq. 34). The inner product of a rotated query and key depends on their distance alone.
Pairs are (i, i + K/2) in Llama and Hugging Face's models, (2i, 2i + 1) in the paper, RetNet and YOCO; the two differ
by a permutation of features, so weights move between them only with it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.ops import sequence_parallel, target
from seqmodels.ops.arguments import check_dtypes, shapes_of
from seqmodels.ops.placement import per_shard


@check_dtypes
def rotary(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "#B T"],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    frequencies: Float[Array, " pairs"] | None = None,
) -> Float[Array, "B T H K"]:
    """Turns the features of every head by ``positions * frequency``, in float32; the result has x's dtype.

    Args:
      x: queries or keys; K is even.
      positions: of each step within its document; a leading 1 serves every row.
      base: of the geometric row of frequencies, in radians per step: 1, base^(-2/K), base^(-4/K), ...
      interleaved: pairs are (2i, 2i + 1) instead of (i, i + K/2).
      frequencies: the K/2 angular frequencies themselves (radians per step), instead of those of ``base``.

    Raises:
      ValueError: shapes that do not fit, K is odd, or there are not K/2 frequencies.
    """
    if x.ndim != 4 or positions.ndim != 2 or positions.shape not in ((1, x.shape[1]), x.shape[:2]):
        raise ValueError(f"x must be [B, T, H, K] and positions [B, T] or [1, T]; got {shapes_of(x=x, positions=positions)}")
    num_pairs, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"rotary turns pairs of features: the width per head must be even, not {x.shape[-1]}")
    if frequencies is None:
        frequencies = base ** -(jnp.arange(num_pairs, dtype=jnp.float32) / num_pairs)
    if frequencies.shape != (num_pairs,):
        raise ValueError(f"{num_pairs} pairs of features need as many frequencies, not {frequencies.shape}")
    angle = (positions.astype(jnp.float32)[:, :, None] * frequencies)[:, :, None, :]
    cos, sin = _cos_and_sin(angle)
    wide = x.astype(jnp.float32)
    pair_axis = -1 if interleaved else -2
    pairs = wide.reshape(x.shape[:-1] + ((num_pairs, 2) if interleaved else (2, num_pairs)))
    a, b = jnp.moveaxis(pairs, pair_axis, 0)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=pair_axis)
    return turned.reshape(x.shape).astype(x.dtype)


def _cos_and_sin(angle: Float[Array, "#B T 1 pairs"]) -> tuple[Float[Array, "#B T 1 pairs"], Float[Array, "#B T 1 pairs"]]:
    """Both, of several steps on a CPU by a loop.

    XLA's CPU compiler fuses a cosine into what reads it, barrier or not: it is computed for every row of the batch, every head
    and every use (a fifth of the time of the attention layer). What a loop returns is not fused.
    """
    if target.device() != "cpu" or angle.shape[1] == 1:
        return jnp.cos(angle), jnp.sin(angle)
    cos, sin = lax.map(lambda is_sine: jnp.where(is_sine, jnp.sin(angle), jnp.cos(angle)), jnp.array([False, True]))
    return cos, sin


def document_positions(
    num_steps: int, *, start: Int[Array, " B"] | None = None, reset: Bool[Array, "B T"] | None = None
) -> Int[Array, "#B T"]:
    """The position of each step within its document, for ``rotary``.

    Args:
      num_steps: T.
      start: the position of the first step if it continues a document; None is 0.
      reset: marks the steps at which a new document starts, at position 0.
    """
    steps = jnp.arange(num_steps, dtype=jnp.int32)[None, :]
    positions = steps if start is None else start[:, None] + steps
    if reset is None:
        return positions
    return _positions_in_documents(reset, jnp.zeros(reset.shape[:1], jnp.int32) if start is None else start)


def _sequence_parallel(op, reset, start):
    return op(reset, sequence_parallel.steps_since_start(reset, start, reset.shape[1]))


@per_shard({"reset": "b t", "start": "b"}, results="b t", sequence_parallel=_sequence_parallel)
def _positions_in_documents(reset: Bool[Array, "B T"], start: Int[Array, " B"]) -> Int[Array, "B T"]:
    steps = jnp.arange(reset.shape[1], dtype=jnp.int32)[None, :]
    latest_start = lax.cummax(jnp.where(reset, steps, -1), axis=1)
    return jnp.where(latest_start >= 0, steps - latest_start, start[:, None] + steps)
