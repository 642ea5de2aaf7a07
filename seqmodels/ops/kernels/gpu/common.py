"""What the Mosaic GPU kernels share: what they need of JAX and of the device, and how they are launched."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int32

from seqmodels.ops import target

# The one that the kernels are written and compiled for: earlier ones lack the interpreter and half of what is used here.
NEEDS_JAX = (0, 11)
WARPGROUP = 128  # threads; every kernel is one warpgroup per block
LONGEST = 65_535  # blocks along any axis of a grid but the last one


def unsupported_reason() -> str | None:
    """Why no kernel of this kind can run here, whatever the call is."""
    if jax.__version_info__ < NEEDS_JAX:
        return f"the kernels for GPUs need JAX {'.'.join(map(str, NEEDS_JAX))} or later, and this is {jax.__version__}"
    if target.interpreting() or jax.default_backend() != "gpu":
        return None  # interpreted, or compiled for a device that is not here
    capability = jax.local_devices()[0].compute_capability
    if capability != "9.0":
        return f"the kernels for GPUs are for Hopper (compute capability 9.0), and this device has {capability}"
    return None


def marks(reset: Bool[Array, "B T"], steps: int) -> Int32[Array, "rows 4"]:
    """``reset`` with ``steps`` in time, as the kernels read it: a copy into shared memory moves rows of 16 bytes, and a tile of them
    has to be a multiple of 128 bytes, or the next stage's would not lie where such a copy may write.
    """
    reset = jnp.pad(reset, ((0, 0), (0, steps - reset.shape[1])))
    return jnp.broadcast_to(reset.reshape(-1, 1).astype(jnp.int32), (reset.size, 4))


def launch(
    body: Callable[..., None],
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch_types: Sequence[Any],
    grid: dict[str, int],
    interpret: bool,
    barriers: bool = True,
) -> Callable[..., list[jax.Array]]:
    """``body(*inputs, *outputs, *scratch)`` over a grid of blocks, as a function of the inputs.

    Args:
      grid: the size of each axis by its name; blocks of the last axis run side by side. One axis may have more blocks than
        ``LONGEST``, and is taken to be the last.
      barriers: whether Mosaic puts a barrier before and after every store to shared memory. Without them the body has to end
        every stretch of stores whose values other threads (or a copy) read with ``commit_smem``.
    """
    grid = dict(sorted(grid.items(), key=lambda axis: axis[1] > LONGEST))
    return plgpu.kernel(
        body,
        out_type=list(out_type),
        scratch_types=list(scratch_types),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not barriers),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def call(
    body: Callable[[types.SimpleNamespace], None],
    inputs: Mapping[str, jax.Array],
    *,
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    grid: dict[str, int],
    interpret: bool,
    barriers: bool = True,
) -> dict[str, jax.Array]:
    """Runs ``body`` over a grid of blocks, as ``launch`` does: it finds inputs, outputs and scratch memory by their names.

    Returns:
      The outputs by name.
    """
    names = (*inputs, *outputs, *scratch)

    def by_name(*refs):
        body(types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    by_name.__name__ = body.__name__
    found = launch(
        by_name, out_type=list(outputs.values()), scratch_types=list(scratch.values()),
        grid=grid, interpret=interpret, barriers=barriers,
    )(*inputs.values())  # fmt: skip
    return dict(zip(outputs, found, strict=True))
