"""Mamba's recurrence (``selective_scan.py``) on Hopper: the state stays in registers from the first step to the last.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t

A block is one warpgroup with one row of the batch and 64 or 128 of its E channels, h [channels, N] laid out as wgmma lays its results:
four threads share a channel, eight a state. So x_t and dt_t are rows read by channel, B_t and C_t rows read by state, the sum over
states that makes y_t is two shuffles, and the sum over channels that makes dB_t and dC_t is three and an exchange between four warps.
(One channel a thread, the obvious layout, makes those two sums 2 N exchanges among 128 threads for every step.)

Forward keeps the state every ``_KEPT`` steps. Backward goes through these stretches from the last: it runs the states before each of
its steps into shared memory, then the gradient's recurrence backwards:

    g_t = dy_t C_t^T + dh_t                              dh_{t-1} = exp(dt_t A) * g_t
    dx_t = dt_t (g_t . B_t)                              dB_t = g_t . (dt_t x_t)            dC_t = h_t . dy_t
    w_t = dh_{t-1} * h_{t-1}                             ddt_t = A . w_t + x_t (g_t . B_t)  dA = sum over t of dt_t w_t

dB and dC come out as one sum for each block of channels, dA as one for each row of the batch; XLA adds them up. Every exponent is that
of one step, <= 0; a reset selects the carry away. The exponentials are the bound: one a step, channel and state forward, two backward.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from seqmodels.ops.kernels.gpu import common

_STEPS = 32  # of a tile, forward
_KEPT = 8  # steps from one kept state to the next, and of a tile, backward: 64 KB of states at N = 16 and 128 channels
_TOGETHER = 2  # steps whose rows are loaded before the first is taken, forward
_MOST_STATES = 32
_STAGES = 2  # tiles in shared memory: the one in work and the next
_BLOCKS = 132  # enough to give every multiprocessor one


def unsupported_reason(x: Array, dt: Array, A: Array, B: Array, C: Array, chunk_size: int | None = None) -> str | None:
    """What keeps a call from the kernel."""
    if chunk_size is not None:
        return f"chunk_size={chunk_size}, and the kernel has no chunks to choose"
    if lacking := common.unsupported_reason():
        return lacking
    if A.shape[1] > _MOST_STATES:
        return f"N = {A.shape[1]} states a channel are more than {_MOST_STATES}"
    return None


def forward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    state: Float[Array, "B E N"],
    reset: Bool[Array, "B T"] | None,
    *,
    keep_starts: bool,
    interpret: bool,
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"], Float[Array, "rows E N"] | None]:
    """y in x's dtype, the final state, and the states at the starts of every ``_KEPT`` steps if they are kept, padded."""
    (batch, steps, channels), states = x.shape, A.shape[1]
    width, tiles, (T, E, N) = _padded(x, dt, B, C, reset)
    A, state = _pad(A, E, N), _pad(state, E, N).reshape(batch * E, N)

    def body(*refs):
        inputs, (A_ref, initial, y, final, *starts), y_s = refs[: len(tiles)], refs[len(tiles) : -1], refs[-1]
        b, e = lax.axis_index("row"), lax.axis_index("block")
        over_states, over_channels = _broadcasts(width, N)
        rate = _load(A_ref.at[pl.ds(e * width, width)])

        def advance(index, *carried):
            (n,), tile, h = index, dict(zip(tiles, carried)), carried[-1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y_s is free again

            def steps(first, h):
                times = [first + k for k in range(_TOGETHER)]
                rows = [[_by_channel(tile[name], t) for name in ("x", "dt")] for t in times]
                columns = [[_by_state(tile[name], t) for name in ("B", "C")] for t in times]
                ys = []
                for t, (x, dt), (B, C) in zip(times, rows, columns):
                    h = jnp.exp(over_states(dt) * rate) * _keep(h, tile, t) + over_states(dt * x) * over_channels(B)
                    ys.append(jnp.sum(h * over_channels(C), axis=1))
                for t, y_t in zip(times, ys):
                    y_s[t] = y_t.astype(y_s.dtype)
                return h

            def stretch(k, h):
                if keep_starts:
                    place = (b * (T // _KEPT) + n * (_STEPS // _KEPT) + k) * E + e * width
                    starts[0].at[pl.ds(place, width)][...] = h
                return lax.fori_loop(0, _KEPT // _TOGETHER, lambda j, h: steps(k * _KEPT + j * _TOGETHER, h), h)

            h = lax.fori_loop(0, _STEPS // _KEPT, stretch, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_s, y.at[pl.ds(b * T + n * _STEPS, _STEPS), pl.ds(e * width, width)])
            return h

        of_block = pl.ds(b * E + e * width, width)
        specs = _specs(tiles, _STEPS, width, lambda n: b * (T // _STEPS) + n, e)
        h = _pipeline(advance, T // _STEPS, specs, _load(initial.at[of_block]))(*inputs)
        final.at[of_block][...] = h
        plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct((batch * T, E), x.dtype),
        jax.ShapeDtypeStruct((batch * E, N), jnp.float32),
    ]
    if keep_starts:
        out_type.append(jax.ShapeDtypeStruct((batch * (T // _KEPT) * E, N), jnp.float32))
    y, final, *starts = common.launch(
        body,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((_STEPS, width), x.dtype)],
        grid={"row": batch, "block": E // width},
        interpret=interpret,
        barriers=False,
    )(*tiles.values(), A, state)
    y = y.reshape(batch, T, E)[:, :steps, :channels]
    final = final.reshape(batch, E, N)[:, :channels, :states]
    return y, final, starts[0].reshape(-1, E, N) if keep_starts else None


def backward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    starts: Float[Array, "rows E N"],
    dy: Float[Array, "B T E"],
    dfinal: Float[Array, "B E N"],
    *,
    interpret: bool,
) -> tuple[
    Float[Array, "B T E"],
    Float[Array, "B T E"],
    Float[Array, "E N"],
    Float[Array, "B T N"],
    Float[Array, "B T N"],
    Float[Array, "B E N"],
]:
    """The gradients of x, dt, A, B, C and the first state."""
    (batch, steps, channels), states = x.shape, A.shape[1]
    width, tiles, (T, E, N) = _padded(x, dt, B, C, reset, dy=dy, starts=starts)
    last = _pad(dfinal, E, N).reshape(batch * E, N)
    count = T // _KEPT

    def body(*refs):
        inputs, refs = refs[: len(tiles)], refs[len(tiles) :]
        A_ref, last, dx, ddt, dA, dB, dC, first, before, dx_s, ddt_s, dB_s, dC_s = refs
        b, e = lax.axis_index("row"), lax.axis_index("block")
        over_states, over_channels = _broadcasts(width, N)
        rate = _load(A_ref.at[pl.ds(e * width, width)])

        def advance(index, *carried):
            (i,), tile, (dh, dA) = index, dict(zip(tiles, carried)), carried[-1]
            n = count - 1 - i

            def recompute(t, h):
                x, dt = _by_channel(tile["x"], t), _by_channel(tile["dt"], t)
                h = _keep(h, tile, t)
                before[t] = h
                return jnp.exp(over_states(dt) * rate) * h + over_states(dt * x) * over_channels(_by_state(tile["B"], t))

            def step(j, carry):
                dh, dA = carry
                t = _KEPT - 1 - j
                x, dt, dy = (_by_channel(tile[name], t) for name in ("x", "dt", "dy"))
                B, C = over_channels(_by_state(tile["B"], t)), over_channels(_by_state(tile["C"], t))
                h_before, added = _load(before.at[t]), over_states(dt * x)
                decay = jnp.exp(over_states(dt) * rate)
                h = decay * h_before + added * B
                g = dh + over_states(dy) * C
                dh = g * decay
                w = dh * h_before
                written = jnp.sum(g * B, axis=1)
                dx_s[t] = (dt * written).astype(dx_s.dtype)
                ddt_s[t] = (jnp.sum(w * rate, axis=1) + x * written).astype(ddt_s.dtype)
                dB_s[t] = jnp.sum(g * added, axis=0)
                dC_s[t] = jnp.sum(h * over_states(dy), axis=0)
                return _keep(dh, tile, t), dA + w * over_states(dt)

            lax.fori_loop(0, _KEPT, recompute, _load(tile["starts"]))
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the four tiles are free again
            carry = lax.fori_loop(0, _KEPT, step, (dh, dA))
            plgpu.commit_smem()
            of_tile, of_block = pl.ds((b * count + n) * _KEPT, _KEPT), pl.ds(e * width, width)
            plgpu.copy_smem_to_gmem(dx_s, dx.at[of_tile, of_block])
            plgpu.copy_smem_to_gmem(ddt_s, ddt.at[of_tile, of_block])
            of_sums = pl.ds(((e * batch + b) * count + n) * _KEPT, _KEPT)
            plgpu.copy_smem_to_gmem(dB_s, dB.at[of_sums])
            plgpu.copy_smem_to_gmem(dC_s, dC.at[of_sums])
            return carry

        of_block = pl.ds(b * E + e * width, width)
        specs = _specs(tiles, _KEPT, width, lambda i: b * count + count - 1 - i, e)
        dh = _load(last.at[of_block])
        dh, dA_sum = _pipeline(advance, count, specs, (dh, jnp.zeros_like(dh)))(*inputs)
        first.at[of_block][...] = dh
        dA.at[of_block][...] = dA_sum
        plgpu.wait_smem_to_gmem(0)

    sums = jax.ShapeDtypeStruct((E // width * batch * T, N), jnp.float32)
    of_state = jax.ShapeDtypeStruct((batch * E, N), jnp.float32)
    dx, ddt, dA, dB, dC, first = common.launch(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch * T, E), x.dtype),
            jax.ShapeDtypeStruct((batch * T, E), dt.dtype),
            of_state,
            sums,
            sums,
            of_state,
        ],
        scratch_types=[
            plgpu.SMEM((_KEPT, width, N), jnp.float32),
            plgpu.SMEM((_KEPT, width), x.dtype),
            plgpu.SMEM((_KEPT, width), dt.dtype),
            plgpu.SMEM((_KEPT, N), jnp.float32),
            plgpu.SMEM((_KEPT, N), jnp.float32),
        ],
        grid={"row": batch, "block": E // width},
        interpret=interpret,
        barriers=False,
    )(*tiles.values(), _pad(A, E, N), last)
    dx, ddt = (d.reshape(batch, T, E)[:, :steps, :channels] for d in (dx, ddt))
    dA, first = (d.reshape(batch, E, N)[:, :channels, :states] for d in (dA, first))
    dB, dC = (jnp.sum(d.reshape(-1, batch, T, N), axis=0)[:, :steps, :states] for d in (dB, dC))
    return dx, ddt, jnp.sum(dA, axis=0).astype(A.dtype), dB.astype(B.dtype), dC.astype(C.dtype), first


# ---- around the kernels


def _padded(x, dt, B, C, reset, **others):
    """Channels of a block; the arrays by name as the kernels read them, [B T, ...]; T, E and N padded.

    A step of dt = 0 and x = 0 does nothing, a channel or a state of zeros stays so.
    """
    (batch, steps, channels), states = x.shape, B.shape[2]
    blocks = batch * -(-channels // common.WARPGROUP)
    width = common.WARPGROUP if blocks >= _BLOCKS else common.WARPGROUP // 2
    T, E, N = -(-steps // _STEPS) * _STEPS, -(-channels // width) * width, -(-states // 8) * 8
    arrays = {
        "x": _pad(x, T, E),
        "dt": _pad(dt, T, E),
        "B": _pad(B, T, N).astype(jnp.float32),
        "C": _pad(C, T, N).astype(jnp.float32),
    }
    if "dy" in others:
        arrays["dy"] = _pad(others["dy"], T, E)
    arrays = {name: array.reshape(batch * T, array.shape[-1]) for name, array in arrays.items()}
    if reset is not None:
        arrays["reset"] = common.marks(reset, T)
    if "starts" in others:
        arrays["starts"] = others["starts"]
    return width, arrays, (T, E, N)


def _pad(x, rows, columns):
    """Zeros after the last two axes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])])


# ---- inside the kernels


def _specs(tiles, steps, width, place, e):
    """The tiles of a pipeline: ``place`` says for the index of the loop which stretch of ``steps`` it is."""

    def spec(name, x):
        if name == "starts":
            return plgpu.BlockSpec((None, width, x.shape[-1]), lambda i: (place(i), e, 0))
        if name in ("B", "C", "reset"):
            return plgpu.BlockSpec((steps, x.shape[-1]), lambda i: (place(i), 0))
        return plgpu.BlockSpec((steps, width), lambda i: (place(i), e))

    return [spec(name, x) for name, x in tiles.items()]


def _pipeline(body, count, specs, carry):
    return plgpu.emit_pipeline(body, grid=(count,), in_specs=specs, max_concurrent_steps=_STAGES, init_carry=carry)


def _load(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _by_channel(ref, t):
    """Row t of a tile [steps, channels], float32, as it meets the rows of h."""
    return plgpu.load(ref.at[t], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)


def _by_state(ref, t):
    """Row t of a tile [steps, N], as it meets the columns of h."""
    return plgpu.load(ref.at[t], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def _broadcasts(width, states):
    """Over the states, for what a channel has; over the channels, for what a state has."""
    shape = (width, states)
    return lambda x: lax.broadcast_in_dim(x, shape, (0,)), lambda x: lax.broadcast_in_dim(x, shape, (1,))


def _keep(h, tile, t):
    """h where step t belongs to the same document as step t - 1, else zero."""
    if "reset" not in tile:
        return h
    starts = lax.broadcast_in_dim(tile["reset"][t, 0], h.shape, ()) != 0
    return jnp.where(starts, jnp.zeros_like(h), h)
