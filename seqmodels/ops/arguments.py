"""Checks of the shapes and dtypes of an op's arguments, shared by all ops."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Complex, Float, Inexact, Int

# What an annotation says of an array's numbers: the dtypes that it may have, and how a message calls them.
_KINDS: Final = {
    Float: (jnp.floating, "of floating point numbers"),
    Complex: (jnp.inexact, "of complex numbers"),  # real ones are some of them
    Inexact: (jnp.inexact, "of floating point or complex numbers"),
    Int: (jnp.integer, "of integers"),
    Bool: (jnp.bool_, "bool"),
}


def check_dtypes(op: Callable) -> Callable:
    """Decorates an op: what its annotations call an array is one, with numbers of the kind that they say.

    An op computes in float32 and returns its input's dtype: integers would come back cut off, complex numbers without their
    imaginary part.

    Raises:
      ValueError: when the op is called, if an argument is no array or has numbers of another kind; it is named.
    """
    signature = inspect.signature(op)
    kinds = {name: _kind(parameter.annotation) for name, parameter in signature.parameters.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}

    @functools.wraps(op)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            for array, (dtypes, called) in _pairs(value, kinds[name]) if name in kinds and value is not None else ():
                if not hasattr(array, "dtype"):
                    raise ValueError(f"{name} must be an array {called}; got a {type(array).__name__}")
                if not jnp.issubdtype(array.dtype, dtypes):
                    raise ValueError(f"{name} must be {called}; got {array.dtype}")
        return op(*args, **kwargs)

    return checked


def _kind(annotation: Any) -> Any:
    """An entry of ``_KINDS``; of a tuple of arrays a tuple of them; None of what is no array."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((kind for kind in map(_kind, typing.get_args(annotation)) if kind is not None), None)
    if isinstance(annotation, type) and hasattr(annotation, "_fields"):
        return tuple(map(_kind, typing.get_type_hints(annotation).values()))
    kind = getattr(annotation, "dtype", None)
    return _KINDS[kind] if isinstance(kind, type) and kind in _KINDS else None


def _pairs(value: Any, kind: Any) -> Iterator[tuple[Any, tuple]]:
    """Each array of an argument with its kind. An op says what is wrong with a tuple of another length."""
    return zip(value, kind) if isinstance(kind[0], tuple) and isinstance(value, tuple) else iter([(value, kind)])


def check_arguments(expected: Mapping[str, tuple], given: str) -> None:
    """Whether arguments have the shapes that follow from others.

    Args:
      expected: by name the argument, None where it is left out, and one or more shapes that it may have.
      given: those from which the shapes follow (see ``shapes_of``).

    Raises:
      ValueError: one has another shape.
    """
    for name, (array, *allowed) in expected.items():
        if array is None:
            continue
        if array.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{name} must be {wanted} for {given}; got {list(array.shape)}")


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
