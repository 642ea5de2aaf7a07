"""Where arrays lie on a mesh of devices while a function is traced for it.

The batch is split over the axes ``data`` and ``fsdp``. XLA splits what it compiles over a mesh by itself, and finds the rest of
the places; two things it has to be told: where the residual stream lies (``constrain_activations``), since it would split
features instead of gathering the parameters that ``fsdp`` splits, and how a kernel is split, which it cannot look into.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Final

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES: Final = ("data", "fsdp")

_mesh = contextvars.ContextVar("seqmodels_ops_mesh", default=None)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside this context functions are traced for all devices of a mesh, whose axes have the names used here."""
    token = _mesh.set(mesh if mesh.size > 1 else None)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain_activations(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """``x``, held by every device for its own rows of the batch; outside ``on_mesh``, and on one device, as it is."""
    mesh = _mesh.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _rows(mesh, x.shape[0])))


def _rows(mesh: Mesh, batch: int) -> PartitionSpec:
    """The batch over its axes; a batch that does not divide is whole on every device."""
    divides = batch % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
    return PartitionSpec(BATCH_AXES) if divides else PartitionSpec()


def by_rows(function: Callable, *arguments, whole: tuple[int, ...] = ()):
    """``function(*arguments)``, on a mesh by every device for its own rows of the batch.

    Args:
      function: of trees of arrays, to trees of arrays; the batch is the first axis of all of them.
      whole: the places of arguments that have no batch axis: every device gets all of them.
    """
    mesh = _mesh.get()
    if mesh is None:
        return function(*arguments)
    batch = next(x.shape[0] for i, tree in enumerate(arguments) if i not in whole for x in jax.tree.leaves(tree))
    rows = _rows(mesh, batch)
    places = tuple(PartitionSpec() if i in whole else rows for i in range(len(arguments)))
    return jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=rows, check_vma=False)(*arguments)
