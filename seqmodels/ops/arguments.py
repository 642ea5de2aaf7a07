"""Shapes of an op's arguments, judged alike by all ops."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def check_arguments(expected: Mapping[str, tuple], given: str) -> None:
    """Whether arguments have the shapes that follow from others.

    Args:
      expected: by name the argument, None where it is left out, and one or more shapes that it may have.
      given: those from which the shapes follow (see ``shapes_of``).

    Raises:
      ValueError: one has another shape, or ``reset`` is not bool.
    """
    for name, (array, *allowed) in expected.items():
        if array is None:
            continue
        if array.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} must be {wanted} for {given}; got {list(array.shape)}")
        if name == "reset" and array.dtype != jnp.bool_:
            raise ValueError(f"reset must be bool; got {array.dtype}")


def shapes_of(**arrays: jax.Array) -> str:
    """``q [2, 64, 4, 32], v [2, 64, 4, 48]``, for a message."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
