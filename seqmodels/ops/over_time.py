"""What an op does whose time is split over devices (the mesh axis ``sequence``): each has T / n steps that follow each other.

A recurrence that is affine in its state, S -> decay S + added over a device's steps, needs of the devices before it two
numbers for each number of the state, whatever T is: all gather (decay, added), and each folds those before it from the first
state (``state_before``). It then runs once more from the state that it really starts from. What needs the last inputs alone
gets them from its neighbour (``from_the_device_before``). All of it is an op as it is, state in and state out, and JAX's own
collectives, so that gradients need nothing written here. Softmax attention, whose state is all keys and values, sends those from
device to device instead (``softmax_attention/ring.py``).

A document that starts among a device's steps cuts what was before them: ``cut`` selects it away, it is not multiplied by
zero, so that a NaN in one document reaches no other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from seqmodels.ops.placement import split_of


def devices() -> int:
    """How many devices time is split over; 1 where it is whole."""
    axes = split_of("t").axes
    return lax.axis_size(axes) if axes else 1


def device() -> int | Int[Array, ""]:
    """Which of them this one is, the first steps' being 0."""
    axes = split_of("t").axes
    return lax.axis_index(axes) if axes else 0


def starts_within(reset: Bool[Array, "B T"] | None, batch: int) -> Bool[Array, " B"]:
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
    if devices() == 1:
        return first
    me = device()

    def step(state, inputs):
        other, summary = inputs

        def where_before(yes, no):
            return jax.tree.map(lambda x, y: jnp.where(other < me, x, y), yes, no)

        # On what is not selected nothing is computed: 0 times a NaN would be its gradient, and reach the other device.
        after = advance(summary, where_before(state, jax.tree.map(jnp.zeros_like, state)))
        return where_before(after, state), None

    return lax.scan(step, first, (jnp.arange(devices()), lax.all_gather(summary, split_of("t").axes)))[0]


def affine(cut: Bool[Array, " B"], decay: Any, added: Any, apply: Callable[[Any, Any], Any]) -> tuple[Any, Callable]:
    """Summary and ``advance`` for ``state_before``: S -> apply(decay, S) + added, of the steps since a cut ``added`` alone."""

    def advance(summary, state):
        cut, decay, added = summary
        zeros = jax.tree.map(jnp.zeros_like, state)
        kept = select(cut, zeros, apply(decay, select(cut, zeros, state)))
        return jax.tree.map(jnp.add, kept, added)

    return (cut, decay, added), advance


def from_the_device_before(x: Any) -> Any:
    """What the neighbour with the steps before has; zeros on the first device."""
    return lax.ppermute(x, split_of("t").axes, [(i, i + 1) for i in range(devices() - 1)])


def on_the_first(yes: Any, no: Any) -> Any:
    """``yes`` on the device with the first steps, ``no`` on the others."""
    return jax.tree.map(lambda x, y: jnp.where(device() == 0, x, y), yes, no)


def of_the_last(x: Any) -> Any:
    """What the device with the last steps has, on all: the state after all steps."""
    if devices() == 1:
        return x
    is_last = device() == devices() - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), split_of("t").axes), x)


def newest(x: Shaped[Array, "B T *rest"], count: int) -> Shaped[Array, "B count *rest"]:
    """The last ``count`` steps of all devices', on all. Those of one device are sent alone, those of several as they lie."""
    steps = x.shape[1]
    if count <= steps:
        return of_the_last(x[:, steps - count :])
    whole = steps * devices()
    if count == whole:
        return lax.all_gather(x, split_of("t").axes, axis=1, tiled=True)
    # Each device's steps at their place, its steps before the first of these in the margin.
    place = jnp.maximum(count + steps - whole + device() * steps, 0)
    margin = jnp.zeros((x.shape[0], count + steps, *x.shape[2:]), x.dtype)
    return lax.psum(lax.dynamic_update_slice_in_dim(margin, x, place, axis=1)[:, steps:], split_of("t").axes)


def steps_since_start(reset: Bool[Array, "B T"] | None, first: Int[Array, " B"], steps: int) -> Int[Array, " B"]:
    """How many steps of its document are before this device's, ``first`` before the first device's."""
    if devices() == 1:
        return first
    cut = starts_within(reset, first.shape[0])
    latest = jnp.zeros_like(first)
    if reset is not None:
        latest = jnp.max(jnp.where(reset, jnp.arange(steps, dtype=first.dtype), 0), axis=1)
    summary, advance = affine(cut, None, steps - latest, lambda _, state: state)
    return state_before(first, summary, advance)
