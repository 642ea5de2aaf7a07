"""Where arrays are placed: a mesh of devices, and a table from parameter paths to mesh axes.

One device is a mesh of one. Modules carry no annotations; the first row of RULES whose pattern matches a
path decides. Optimizer state mirrors the parameters, so the same table places it.
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from seqmodels.config import MeshConfig
from seqmodels.errors import UserError
from seqmodels.ops.placement import BATCH_AXES

AXES = ("data", "fsdp", "tensor", "sequence")

Axes = tuple[str, ...] | str | None
_BOTH = ("tensor", "fsdp")

# Pattern on the path -> axes of the last dimensions (earlier ones, like the stacked repeats, stay whole).
# Vectors match none of them: together they are small, and every device has them whole (``replicated``).
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"conv_kernel$", (None, _BOTH)),  # a convolution's taps stay together
    (r"(query|key|value)_kernel$", (_BOTH, None, None)),  # mLSTM's blocks on a diagonal; other mixers' have two dimensions
    (r"(A_log|_real|_imag|shift_B|shift_C)$", (_BOTH, None)),  # channels x states
    (r"mix_in$", ("fsdp", None)),  # RWKV's low rank
    (r"mix(_out)?$", (None, "fsdp")),
    (r"layer/output_kernel$", ("tensor", "fsdp")),
    (r"kernel$", ("fsdp", "tensor")),
)

BATCH = PartitionSpec(BATCH_AXES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | int | None = None) -> Mesh | AbstractMesh:
    """The mesh of a config over ``devices`` (default: all), or over so many that are not there.

    Raises UserError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    count = devices if isinstance(devices, int) else len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
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
    return Mesh(_arranged(devices, sizes), AXES, axis_types=types)


def _arranged(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """Devices as an array of the mesh's sizes, so that those of the last axes are neighbours where the hardware says who is."""
    if devices[0].platform == "cpu" or len(devices) == 1:
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes[0] % slices == 0:  # slices of a TPU meet over the slow network: data parallelism sends least
        within = [sizes[0] // slices, *sizes[1:]]
        return mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1, 1], devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def path_name(path) -> str:
    """``layers/0/layer/query_kernel`` for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of one array: the table's, right-aligned. An axis that does not divide its dimension joins the other's."""
    dimensions = len(shape) - ("layers/" in path)  # of those that layers have, the first counts the repeats
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path) and len(axes) <= dimensions), ())
    wanted = [()] * (len(shape) - len(axes)) + [(each,) if isinstance(each, str) else each or () for each in axes]
    chosen, left = [() for _ in shape], []

    def place(axis, dimension):
        together = math.prod(mesh.shape[each] for each in (*chosen[dimension], axis))
        if shape[dimension] % together:
            return False
        chosen[dimension] += (axis,)
        return True

    for dimension, names in enumerate(wanted):
        left += [axis for axis in names if not place(axis, dimension)]
    for axis in left:
        any(place(axis, dimension) for dimension, names in enumerate(wanted) if names)
    # ``tensor`` first: what is left when ``fsdp`` is gathered is one piece.
    ordered = [tuple(sorted(names, key="tensor".__ne__)) for names in chosen]
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in ordered))


def replicated(shapes, mesh: Mesh) -> dict[str, int]:
    """Bytes of the arrays of a tree that every device of the mesh has whole, by path; empty on one device."""
    if mesh.size == 1:
        return {}
    return {
        path_name(path): math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)).is_fully_replicated
    }


def describe(shapes, mesh: Mesh) -> str:
    """One line: the mesh, and how much of a tree every device has whole."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    whole = replicated(shapes, mesh)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    largest = f", the largest {max(whole, key=whole.get)} with {max(whole.values()):,}" if whole else ""
    return f"mesh {axes}: of {total:,} bytes of parameters every device has {sum(whole.values()):,} whole{largest}"


def tree_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of a train state (or of parameters alone)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), tree
    )
