"""Where arrays live: a mesh of devices, and a table from parameter paths to mesh axes.

One device is a mesh of one. Modules carry no annotations; the first row of RULES whose pattern matches a
path decides. Optimizer state mirrors the parameters, so the same table places it.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from seqmodels.config import MeshConfig
from seqmodels.errors import UserError
from seqmodels.ops.placement import BATCH_AXES

AXES = ("data", "fsdp", "tensor", "sequence")

# Pattern on the path -> axes of the last dimensions (earlier ones, like the stacked repeats, stay whole).
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"layer/output_kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", "tensor")),
    (r"", ()),
)

BATCH = PartitionSpec(BATCH_AXES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | int | None = None) -> Mesh | AbstractMesh:
    """The mesh of a config over ``devices`` (default: all), or over so many that are not there.

    Raises UserError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    count = devices if isinstance(devices, int) else len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    if config.sequence != 1:
        raise UserError("mesh.sequence must be 1: sequence parallelism is not built yet")
    if any(size < 1 for size in sizes[1:]) or (config.data < 1 and config.data != -1):
        raise UserError(f"mesh sizes must be at least 1 (data may be -1), not {dict(zip(AXES, sizes))}")
    if config.data == -1:
        sizes[0] = max(1, count // math.prod(sizes[1:]))
    if math.prod(sizes) != count:
        asked = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
        raise UserError(f"the mesh {asked} does not make use of exactly the {count} device(s) there are")
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(devices, int):
        return AbstractMesh(tuple(sizes), AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def path_name(path) -> str:
    """``layers/0/layer/query_kernel`` for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one array: the table's, right-aligned, where they divide the array evenly."""
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    axes = (None,) * (len(shape) - len(axes)) + axes[max(0, len(axes) - len(shape)):]
    return PartitionSpec(*(
        axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)
    ))


def tree_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a train state (or of parameters alone)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), tree
    )
