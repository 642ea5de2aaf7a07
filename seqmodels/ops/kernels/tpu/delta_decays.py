"""What a chunk's decays make of its queries and keys in the TPU's delta rule, without decay, with one per head, or per key channel.

Forwards, of a head's q and k, what the recurrence over chunks reads, erases and writes with, and the two matrices over the chunk's
pairs of steps (``tpu/delta_rule.py``); backwards, the gradients of q, k and the decays from those of all these.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from seqmodels.ops.kernels.tpu import decay_per_channel, decay_per_head
from seqmodels.ops.kernels.tpu.common import Heads, operand_dtype, product


class Prepared(NamedTuple):
    """Of a chunk of one head; or, but for ``keep``, what the gradients of these are."""

    read: Float[Array, "C K"]
    """p q: queries, decayed since the start of the chunk, in the dtype of products."""
    erase: Float[Array, "C K"]
    """p k."""
    write: Float[Array, "C K"]
    """s k: keys, decayed until the end of the chunk."""
    scores: Float[Array, "C C"]
    """P, zero above the diagonal."""
    overlaps: Float[Array, "C C"]
    """(k_i . k_j) D_ij below the diagonal, zero elsewhere."""
    keep: Float[Array, "1 X"] | None
    """gamma, of all key channels or one for all; None without decay. Of gradients: their sums over the value channels of
    <S, d_S>, with S and the cotangent of gamma S [1, K]."""


class Decays:
    """Without any; the base of the others."""

    def __init__(self, steps: int, precision: lax.Precision):
        self.precision, self.operand = precision, operand_dtype(precision)
        self.dot = functools.partial(product, precision=precision)
        self.masks = decay_per_head.masks_of(steps, False, self.operand)
        self.below = self.masks.reads & jnp.logical_not(self.masks.own)

    def prepare(self, q: Float[Array, "C K"], k: Float[Array, "C K"], decays: Array | None) -> Prepared:
        """From q and k in the dtype of products, and the head's decays."""
        return Prepared(q, k, k, *self._pairs(q, k, 1.0), None)

    def gradients(
        self, q, k, decays, prepared: Prepared, d: Prepared
    ) -> tuple[Float[Array, "C K"], Float[Array, "C K"], Array | None]:
        """Of q, k and the decays, in float32, from what was ``prepared`` and its gradients ``d``."""
        d_q, d_k = self._of_pairs(q, k, d.scores, d.overlaps)
        return d.read + d_q, d.erase + d.write + d_k, None

    def _pairs(self, q, k, decay):
        """Scores and overlaps, with one decay for all channels."""
        scores = jnp.where(self.masks.reads, self.dot(q, k, 1, 1) * decay, 0.0)
        return scores, jnp.where(self.below, self.dot(k, k, 1, 1) * decay, 0.0)

    def _of_pairs(self, q, k, d_scores, d_overlaps):
        d_scores, d_overlaps = d_scores.astype(self.operand), d_overlaps.astype(self.operand)
        d_k = self.dot(d_scores, q, 0, 0) + self.dot(d_overlaps, k, 0, 0) + self.dot(d_overlaps, k, 1, 0)
        return self.dot(d_scores, k, 1, 0), d_k


class PerHead(Decays):
    """One per head: a row [1, C]. D is a matrix (``tpu/decay_per_head.py``)."""

    def prepare(self, q, k, decays):
        """The base's, with decays."""
        sums = self._sums(decays)
        rows = (x.astype(jnp.float32) * decay for x, decay in ((q, sums.prefix), (k, sums.prefix), (k, sums.suffix)))
        return Prepared(*(x.astype(self.operand) for x in rows), *self._pairs(q, k, sums.pairs), sums.total)

    def gradients(self, q, k, decays, prepared, d):
        """The base's, with decays."""
        sums = self._sums(decays)
        read, erase, write = d.read * sums.prefix, d.erase * sums.prefix, d.write * sums.suffix
        d_q, d_k = self._of_pairs(q, k, d.scores * sums.pairs, d.overlaps * sums.pairs)
        queries, keys = q.astype(jnp.float32), k.astype(jnp.float32)
        d_decays = decay_per_head.d_row(
            d.scores * prepared.scores + d.overlaps * prepared.overlaps,
            jnp.sum(queries * read + keys * erase, axis=1, keepdims=True),
            jnp.sum(keys * write, axis=1, keepdims=True),
            d.keep,
            self.masks,
            self.precision,
        )
        return read + d_q, erase + write + d_k, d_decays

    def place(self, heads: Heads, head: int) -> tuple[slice, slice]:
        """A head's decays in their block."""
        return slice(head, head + 1), slice(None)

    def _sums(self, decays):
        return decay_per_head.local_sums(decays, None, self.masks, self.precision)


