"""Attention whose time is split over devices: queries stay where they are, keys and values go round (arXiv 2310.01889).

A device attends to its own keys, then to those of the device before it, of the one before that, and so on, each block under the
same running softmax (``tiles.py``). While it works on one block it sends it on and receives the next, so that it never holds
more than two. Only what is sent is saved; the gradient sends keys and values round once more and with them their gradients,
which then go home in one step.

Of consecutive steps the device with the last ones would compute most, and the others wait for it. So device i of n works on the
halves i and 2 n - 1 - i of the 2 n halves that the devices hold (arXiv 2407.21783, section 3.3.2): of the keys that arrive, all
queries see the early half where they come from a device before this one, and the late queries see both halves where they come from
one after it.

With a window, devices that it reaches as a whole are visited in this way, and of the last one its newest keys alone are sent,
straight to where they are seen: window - 1 keys in all, however many devices there are. Steps stay where they are, as nearly all
devices see as many keys; nothing is computed for keys that went round to earlier steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqmodels.ops import sequence_parallel
from seqmodels.ops.placement import split_of
from seqmodels.ops.softmax_attention.tiles import Keys, Tiles, cut, cut_keys, join, tiles


class Passing(NamedTuple):
    """A ``Leg`` of keys that are passed on ``hops`` times, each time to the device ``shift`` further on."""

    axes: tuple[str, ...]
    shift: int
    hops: int
    earlier: tuple[tuple[int, int], ...]  # (query block, key block) of the tiles of keys from a device before this one
    later: tuple[tuple[int, int], ...]  # from a device after it

    def forward(self, visit, running, keys: Keys):
        def visited(number, running, keys):
            return self._where_from(number, lambda pairs: visit(running, pairs, keys), lambda: running)

        def hop(carry, number):
            running, keys = carry
            onward = self._pass_on(keys)  # while these are attended to
            return (visited(number, running, keys), onward), None

        carry = running, self._pass_on(keys)
        if self.hops > 1:
            carry, _ = lax.scan(hop, carry, jnp.arange(1, self.hops))
        return visited(self.hops, *carry)

    def backward(self, visit, d_q, keys: Keys):
        def gradients(number, d_q, keys):
            def seen(pairs):
                d_q_after, *d_keys = visit(d_q, pairs, keys)
                return d_q_after, tuple(d_keys)

            return self._where_from(number, seen, lambda: (d_q, zeros))

        def hop(carry, number):
            d_q, keys, d_keys = carry
            onward, d_keys = self._pass_on(keys), self._pass_on(d_keys)
            d_q, more = gradients(number, d_q, keys)
            return (d_q, onward, jax.tree.map(jnp.add, d_keys, more)), None

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))
        carry = d_q, self._pass_on(keys), zeros
        if self.hops > 1:
            carry, _ = lax.scan(hop, carry, jnp.arange(1, self.hops))
        d_q, keys, d_keys = carry
        d_q, more = gradients(self.hops, d_q, keys)
        if self.hops > 1:
            more = jax.tree.map(jnp.add, self._pass_on(d_keys), more)
        return d_q, *self._pass_on(more, -self.shift * self.hops)

    def _pass_on(self, x, shift: int | None = None):
        devices, shift = lax.axis_size(self.axes), self.shift if shift is None else shift
        return _permute(x, self.axes, lambda i: (i + shift) % devices)

    def _where_from(self, number, visit, nothing):
        """``visit(pairs)`` by where what has been passed on ``number`` times comes from."""

        def of(pairs):
            return (lambda: visit(np.array(pairs, np.int32))) if pairs else nothing

        return lax.cond(lax.axis_index(self.axes) >= number * self.shift, of(self.earlier), of(self.later))


def attend(q, k, v, query_points, key_points, window: int | None, num_old: int, block: int):
    """Softmax attention of this device's queries to [cache | its new keys] and to the new keys of the devices before.

    Args:
      q: [B, G, R, T, K]; ``k``, ``v``: [B, G, S, X]. Steps and documents of the points count from the first device's first step.
      num_old: keys of the cache, which every device has.
      block: the most queries and keys of a tile.
    """
    if window is None and q.shape[3] % 2 == 0:
        return _balanced(q, k, v, query_points, key_points, num_old, block)
    return _in_place(q, k, v, query_points, key_points, window, num_old, block)


def _balanced(q, k, v, query_points, key_points, num_old, block):
    axes, T = split_of("t").axes, q.shape[3]
    size = _even(T // 2, block)
    plan = Tiles(T, size, size, num_old, None)

    def exchange_new(x, axis):
        old, new = jnp.split(x, [num_old], axis=axis)
        return jnp.concatenate([old, _exchange(new, axis, axes)], axis=axis)

    queries, here = cut(
        plan, _exchange(q, 3, axes), exchange_new(k, 2), exchange_new(v, 2),
        jax.tree.map(lambda x: _exchange(x, 1, axes), query_points), jax.tree.map(lambda x: exchange_new(x, 1), key_points),
    )  # fmt: skip
    blocks = range(-(-T // size))
    early, late = range(-(-T // 2 // size)), range(T // 2 // size, len(blocks))
    leg = Passing(
        axes, 1, sequence_parallel.num_devices() - 1,
        earlier=tuple((i, j) for i in blocks for j in early), later=tuple((i, j) for i in late for j in blocks),
    )  # fmt: skip
    o = join(plan, tiles(plan, (leg,), *queries, here, (None,)), q.shape[2])
    return _exchange(o, 3, axes, back=True)


def _exchange(x, axis: int, axes, *, back: bool = False):
    """The halves i and 2 n - 1 - i, in this order, for this device's two of all 2 n; or ``back``."""
    devices = sequence_parallel.num_devices()

    def place(half):
        return min(half, 2 * devices - 1 - half)

    def swapped_on_odd(first, second):
        # Half i of device i is a first half of another device where i is even, and a second one where it is odd.
        is_odd = lax.axis_index(axes) % 2 == 1
        return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)

    halves = tuple(jnp.split(x, 2, axis=axis))
    halves = swapped_on_odd(*halves) if back else halves
    halves = [_permute(half, axes, lambda i, at=at: place(2 * i + at), back=back) for at, half in enumerate(halves)]
    return jnp.concatenate(halves if back else swapped_on_odd(*halves), axis=axis)


