"""The device that a function is traced for: the one JAX runs on, or another that is interpreted or compiled for."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import PartitionSpec

DEVICES = ("cpu", "tpu", "gpu")

_named = contextvars.ContextVar("seqmodels_ops_device", default=None)
_mesh = contextvars.ContextVar("seqmodels_ops_mesh", default=None)
_interpreting = contextvars.ContextVar("seqmodels_ops_interpreting", default=False)


@contextlib.contextmanager
def interpret(device: str = "tpu") -> Iterator[None]:
    """Inside this context the Pallas kernels for ``device`` run in their interpreter, on any machine.

    Read when a function is traced: a function that was compiled outside stays as it is.
    """
    tokens = _named.set(_known(device)), _interpreting.set(True)
    try:
        yield
    finally:
        _named.reset(tokens[0])
        _interpreting.reset(tokens[1])


@contextlib.contextmanager
def compile_for(device: str) -> Iterator[None]:
    """Inside this context functions are traced for ``device``: its kernels, chunk sizes and schedules.

    For compiling ahead of time on a machine without it.
    """
    token = _named.set(_known(device))
    try:
        yield
    finally:
        _named.reset(token)


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh, batch_axes: tuple[str, ...]) -> Iterator[None]:
    """Inside this context functions are traced for all devices of a mesh, over whose ``batch_axes`` the batch is split.

    XLA splits what it compiles over a mesh by itself; a kernel, which it cannot look into, has to be told (``by_rows``).
    """
    token = _mesh.set((mesh, batch_axes))
    try:
        yield
    finally:
        _mesh.reset(token)


def by_rows(function: Callable, *arguments, whole: tuple[int, ...] = ()):
    """``function(*arguments)``, on a mesh by every device for its own rows of the batch.

    Args:
      function: of trees of arrays, to trees of arrays; the batch is the first axis of all of them.
      whole: the places of arguments that have no batch axis: every device gets all of them.
    """
    if _mesh.get() is None or _mesh.get()[0].size == 1:
        return function(*arguments)
    mesh, axes = _mesh.get()
    batch = next(x.shape[0] for i, tree in enumerate(arguments) if i not in whole for x in jax.tree.leaves(tree))
    everything = PartitionSpec()
    # A batch that does not divide is computed by every device.
    rows = PartitionSpec(axes) if batch % math.prod(mesh.shape[axis] for axis in axes) == 0 else everything
    places = tuple(everything if i in whole else rows for i in range(len(arguments)))
    return jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=rows, check_vma=False)(*arguments)


def interpreting() -> bool:
    """Whether the caller is inside ``interpret()``."""
    return _interpreting.get()


def device() -> str:
    """What the caller is traced for, one of DEVICES."""
    named = _named.get()
    return jax.default_backend() if named is None else named


def _known(device):
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not one of {', '.join(DEVICES)}")
    return device