class PerChannel(Decays):
    """One per key channel: [C, K]. No one matrix serves all channels, but one for each level does (``tpu/decay_per_channel.py``)."""

    def __init__(self, steps: int, precision: lax.Precision):
        super().__init__(steps, precision)
        pairs = decay_per_channel.pairs_of(steps)
        self.level = jnp.where(self.below, pairs.level, -1)
        self.ones = decay_per_channel.within_registers(pairs, False).astype(self.operand)

    def prepare(self, q, k, decays):
        """The base's, with decays."""
        steps, queries, keys = q.shape[0], q.astype(jnp.float32), k.astype(jnp.float32)
        scores = jnp.where(self.masks.own, jnp.sum(queries * keys, axis=1, keepdims=True), 0.0)
        overlaps = jnp.zeros_like(scores)
        *levels, whole = decay_per_channel.levels(decays, None)
        for number, sums in enumerate(levels):
            rows = self._decayed(queries, keys, sums)
            found, here = self.dot(rows, rows[steps:], 1, 1), self.level == number
            scores, overlaps = jnp.where(here, found[:steps], scores), jnp.where(here, found[steps:], overlaps)
        prefix, suffix = jnp.exp(whole.read), jnp.exp(whole.left)
        rows = (x.astype(self.operand) for x in (queries * prefix, keys * prefix, keys * suffix))
        return Prepared(*rows, scores, overlaps, jnp.exp(whole.total[0, :1]))

    def gradients(self, q, k, decays, prepared, d):
        """The base's, with decays."""
        steps, queries, keys = q.shape[0], q.astype(jnp.float32), k.astype(jnp.float32)
        *levels, whole = decay_per_channel.levels(decays, None)
        prefix, suffix = jnp.exp(whole.read), jnp.exp(whole.left)
        d_q, erase, write = d.read * prefix, d.erase * prefix, d.write * suffix
        reading, d_k = queries * d_q + keys * erase, erase + write
        by_level = []
        for number, sums in enumerate(levels):
            rows, here = self._decayed(queries, keys, sums), self.level == number
            d_pairs = jnp.concatenate([jnp.where(here, x, 0.0) for x in (d.scores, d.overlaps)]).astype(self.operand)
            d_rows, decay = self.dot(d_pairs, rows[steps:], 1, 0), jnp.exp(sums.exponent)
            d_queries, d_keys = d_rows[:steps] * decay, (d_rows[steps:] + self.dot(d_pairs, rows, 0, 0)) * decay
            by_level.append(queries * d_queries + keys * d_keys)
            d_q, d_k = d_q + d_queries, d_k + d_keys
        d_decays = decay_per_channel.d_sums(reading, keys * write, by_level, d.keep, self.ones, self.precision)
        own = jnp.sum(jnp.where(self.masks.own, d.scores, 0.0), axis=1, keepdims=True)
        return d_q + own * keys, d_k + own * queries, d_decays

    def place(self, heads: Heads, head: int) -> tuple[slice, slice]:
        """A head's decays in their block."""
        return slice(None), heads.decays(head)

    def _decayed(self, queries, keys, sums):
        """Queries, and below them keys, with the decays of a level; of the queries the upper halves are meant."""
        decay = jnp.exp(sums.exponent)
        return jnp.concatenate([(queries * decay).astype(self.operand), (keys * decay).astype(self.operand)])


def decays_of(log_decay: Float[Array, "B T H X"] | None) -> type[Decays]:
    """Those of an op's argument."""
    return Decays if log_decay is None else PerHead if log_decay.shape[-1] == 1 else PerChannel
