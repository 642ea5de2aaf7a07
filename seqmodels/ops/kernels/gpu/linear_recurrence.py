"""The elementwise recurrence (``linear_recurrence.py``) on Hopper: one thread a channel, step after step, either way in time.

    h_t = a_t * h_{t-1} + b_t                     forward
    g_t = b_t + carry,   carry = a_t * g_t        reverse, backwards in time: the gradient, with b = d_h

A block is one warpgroup with one row of the batch and 128 channels; the carry is a register. ``emit_pipeline`` keeps the next tiles of
a and b on their way into shared memory, so that the chain of steps waits for no load from device memory. A complex number is two
real planes. A reset selects: h before the step forward, a_t g_t in reverse. Everything is float32. The bound is the traffic, 12 bytes
a step and channel (24 for complex ones).
"""

import math
import types
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Inexact

from seqmodels.ops.kernels.gpu import common

_STEPS = 32  # of a tile of real numbers
_TOGETHER = 4  # steps whose rows are loaded before the first is taken: the chain is of multiply-adds, not of loads as well
_STAGES = 3  # tiles in shared memory: enough bytes on their way to hide a microsecond of latency
_CHANNELS = common.WARPGROUP


def unsupported_reason(dtype: jnp.dtype) -> str | None:
    """What keeps a call from the kernel: nothing but what keeps every call."""
    return common.unsupported_reason()


