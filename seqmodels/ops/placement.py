"""Where arrays lie on a mesh of devices while a function is traced for it.

The batch is split over the axes ``data`` and ``fsdp``, heads and widths over ``tensor``, time over ``sequence``. XLA splits
what it compiles over a mesh by itself, but for two things. The sharding of the residual stream is given
(``constrain_activations``): XLA would split features instead of gathering the parameters that ``fsdp`` splits. Ops run under
``shard_map``, as their rows and heads are independent (``per_shard``): XLA cannot partition a kernel, communicates in every
iteration of a loop over time, and on a CPU has no FFT of a sharded array.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from seqmodels.errors import UserError
from seqmodels.ops.arguments import check_dtypes

BATCH_AXES: Final = ("data", "fsdp")
HEAD_AXIS: Final = "tensor"
TIME_AXIS: Final = "sequence"

_mesh = contextvars.ContextVar("seqmodels_ops_mesh", default=None)
_splits = contextvars.ContextVar("seqmodels_ops_splits", default=None)


@dataclasses.dataclass(frozen=True)
class Split:
    """How an axis of an op's arrays is split over devices, as the op itself sees it (``split_of``).

    Attributes:
      axes: of the mesh; collectives over them join the parts. Empty: the axis is whole.
      size: of the whole axis; of a padded vocabulary, without the padding.
    """

    axes: tuple[str, ...] = ()
    size: int = 0


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Inside this context functions are traced for all devices of a mesh, whose axes have the names used here."""
    token = _mesh.set(None if mesh is None or mesh.size == 1 else mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain_activations(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """``x``, held by every device for its own rows and steps; outside ``on_mesh``, and on one device, as it is."""
    mesh = _mesh.get()
    if mesh is None:
        return x
    rows = BATCH_AXES if _divides(mesh, BATCH_AXES, [x.shape[0]]) else None
    time = TIME_AXIS if mesh.shape[TIME_AXIS] > 1 and _divides(mesh, (TIME_AXIS,), [x.shape[1]]) else None
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, time)))


def split_of(letter: str) -> Split:
    """Inside an op that ``per_shard`` decorates: how the axes with this letter are split."""
    splits = _splits.get()
    return splits[letter] if splits and letter in splits else Split()


