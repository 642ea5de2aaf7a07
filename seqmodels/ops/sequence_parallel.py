"""Sequence parallelism: time is split over the devices of the mesh axis ``sequence``, T / n consecutive steps on each.

A recurrence that is affine in its state, S -> decay S + added over a device's steps, needs two numbers of each earlier device
for each number of the state, whatever T is. The devices all-gather (decay, added); each composes those of the earlier devices,
from the first state on (``state_before``), and runs the op again from the state that results. An op that needs only the last
inputs gets them from the previous device (``from_previous_device``). The ops are called as they are, with a state in and a
state out, and the collectives are JAX's, so that gradients follow by differentiation. Softmax attention, whose state is all
keys and values, passes those from device to device instead (ring attention, ``softmax_attention/ring.py``).

Where a document starts among a device's steps, the state before them is dropped. ``cut`` selects; nothing is multiplied by
zero, so that a NaN in one document reaches no other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from seqmodels.ops.placement import split_of


def num_devices() -> int:
    """The number of devices that time is split over; 1 where it is not split."""
    axes = split_of("t").axes
    return lax.axis_size(axes) if axes else 1


def device_index() -> int | Int[Array, ""]:
    """The index of this device along time; 0 has the first steps."""
    axes = split_of("t").axes
    return lax.axis_index(axes) if axes else 0


def has_reset(reset: Bool[Array, "B T"] | None, batch: int) -> Bool[Array, " B"]:
    """``cut``: whether a document starts among this device's steps."""
    return jnp.zeros((batch,), bool) if reset is None else jnp.any(reset, axis=1)


def select(cut: Bool[Array, " B"], yes, no):
    """Row by row, of trees of arrays [B, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(cut.reshape(cut.shape + (1,) * (x.ndim - 1)), x, y), yes, no)


def state_before(first: Any, summary: Any, advance: Callable[[Any, Any], Any]) -> Any:
    """The state before this device's steps.

    Args:
      first: the state before the first device's.
      summary: what this device's steps do to a state, a tree of arrays that is small whatever T is.
      advance: (a device's summary, the state before its steps) -> the state after them.
    """
    if num_devices() == 1:
        return first
    index = device_index()

    def step(state, inputs):
        other, summary = inputs

        def where_before(yes, no):
            return jax.tree.map(lambda x, y: jnp.where(other < index, x, y), yes, no)

        # On what is not selected nothing is computed: 0 times a NaN would be its gradient, and reach the other device.
        after = advance(summary, where_before(state, jax.tree.map(jnp.zeros_like, state)))
        return where_before(after, state), None

    return lax.scan(step, first, (jnp.arange(num_devices()), lax.all_gather(summary, split_of("t").axes)))[0]


def affine(cut: Bool[Array, " B"], decay: Any, added: Any, apply: Callable[[Any, Any], Any]) -> tuple[Any, Callable]:
    """Summary and ``advance`` for ``state_before``: S -> apply(decay, S) + added, of the steps since a cut ``added`` alone."""

    def advance(summary, state):
        cut, decay, added = summary
        zeros = jax.tree.map(jnp.zeros_like, state)
        kept = select(cut, zeros, apply(decay, select(cut, zeros, state)))
        return jax.tree.map(jnp.add, kept, added)

    return (cut, decay, added), advance


def from_previous_device(x: Any) -> Any:
    """``x`` of the device with the preceding steps; zeros on the first device."""
    return lax.ppermute(x, split_of("t").axes, [(i, i + 1) for i in range(num_devices() - 1)])


def on_first_device(yes: Any, no: Any) -> Any:
    """``yes`` on the device with the first steps, ``no`` on the others."""
    return jax.tree.map(lambda x, y: jnp.where(device_index() == 0, x, y), yes, no)


def from_last_device(x: Any) -> Any:
    """``x`` of the device with the last steps, on every device: the state after all steps."""
    if num_devices() == 1:
        return x
    is_last = device_index() == num_devices() - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), split_of("t").axes), x)


def last_steps(x: Shaped[Array, "B T *rest"], count: int) -> Shaped[Array, "B count *rest"]:
    """The last ``count`` of all devices' steps, on every device."""
    steps = x.shape[1]
    if count <= steps:
        return from_last_device(x[:, steps - count :])
    whole = steps * num_devices()
    if count == whole:
        return lax.all_gather(x, split_of("t").axes, axis=1, tiled=True)
    # Each device's steps at their place, its steps before the first of these in the margin.
    place = jnp.maximum(count + steps - whole + device_index() * steps, 0)
    margin = jnp.zeros((x.shape[0], count + steps, *x.shape[2:]), x.dtype)
    return lax.psum(lax.dynamic_update_slice_in_dim(margin, x, place, axis=1)[:, steps:], split_of("t").axes)


def steps_since_start(reset: Bool[Array, "B T"] | None, first: Int[Array, " B"], steps: int) -> Int[Array, " B"]:
    """The number of steps of its document before this device's steps; ``first`` before the first device's."""
    if num_devices() == 1:
        return first
    cut = has_reset(reset, first.shape[0])
    latest = jnp.zeros_like(first)
    if reset is not None:
        latest = jnp.max(jnp.where(reset, jnp.arange(steps, dtype=first.dtype), 0), axis=1)
    summary, advance = affine(cut, None, steps - latest, lambda _, state: state)
    return state_before(first, summary, advance)