def _permute(x, axes, to, *, back: bool = False):
    """Each device's ``x`` on the device ``to(i)``; or ``back`` from there."""
    pairs = [(i, to(i)) for i in range(lax.axis_size(axes))]
    return lax.ppermute(x, axes, [pair[::-1] for pair in pairs] if back else pairs)


def _in_place(q, k, v, query_points, key_points, window, num_old, block):
    T, reach = q.shape[3], q.shape[3] * (sequence_parallel.num_devices() - 1)
    if window is not None:
        reach = min(reach, window - 1)
    size = _even(T, block)
    plan = Tiles(T, size, size, num_old, window)
    queries, here = cut(plan, q, k, v, query_points, key_points)
    whole, rest = divmod(reach, T)
    axes, blocks, legs, sent = split_of("t").axes, range(-(-T // size)), [], []
    if whole:
        legs.append(Passing(axes, 1, whole, tuple((i, j) for i in blocks for j in blocks), ()))
        sent.append(None)
    if rest:
        part = _even(rest, block)
        # Of these keys the query at step i of T sees the last rest - i.
        seen = tuple((i, j) for i in blocks for j in range(-(-rest // part)) if i * size < min((j + 1) * part, rest))
        legs.append(Passing(axes, whole + 1, 1, seen, ()))
        points = jax.tree.map(lambda x: x[:, -rest:], key_points)
        sent.append(cut_keys(k[:, :, -rest:], v[:, :, -rest:], points, part))
    return join(plan, tiles(plan, tuple(legs), *queries, here, tuple(sent)), q.shape[2])


def _even(length: int, most: int) -> int:
    """The length of blocks of at most ``most`` that fill ``length`` with the least padding."""
    return math.ceil(length / math.ceil(length / most))