def per_shard(
    arguments: Mapping[str, Any], results: Any, *, sequence_parallel: Callable | str | None = None
) -> Callable[[Callable], Callable]:
    """Decorates an op: on a mesh every device calls it for its own rows, heads and steps, elsewhere nothing changes. Its arrays are
    checked as ``check_dtypes`` has it.

    The axes of an array are letters, as many of the first ones as matter; ``"b t h"`` is [B, T, H, ...]:

    - ``b`` rows of the batch; ``r`` those of an op that has no heads to split, over ``tensor`` too;
    - ``t`` time;
    - ``h`` heads or channels, ``g`` groups of heads; one group is shared by all heads. Where they do not divide over ``tensor``,
      rows are split over it too, if those do;
    - ``v`` the vocabulary, padded with zeros to a multiple of ``tensor``; such an op has collectives of its own (``split_of``);
    - ``_`` what every device has whole.

    Args:
      arguments: axes of the op's arrays by name; of a tuple of arrays, a tuple. What is not named here is no array.
      results: axes of what it returns, likewise; the state after the last step has no ``t``.
      sequence_parallel: what runs where time is split, a function of the op and its arguments (see ``sequence_parallel.py``); a
        text, the reason why time cannot be split; or None for an op whose steps are independent, or that has its own collectives.

    Raises:
      UserError: when the op is called, if its mesh splits time and the op cannot.
    """

    def decorate(op):
        op = check_dtypes(op)
        signature = inspect.signature(op)

        @functools.wraps(op)
        def placed(*args, **kwargs):
            mesh = _mesh.get()
            if mesh is None:
                return op(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            axes = {name: arguments[name] for name in given if name in arguments and given[name] is not None}
            sizes = _sizes(axes, given)
            if sizes is None:  # shapes that do not fit, of which the op says what is wrong
                return op(*args, **kwargs)
            places = _places(mesh, sizes)
            if isinstance(sequence_parallel, str) and mesh.shape[TIME_AXIS] > 1 and max(sizes["t"]) > 1:
                raise UserError(
                    f"mesh.sequence={mesh.shape[TIME_AXIS]} cannot split {op.__name__} over time: {sequence_parallel}"
                )
            if set(sizes) <= {"b", "t"} and "t" not in places:  # steps side by side: XLA splits those as well, and sends nothing
                return op(*args, **kwargs)
            run = functools.partial(sequence_parallel, op) if sequence_parallel is not None and "t" in places else op
            options = {name: value for name, value in given.items() if name not in axes}
            splits = {letter: Split(each, max(sizes[letter])) for letter, each in places.items()}
            on_each_device = _on_each_device(functools.partial(run, **options), splits)
            return _shard_map(on_each_device, mesh, axes, {name: given[name] for name in axes}, results, places)

        return placed

    return decorate


def _on_each_device(run: Callable, splits: Mapping[str, Split]) -> Callable[[Mapping[str, Any]], Any]:
    """``run(**arrays)`` inside a shard_map, where ``split_of`` answers by ``splits``."""

    def on_each_device(arrays):
        token = _splits.set(splits)
        try:
            with on_mesh(None):
                return run(**arrays)
        finally:
            _splits.reset(token)

    return on_each_device


def _shard_map(function, mesh: Mesh, axes: Mapping[str, Any], arrays: Mapping[str, Any], results: Any, places) -> Any:
    """``function(arrays)`` on every device of a mesh, the letters of ``places`` split over it."""
    if "v" in places:
        arrays = {name: _padded(axes[name], array, mesh) for name, array in arrays.items()}
    in_specs = {name: _specs(axes[name], array, places, mesh) for name, array in arrays.items()}
    out_specs = _result_specs(results, places)
    return jax.shard_map(function, mesh=mesh, check_vma=False, in_specs=(in_specs,), out_specs=out_specs)(arrays)


def _leaves(axes, value) -> Iterator[tuple[str, Any]]:
    if isinstance(axes, str):
        yield axes, value
    else:
        for each, part in zip(axes, value):
            yield from _leaves(each, part)


def _sizes(axes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, set[int]] | None:
    """The sizes that each letter has; None where an array has fewer axes than its letters."""
    sizes = {}
    for name, each in axes.items():
        for words, array in _leaves(each, given[name]):
            letters = words.split()
            if array.ndim < len(letters):
                return None
            for letter, size in zip(letters, array.shape):
                sizes.setdefault(letter, set()).add(size)
    return sizes or None


def _places(mesh: Mesh, sizes: Mapping[str, set[int]]) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each letter that is split."""
    places, everywhere = {}, (*BATCH_AXES, HEAD_AXIS)
    (rows,) = [letter for letter in ("b", "r") if letter in sizes]
    heads = {letter: found - {1} for letter, found in sizes.items() if letter in ("h", "g")}
    if any(heads.values()) and all(_divides(mesh, (HEAD_AXIS,), found) for found in heads.values()):
        places |= {letter: (HEAD_AXIS,) for letter, found in heads.items() if found}
    elif (heads or rows == "r") and _divides(mesh, everywhere, sizes[rows]):
        places[rows] = everywhere
    if rows not in places and _divides(mesh, BATCH_AXES, sizes[rows]):
        places[rows] = BATCH_AXES
    if "t" in sizes and mesh.shape[TIME_AXIS] > 1 and _divides(mesh, (TIME_AXIS,), sizes["t"]):
        places["t"] = (TIME_AXIS,)
    if "v" in sizes and mesh.shape[HEAD_AXIS] > 1:
        places["v"] = (HEAD_AXIS,)
    return places


def _padded(axes, array, mesh: Mesh):
    """The vocabulary's axis padded with zeros to a multiple of ``tensor``."""
    letters = axes.split() if isinstance(axes, str) else []
    if "v" not in letters or array.shape[letters.index("v")] % mesh.shape[HEAD_AXIS] == 0:
        return array
    padding = [(0, -size % mesh.shape[HEAD_AXIS] if letter == "v" else 0) for letter, size in zip(letters, array.shape)]
    # Gathered first over all axes but ``tensor``, which splits the width: XLA finds no way from there to the vocabulary in one step.
    # So is the padded array: XLA of JAX 0.12 would split the vocabulary before it is padded.
    width = [HEAD_AXIS if letter != "v" and _divides(mesh, (HEAD_AXIS,), [size]) else None for letter, size in
             zip(letters + ["_"] * (array.ndim - len(letters)), array.shape)]  # fmt: skip
    split = NamedSharding(mesh, PartitionSpec(*width))
    array = jax.lax.with_sharding_constraint(array, split)
    return jax.lax.with_sharding_constraint(jnp.pad(array, padding + [(0, 0)] * (array.ndim - len(padding))), split)


def _divides(mesh: Mesh, axes: tuple[str, ...], sizes) -> bool:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    return all(size % parts == 0 for size in sizes)


def _result_specs(axes, places):
    if isinstance(axes, str):
        return PartitionSpec(*(places[letter] if letter in places else None for letter in axes.split()))
    return _like(axes, [_result_specs(each, places) for each in axes])


def _like(example: tuple, parts: list):
    return type(example)(*parts) if hasattr(example, "_fields") else tuple(parts)


def _specs(axes, value, places, mesh: Mesh):
    """A PartitionSpec for every array; an axis of size 1 is whole."""
    if not isinstance(axes, str):
        return _like(value, [_specs(each, part, places, mesh) for each, part in zip(axes, value)])
    spec = [places[letter] if letter in places and size > 1 else () for letter, size in zip(axes.split(), value.shape)]
    # Axes of one device are named too: the gradient of an array is summed over those that its spec does not name, a copy at least.
    named = {axis for each in spec for axis in each}
    spec[0] += tuple(axis for axis, size in mesh.shape.items() if size == 1 and axis not in named)
    return PartitionSpec(*(each or None for each in spec))