def scan(
    a: Inexact[Array, "B T *channels"],
    b: Inexact[Array, "B T *channels"],
    carry: Inexact[Array, " B *channels"],
    reset: Bool[Array, "B T"] | None,
    *,
    reverse: bool,
    interpret: bool,
) -> tuple[Inexact[Array, "B T *channels"], Inexact[Array, " B *channels"]]:
    """All outputs and the last carry, in the dtype of the arguments, float32 or complex64."""
    step = _backward_step if reverse else _forward_step
    sizes = _Sizes.of(a)
    # A padded step has a = 1 and b = 0: it keeps any carry.
    tiles = sizes.flat("a", a, fill=1) | sizes.flat("b", b)
    if reset is not None:
        tiles["reset"] = common.marks(reset, sizes.T)

    def body(ref):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        columns = pl.ds(block * _CHANNELS, _CHANNELS)

        def of_tile(i):
            """The number of the tile, among those of all rows, that is worked on at step i."""
            return row * sizes.tiles + (sizes.tiles - 1 - i if reverse else i)

        def advance(index, *refs):
            tile, carry = types.SimpleNamespace(**dict(zip(tiles, refs))), refs[-1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of outputs are free again

            def steps(j, carry):
                times = [j * _TOGETHER + k for k in range(_TOGETHER)]
                times = [sizes.length - 1 - t for t in times] if reverse else times
                a, b = ([[_load(plane.at[t]) for plane in sizes.planes(tile, name)] for t in times] for name in ("a", "b"))
                starts = [None if reset is None else tile.reset[t, 0] for t in times]
                outputs = []
                for a_t, b_t, start in zip(a, b, starts):
                    output, carry = step(a_t, b_t, carry, start)
                    outputs.append(output)
                for t, output in zip(times, outputs):
                    for plane, x in zip(sizes.planes(ref, "output_s"), output):
                        plane[t] = x
                return carry

            carry = lax.fori_loop(0, sizes.length // _TOGETHER, steps, carry)
            plgpu.commit_smem()
            rows = pl.ds(of_tile(index[0]) * sizes.length, sizes.length)
            for plane, output in zip(sizes.planes(ref, "output_s"), sizes.planes(ref, "output")):
                plgpu.copy_smem_to_gmem(plane, output.at[rows, columns])
            return carry

        def spec(name):
            if name == "reset":
                return plgpu.BlockSpec((sizes.length, 4), lambda i: (of_tile(i), 0))
            return plgpu.BlockSpec((sizes.length, _CHANNELS), lambda i: (of_tile(i), block))

        carry = plgpu.emit_pipeline(
            advance,
            grid=(sizes.tiles,),
            in_specs=[spec(name) for name in tiles],
            max_concurrent_steps=_STAGES,
            init_carry=[_load(plane.at[row, columns]) for plane in sizes.planes(ref, "carry")],
        )(*(getattr(ref, name) for name in tiles))
        for plane, x in zip(sizes.planes(ref, "final"), carry):
            plane.at[row, columns][...] = x
        plgpu.wait_smem_to_gmem(0)

    names = {name: [f"{name}_{i}" for i in range(sizes.size)] for name in ("output", "final", "output_s")}
    found = common.call(
        body,
        tiles | sizes.flat("carry", carry[:, None], steps=1),
        outputs=dict.fromkeys(names["output"], jax.ShapeDtypeStruct((sizes.B * sizes.T, sizes.E), jnp.float32))
        | dict.fromkeys(names["final"], jax.ShapeDtypeStruct((sizes.B, sizes.E), jnp.float32)),
        scratch=dict.fromkeys(names["output_s"], plgpu.SMEM((sizes.length, _CHANNELS), jnp.float32)),
        grid={"row": sizes.B, "block": sizes.E // _CHANNELS},
        interpret=interpret,
        barriers=False,
    )
    return sizes.unflat(found, "output", b.shape), sizes.unflat(found, "final", (carry.shape[0], 1, *carry.shape[1:]))[:, 0]


class _Sizes(NamedTuple):
    """B rows of T steps and E channels, padded to whole tiles; a number is ``size`` planes: its real part, and an imaginary one."""

    B: int
    T: int
    E: int
    size: int

    @classmethod
    def of(cls, a: Inexact[Array, "B T *channels"]) -> "_Sizes":
        size = 2 if jnp.iscomplexobj(a) else 1
        channels = math.prod(a.shape[2:])
        length = _STEPS // size
        return cls(a.shape[0], -(-a.shape[1] // length) * length, -(-channels // _CHANNELS) * _CHANNELS, size)

    @property
    def length(self) -> int:
        """Steps of a tile: as many bytes of complex numbers."""
        return _STEPS // self.size

    @property
    def tiles(self) -> int:
        """Of a row."""
        return self.T // self.length

    def flat(self, name: str, x: Inexact[Array, "B any *channels"], *, fill=0, steps: int | None = None) -> dict[str, Array]:
        """The planes by ``name`` and number, [B steps, E]; T steps unless it is said."""
        steps = steps or self.T
        x = x.reshape(*x.shape[:2], -1)
        x = jnp.pad(x, ((0, 0), (0, steps - x.shape[1]), (0, self.E - x.shape[2])), constant_values=fill)
        x = x.reshape(self.B * steps, self.E)
        return {f"{name}_{i}": plane for i, plane in enumerate([x.real, x.imag] if self.size == 2 else [x])}

    def unflat(self, found: dict[str, Array], name: str, shape: Sequence[int]) -> Inexact[Array, "B steps *channels"]:
        """``flat`` undone."""
        planes = [found[f"{name}_{i}"].reshape(self.B, -1, self.E) for i in range(self.size)]
        x = planes[0] if self.size == 1 else lax.complex(*planes)
        return x[:, : shape[1], : math.prod(shape[2:])].reshape(shape)

    def planes(self, ref: types.SimpleNamespace, name: str) -> list:
        return [getattr(ref, f"{name}_{i}") for i in range(self.size)]


# ---- inside the kernel: numbers in planes


def _forward_step(a, b, carry, start):
    """(h, what the next step gets)."""
    h = [x + y for x, y in zip(_times(a, _keep(carry, start)), b)]
    return h, h


def _backward_step(a, b, carry, start):
    """(g, what the step before gets)."""
    g = [x + y for x, y in zip(b, carry)]
    return g, _keep(_times(a, g), start)


def _times(x, y):
    """The product of two numbers."""
    if len(x) == 1:
        return [x[0] * y[0]]
    return [x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]]


def _keep(x, start):
    """x unless the step is the start of a document; then zero."""
    if start is None:
        return x
    starts = lax.broadcast_in_dim(start, x[0].shape, ()) != 0
    return [jnp.where(starts, jnp.zeros_like(part), part) for part in x]


def _load(ref):
    """A row of 128 channels, one a thread."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((_CHANNELS,), vec_size=1))
