"""Attention whose time is split over devices: queries stay where they are, keys and values go round (arXiv 2310.01889).

A device attends to its own keys, then to those of the device before it, of the one before that, and so on, each block under the
same running softmax (``tiles.py``). While it works on one block it sends it on and receives the next, so that it never holds
more than two. Only what is sent is saved; the gradient sends keys and values round once more and with them their gradients,
which then go home in one step.

With a window, devices that it reaches as a whole are visited in this way, and of the last one its newest keys alone are sent,
straight to where they are seen: window - 1 keys in all, however many devices there are. Blocks that went round to earlier steps lie in
the future; nothing is computed for them. So the device with the last steps computes most, and the others wait for it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqmodels.ops import over_time
from seqmodels.ops.placement import split_of
from seqmodels.ops.softmax_attention.products import Points
from seqmodels.ops.softmax_attention.tiles import Keys, Tiles, cut, cut_keys, join, tiles


class Passing(NamedTuple):
    """A ``Leg`` of keys that are passed on ``hops`` times, each time to the device ``shift`` further on."""

    axes: tuple[str, ...]
    shift: int
    hops: int
    steps: int  # from a device to the one ``shift`` further on
    tiles: tuple[tuple[int, int], ...]  # (query block, key block)

    def forward(self, visit, running, keys: Keys):
        def hop(carry, number):
            running, keys = carry
            onward = self._next(keys)  # while these are attended to
            return (self._where_seen(number, lambda: visit(running, self._pairs, keys), lambda: running), onward), None

        carry = running, self._next(keys)
        if self.hops > 1:
            carry, _ = lax.scan(hop, carry, jnp.arange(1, self.hops))
        running, keys = carry
        return self._where_seen(self.hops, lambda: visit(running, self._pairs, keys), lambda: running)

    def backward(self, visit, q_bar, keys: Keys):
        def gradients(number, q_bar, keys):
            def seen():
                q_bar_after, *bars = visit(q_bar, self._pairs, keys)
                return q_bar_after, tuple(bars)

            return self._where_seen(number, seen, lambda: (q_bar, zeros))

        def hop(carry, number):
            q_bar, keys, bars = carry
            onward, bars = self._next(keys), self._pass_on(bars)
            q_bar, more = gradients(number, q_bar, keys)
            return (q_bar, onward, jax.tree.map(jnp.add, bars, more)), None

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))
        carry = q_bar, self._next(keys), zeros
        if self.hops > 1:
            carry, _ = lax.scan(hop, carry, jnp.arange(1, self.hops))
        q_bar, keys, bars = carry
        q_bar, more = gradients(self.hops, q_bar, keys)
        if self.hops > 1:
            more = jax.tree.map(jnp.add, self._pass_on(bars), more)
        return q_bar, *self._pass_on(more, -self.shift * self.hops)

    @property
    def _pairs(self) -> np.ndarray:
        return np.array(self.tiles, np.int32)

    def _next(self, keys: Keys) -> Keys:
        """What arrives. Its steps are known: they are as many before this device's as the sender's are."""
        steps, documents = keys.points
        k, v, documents = self._pass_on((keys.k, keys.v, documents))
        return Keys(k, v, Points(steps - self.steps, documents))

    def _pass_on(self, x, shift: int | None = None):
        devices, shift = lax.axis_size(self.axes), self.shift if shift is None else shift
        return lax.ppermute(x, self.axes, [(i, (i + shift) % devices) for i in range(devices)])

    def _where_seen(self, number, yes, no):
        """Whether what has been passed on ``number`` times comes from steps before this device's."""
        return lax.cond(lax.axis_index(self.axes) >= number * self.shift, yes, no)


def attend(q, k, v, query_points, key_points, window: int | None, num_old: int, block: int):
    """Softmax attention of this device's queries to [cache | its new keys] and to the new keys of the devices before.

    Args:
      q: [B, G, R, T, K]; ``k``, ``v``: [B, G, S, X]. Steps and documents of the points count from the first device's first step.
      num_old: keys of the cache, which every device has.
      block: the most queries and keys of a tile.
    """
    T, reach = q.shape[3], q.shape[3] * (over_time.devices() - 1)
    if window is not None:
        reach = min(reach, window - 1)
    size = _even(T, block)
    plan = Tiles(T, size, size, num_old, window)
    queries, here = cut(plan, q, k, v, query_points, key_points)
    whole, rest = divmod(reach, T)
    axes, blocks, legs, sent = split_of("t").axes, range(-(-T // size)), [], []
    if whole:
        legs.append(Passing(axes, 1, whole, T, tuple((i, j) for i in blocks for j in blocks)))
        sent.append(None)
    if rest:
        part = _even(rest, block)
        # Of these keys the query at step i of T sees the last rest - i.
        seen = tuple((i, j) for i in blocks for j in range(-(-rest // part)) if i * size < min((j + 1) * part, rest))
        legs.append(Passing(axes, whole + 1, 1, (whole + 1) * T, seen))
        points = jax.tree.map(lambda x: x[:, -rest:], key_points)
        sent.append(cut_keys(k[:, :, -rest:], v[:, :, -rest:], points, part))
    return join(plan, tiles(plan, tuple(legs), *queries, here, tuple(sent)), q.shape[2])


def _even(length: int, most: int) -> int:
    """The length of blocks of at most ``most`` that fill ``length`` with the least padding."""
    return math.ceil(length / math.ceil(length / most))
