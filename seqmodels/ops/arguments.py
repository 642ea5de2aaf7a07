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


def check_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Whether q and k are [B, T, G, K] and v is [B, T, H, V], with T >= 1 and H a multiple of G.

    Raises:
      ValueError: they are not.
    """
    given = shapes_of(q=q, k=k, v=v)
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"q and k must both be [B, T, G, K] and v [B, T, H, V]; got {given}")
    if q.shape[1] == 0:
        raise ValueError(f"a sequence has at least one step; got {given}")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v's heads must be a multiple of q's and k's; got {given}")


def shapes_of(**arrays: jax.Array) -> str:
    """``q [2, 64, 4, 32], v [2, 64, 4, 48]``, for a message."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
