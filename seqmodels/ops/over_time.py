"""What an op does whose time is split over devices (the mesh axis ``sequence``): each has T / n steps that follow each other.

A recurrence that is affine in its state, S -> decay S + added over a device's steps, needs of the devices before it two
numbers for each number of the state, whatever T is: all gather (decay, added), and each folds those before it from the first
state (``state_before``). It then runs once more from the state that it really starts from. What needs the last inputs alone
gets them from its neighbour (``from_the_device_before``). All of it is an op as it is, state in and state out, and JAX's own
collectives, so that gradients need nothing written here.

A document that starts among a device's steps cuts what was before them: ``cut`` selects it away, it is not multiplied by
zero, so that a NaN in one document reaches no other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from seqmodels.ops.placement import split_of


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
    axes, me = split_of("t").axes, lax.axis_index(split_of("t").axes)

    def step(state, inputs):
        device, summary = inputs
        return jax.tree.map(lambda new, old: jnp.where(device < me, new, old), advance(summary, state), state), None

    devices = jnp.arange(lax.axis_size(axes))
    return lax.scan(step, first, (devices, lax.all_gather(summary, axes)))[0]


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
    axes = split_of("t").axes
    return lax.ppermute(x, axes, [(i, i + 1) for i in range(lax.axis_size(axes) - 1)])


def on_the_first(yes: Any, no: Any) -> Any:
    """``yes`` on the device with the first steps, ``no`` on the others."""
    return jax.tree.map(lambda x, y: jnp.where(lax.axis_index(split_of("t").axes) == 0, x, y), yes, no)


def of_the_last(x: Any) -> Any:
    """What the device with the last steps has, on all: the state after all steps."""
    axes = split_of("t").axes
    is_last = lax.axis_index(axes) == lax.axis_size(axes) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axes), x)


def steps_since_start(reset: Bool[Array, "B T"] | None, first: Int[Array, " B"], steps: int) -> Int[Array, " B"]:
    """How many steps of its document are before this device's, ``first`` before the first device's."""
    cut = starts_within(reset, first.shape[0])
    latest = jnp.zeros_like(first)
    if reset is not None:
        latest = jnp.max(jnp.where(reset, jnp.arange(steps, dtype=first.dtype), 0), axis=1)
    summary, advance = affine(cut, None, steps - latest, lambda _, state: state)
    return state_before(first, summary, advance)
