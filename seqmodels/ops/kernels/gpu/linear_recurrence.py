"""The elementwise recurrence (``linear_recurrence.py``) on Hopper: one thread a channel, step after step, either way in time.

    h_t = a_t * h_{t-1} + b_t                     forward
    g_t = b_t + carry,   carry = a_t * g_t        reverse, backwards in time: the gradient, with b = dh

A block is one warpgroup with one row of the batch and 128 channels; the carry is a register. ``emit_pipeline`` keeps the next tiles of
a and b on their way into shared memory, so that the chain of steps waits for no load from device memory. A complex number is two
real planes. A reset selects: h before the step forward, a_t g_t in reverse. Everything is float32. The bound is the traffic, 12 bytes
a step and channel (24 for complex ones).
"""

import math

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
    batch, steps = a.shape[:2]
    channels = math.prod(a.shape[2:])
    size = len(_planes(carry))
    length = _STEPS // size  # of a tile: complex numbers are two
    T, E = -(-steps // length) * length, -(-channels // _CHANNELS) * _CHANNELS
    count = T // length

    def padded(x, fill, steps):
        """[B, any, *channels] as planes [B steps, E]."""
        x = x.reshape(batch, -1, channels)
        missing = ((0, 0), (0, steps - x.shape[1]), (0, E - channels))
        return _planes(jnp.pad(x, missing, constant_values=fill).reshape(batch * steps, E))

    # A padded step has a = 1 and b = 0: it keeps any carry.
    by_step, carries = [*padded(a, 1, T), *padded(b, 0, T)], padded(carry[:, None], 0, 1)
    if reset is not None:
        by_step.append(common.marks(reset, T))

    def body(*refs):
        inputs, refs = refs[: len(by_step)], refs[len(by_step) :]
        initial, outputs, final, tiles = (refs[i * size : (i + 1) * size] for i in range(4))
        row, block = lax.axis_index("row"), lax.axis_index("block")
        columns = pl.ds(block * _CHANNELS, _CHANNELS)

        def place(i):
            return row * count + (count - 1 - i if reverse else i)

        def advance(index, *carried):
            (i,), tile, carry = index, carried[:-1], carried[-1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the outputs' tiles are free again

            def steps(j, carry):
                times = [j * _TOGETHER + k for k in range(_TOGETHER)]
                if reverse:
                    times = [length - 1 - t for t in times]
                a, b = ([[_load(ref.at[t]) for ref in tile[k * size : (k + 1) * size]] for t in times] for k in range(2))
                starts = [None if reset is None else tile[-1][t, 0] for t in times]
                outputs = []
                for a_t, b_t, start in zip(a, b, starts):
                    if reverse:
                        outputs.append([x + y for x, y in zip(b_t, carry)])
                        carry = _keep(_times(a_t, outputs[-1]), start)
                    else:
                        carry = [x + y for x, y in zip(_times(a_t, _keep(carry, start)), b_t)]
                        outputs.append(carry)
                for t, output in zip(times, outputs):
                    for ref, part in zip(tiles, output):
                        ref[t] = part
                return carry

            carry = lax.fori_loop(0, length // _TOGETHER, steps, carry)
            plgpu.commit_smem()
            for ref, output in zip(tiles, outputs):
                plgpu.copy_smem_to_gmem(ref, output.at[pl.ds(place(i) * length, length), columns])
            return carry

        of_steps = plgpu.BlockSpec((length, _CHANNELS), lambda i: (place(i), block))
        specs = [of_steps] * (2 * size)
        if reset is not None:
            specs.append(plgpu.BlockSpec((length, 4), lambda i: (place(i), 0)))
        carry = plgpu.emit_pipeline(
            advance,
            grid=(count,),
            in_specs=specs,
            max_concurrent_steps=_STAGES,
            init_carry=[_load(ref.at[row, columns]) for ref in initial],
        )(*inputs)
        for ref, part in zip(final, carry):
            ref.at[row, columns][...] = part
        plgpu.wait_smem_to_gmem(0)

    results = common.launch(
        body,
        out_type=[
            *[jax.ShapeDtypeStruct((batch * T, E), jnp.float32)] * size,
            *[jax.ShapeDtypeStruct((batch, E), jnp.float32)] * size,
        ],
        scratch_types=[plgpu.SMEM((length, _CHANNELS), jnp.float32)] * size,
        grid={"row": batch, "block": E // _CHANNELS},
        interpret=interpret,
        barriers=False,
    )(*by_step, *carries)
    outputs, final = _number(results[:size]), _number(results[size:])
    return outputs.reshape(batch, T, E)[:, :steps, :channels].reshape(b.shape), final[:, :channels].reshape(carry.shape)


def _planes(x):
    """The real planes of a number."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _number(planes):
    """The number of real planes."""
    return planes[0] if len(planes) == 1 else lax.complex(*planes)


def _times(x, y):
    """The product of two numbers in planes."""
    if len(x) == 1:
        return [x[0] * y[0]]
    return [x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]]


def _keep(x, start):
    """x, a number in planes, unless the step is the start of a document; then zero."""
    if start is None:
        return x
    starts = lax.broadcast_in_dim(start, x[0].shape, ()) != 0
    return [jnp.where(starts, jnp.zeros_like(part), part) for part in x]


def _load(ref):
    """A row of 128 channels, one a thread."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((_CHANNELS,), vec_size=1))
