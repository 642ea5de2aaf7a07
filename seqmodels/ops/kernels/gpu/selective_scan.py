"""Mamba's recurrence (``selective_scan.py``) on Hopper: the state stays in registers from the first step to the last.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T,   y_t = h_t C_t

A block is one warpgroup with one row of the batch and ``width``, 64 or 128, of its E channels. A thread has N / 4 states of
``width`` / 32 channels that lie side by side: a row of x or dt is one load. Four threads share a channel, all eight of the others in a
warp, and the four warps, a state. A is multiplied by log2(e) once, so that exp(dt_t A) is one product and one instruction.

Forward, the sum over states that makes y_t is two shuffles, and the state is kept every ``_KEPT`` steps. Backward goes through these
stretches from the last: it makes the states before each of its steps again, in registers, then runs the gradient's recurrence
backwards:

    g_t = d_y_t C_t^T + d_h_t                              d_h_{t-1} = exp(dt_t A) * g_t
    d_x_t = dt_t (g_t . B_t)                               d_B_t = g_t . (dt_t x_t)             d_C_t = h_t . d_y_t
    w_t = d_h_{t-1} * h_{t-1}                              d_dt_t = A . w_t + x_t (g_t . B_t)   d_A = sum over t of dt_t w_t

Four sums of a step are over numbers of several threads: g_t . B_t and A . w_t over the states, d_B_t and d_C_t over the channels. Each
thread leaves what its own numbers add up to in shared memory. Once a stretch, after a barrier, the threads are divided anew, among
steps and sums, and add all of them up. d_B and d_C come out as one sum for each block of channels, d_A as one for each row of the
batch; XLA adds them up. Every exponent is that of one step, <= 0; a reset selects the carry away.

No exponential is a polynomial. With 16 states of 128 channels a step takes a thread 133 instructions forward and 360 backward, and its
16 and 32 exponentials occupy their unit for 128 and 256 cycles; each one made of multiply-adds would be ten instructions more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from seqmodels.ops.kernels.gpu import common

_STEPS = 32  # of a tile, forward
_KEPT = 8  # steps from one kept state to the next, and of a tile, backward: their states are 128 registers a thread
_TOGETHER = 2  # steps whose rows are loaded before the first is taken, forward
_MOST_STATES = 32
_WIDE_STATES = 16  # the most of which a thread has registers for its states of 8 steps in a block of 128 channels
_STAGES = 2  # tiles in shared memory: the one in work and the next
_BLOCKS = 132  # enough to give every multiprocessor one
_WARPS, _SHARED, _LANES = 4, 4, 8  # of a block; threads of a warp that share a channel, and that share a state
_LOG2_E = 1.4426950408889634

# A thread has a step, every fourth state and, of the eight threads that share it, two.
_BY_STEP_AND_STATE = plgpu.Layout.TILED(
    plgpu.Tiling(((_KEPT, 1, 1, _SHARED, _LANES), (2, 1, 1, _SHARED, _LANES), (2,))),
    warp_dims=(-11,), lane_dims=(-6, -3, -2), vector_dim=-1,
)  # fmt: skip


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
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"], Float[Array, "rows blocks N channels"] | None]:
    """y in x's dtype, the final state, and the states at the starts of every ``_KEPT`` steps if they are kept, as ``backward``
    reads them.
    """
    sizes = _Sizes.of(x, A, interpret)
    tiles = sizes.tiles(x=x, dt=dt, B=B, C=C, reset=reset)

    def body(ref):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        rate = sizes.state(ref.A.at[sizes.of_block(0, block)]) * _LOG2_E

        def advance(n, tile, h):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y_s is free again

            def steps(first, h):
                times = [first + k for k in range(_TOGETHER)]
                rows = [[sizes.by_channel(tile[name], t) for name in ("x", "dt")] for t in times]
                columns = [[sizes.by_state(tile[name], t) for name in ("B", "C")] for t in times]
                ys = []
                for t, (x, dt), (B, C) in zip(times, rows, columns):
                    h = sizes.step(rate, _keep(h, tile, t), x, dt, B)
                    ys.append(jnp.sum(jnp.sum(h * sizes.over_channels(C), axis=1), axis=1))
                for t, y in zip(times, ys):
                    sizes.store(ref.y_s.at[t], y)
                return h

            def stretch(k, h):
                if keep_starts:
                    kept = row * (sizes.T // _KEPT) + n * (_STEPS // _KEPT) + k
                    ref.starts.at[sizes.of_block(kept, block)][...] = h
                return lax.fori_loop(0, _KEPT // _TOGETHER, lambda j, h: steps(k * _KEPT + j * _TOGETHER, h), h)

            h = lax.fori_loop(0, _STEPS // _KEPT, stretch, h)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref.y_s, ref.y.at[sizes.of_steps(row, n, block, _STEPS)])
            return h

        h = sizes.state(ref.state.at[sizes.of_block(row, block)])
        h = sizes.run(advance, ref, tiles, row, block, _STEPS, carry=h)
        ref.final.at[sizes.of_block(row, block)][...] = h
        plgpu.wait_smem_to_gmem(0)

    outputs = {"y": jax.ShapeDtypeStruct((sizes.B * sizes.T, sizes.E), x.dtype), "final": sizes.states(sizes.B)}
    if keep_starts:
        outputs["starts"] = sizes.states(sizes.B * sizes.T // _KEPT)
    found = common.call(
        body, tiles | {"A": sizes.flat_state(A), "state": sizes.flat_state(state)},
        outputs=outputs, scratch={"y_s": plgpu.SMEM((_STEPS, sizes.width), x.dtype)},
        grid=sizes.grid, interpret=interpret, barriers=False,
    )  # fmt: skip
    final = sizes.unflat_state(found["final"], state.shape)
    return sizes.unflat(found["y"], x.shape), final, sizes.tiled_states(found["starts"]) if keep_starts else None


def backward(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    starts: Float[Array, "rows blocks N channels"],
    d_y: Float[Array, "B T E"],
    d_final: Float[Array, "B E N"],
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
    sizes = _Sizes.of(x, A, interpret)
    tiles = sizes.tiles(x=x, dt=dt, B=B, C=C, d_y=d_y, reset=reset) | {"starts": starts}
    stretches = sizes.T // _KEPT

    def body(ref):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        rate = sizes.state(ref.A.at[sizes.of_block(0, block)]) * _LOG2_E

        def stretch(n, tile, carry):
            before = states_before(tile)
            carry = back_through(tile, before, carry)
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
            add_up(tile)
            plgpu.commit_smem()
            of_sums = pl.ds(((block * sizes.B + row) * stretches + n) * _KEPT, _KEPT)
            for name in ("d_x", "d_dt"):
                plgpu.copy_smem_to_gmem(getattr(ref, f"{name}_s"), getattr(ref, name).at[sizes.of_steps(row, n, block, _KEPT)])
            for name in ("d_B", "d_C"):
                plgpu.copy_smem_to_gmem(getattr(ref, f"{name}_s"), getattr(ref, name).at[of_sums])
            return carry

        def states_before(tile):
            """Of every step; leaves the parts of d_C, which is of the states after them."""
            h, before = sizes.state(tile["starts"]), []
            for t in range(_KEPT):
                x, dt, d_y = (sizes.by_channel(tile[name], t) for name in ("x", "dt", "d_y"))
                before.append(_keep(h, tile, t))
                h = sizes.step(rate, before[t], x, dt, sizes.by_state(tile["B"], t))
                ref.d_C_parts[t] = jnp.sum(h * sizes.over_states(d_y), axis=4)
            return before

        def back_through(tile, before, carry):
            """(d_h, d_A) before the stretch of those after it; leaves the parts of d_B, of g . B and of A . w."""
            d_h, d_A = carry
            for t in reversed(range(_KEPT)):
                x, dt, d_y = (sizes.by_channel(tile[name], t) for name in ("x", "dt", "d_y"))
                B, C = (sizes.over_channels(sizes.by_state(tile[name], t)) for name in ("B", "C"))
                g = d_h + sizes.over_states(d_y) * C
                d_h = g * jnp.exp2(sizes.over_states(dt) * rate)
                w = d_h * before[t]
                d_A = d_A + w * sizes.over_states(dt)
                d_h = _keep(d_h, tile, t)
                ref.d_B_parts[t] = jnp.sum(g * sizes.over_states(dt * x), axis=4)
                ref.written_parts[t] = jnp.sum(g * B, axis=1)
                ref.faded_parts[t] = jnp.sum(w * rate, axis=1)
            return d_h, d_A

        def add_up(tile):
            """The parts of a stretch into the tiles of its gradients."""
            x, dt = (sizes.of_stretch(tile[name]) for name in ("x", "dt"))
            written, faded = (sizes.sum_over_states(parts) for parts in (ref.written_parts, ref.faded_parts))
            sizes.store(ref.d_x_s, dt * written)
            sizes.store(ref.d_dt_s, faded * (1 / _LOG2_E) + x * written)
            sizes.store(ref.d_B_s, sizes.sum_over_channels(ref.d_B_parts))
            sizes.store(ref.d_C_s, sizes.sum_over_channels(ref.d_C_parts))

        of_block = sizes.of_block(row, block)
        d_h = sizes.state(ref.last.at[of_block])
        d_h, d_A = sizes.run(stretch, ref, tiles, row, block, _KEPT, carry=(d_h, jnp.zeros_like(d_h)), reverse=True)
        ref.first.at[of_block][...] = d_h
        ref.d_A.at[of_block][...] = d_A
        plgpu.wait_smem_to_gmem(0)

    sums = jax.ShapeDtypeStruct((sizes.E // sizes.width * sizes.B * sizes.T, sizes.N), jnp.float32)
    found = common.call(
        body, tiles | {"A": sizes.flat_state(A), "last": sizes.flat_state(d_final)},
        outputs={
            "d_x": jax.ShapeDtypeStruct((sizes.B * sizes.T, sizes.E), x.dtype),
            "d_dt": jax.ShapeDtypeStruct((sizes.B * sizes.T, sizes.E), dt.dtype),
            "d_A": sizes.states(sizes.B), "d_B": sums, "d_C": sums, "first": sizes.states(sizes.B),
        },
        scratch={
            "d_x_s": plgpu.SMEM((_KEPT, sizes.width), x.dtype), "d_dt_s": plgpu.SMEM((_KEPT, sizes.width), dt.dtype),
            **dict.fromkeys(("d_B_s", "d_C_s"), plgpu.SMEM((_KEPT, sizes.N), jnp.float32)),
            **dict.fromkeys(("d_B_parts", "d_C_parts"), plgpu.SMEM((_KEPT, *sizes.of_threads[:4]), jnp.float32)),
            **dict.fromkeys(
                ("written_parts", "faded_parts"), plgpu.SMEM((_KEPT, _WARPS, _SHARED, _LANES, sizes.V), jnp.float32)
            ),
        },
        grid=sizes.grid, interpret=interpret, barriers=False,
    )  # fmt: skip
    d_x, d_dt = (sizes.unflat(found[name], x.shape) for name in ("d_x", "d_dt"))
    d_A, first = (sizes.unflat_state(found[name], d_final.shape) for name in ("d_A", "first"))
    d_B, d_C = (jnp.sum(found[name].reshape(-1, sizes.B, sizes.T, sizes.N), axis=0) for name in ("d_B", "d_C"))
    d_B, d_C = (d[:, : B.shape[1], : B.shape[2]].astype(array.dtype) for d, array in ((d_B, B), (d_C, C)))
    return d_x, d_dt, jnp.sum(d_A, axis=0).astype(A.dtype), d_B, d_C, first


class _Sizes(NamedTuple):
    """B rows of T steps; E channels, of which a block has ``width``; N states. Padded: a step of dt = 0 and x = 0 does nothing, a
    channel or a state of zeros stays so.

    ``of_threads``, the shape of a block's states, is [4, N / 4, 4, 8, V]: a warp has 8 V channels that lie side by side, V for each of
    eight threads, and the states n, n + 4, n + 8, ... for each of four. The second and the last axis are in a thread's registers.
    """

    B: int
    T: int
    E: int
    N: int
    width: int
    interpret: bool

    @classmethod
    def of(cls, x: Float[Array, "B T E"], A: Float[Array, "E N"], interpret: bool) -> "_Sizes":
        (batch, steps, channels), states = x.shape, A.shape[1]
        wide = batch * -(-channels // common.WARPGROUP) >= _BLOCKS and states <= _WIDE_STATES
        width = common.WARPGROUP if wide else common.WARPGROUP // 2
        return cls(batch, -(-steps // _STEPS) * _STEPS, -(-channels // width) * width, -(-states // 8) * 8, width, interpret)

    @property
    def V(self) -> int:
        return self.width // (_WARPS * _LANES)

    @property
    def of_threads(self) -> tuple[int, ...]:
        """The shape of a block's states."""
        return _WARPS, self.N // _SHARED, _SHARED, _LANES, self.V

    @property
    def grid(self) -> dict[str, int]:
        return {"row": self.B, "block": self.E // self.width}

    # ---- around the kernels

    def tiles(self, *, reset, **arrays) -> dict[str, Array]:
        """Arrays by name as the kernels read them, [B T, ...]."""
        arrays = {
            name: self._padded(x, self.N).astype(jnp.float32) if name in ("B", "C") else self._padded(x, self.E)
            for name, x in arrays.items()
        }
        return arrays if reset is None else arrays | {"reset": common.marks(reset, self.T)}

    def _padded(self, x, columns):
        x = jnp.pad(x, ((0, 0), (0, self.T - x.shape[1]), (0, columns - x.shape[2])))
        return x.reshape(-1, columns)

    def unflat(self, x: Float[Array, "B*T E"], shape) -> Float[Array, "B steps channels"]:
        return x.reshape(self.B, self.T, self.E)[:, : shape[1], : shape[2]]

    def flat_state(self, x: Float[Array, "*rows channels states"]) -> Float[Array, "rows*E/8/V N/4 4 8 V"]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, self.E - x.shape[-2]), (0, self.N - x.shape[-1])])
        return jnp.swapaxes(x.reshape(-1, _LANES * self.V, self.N), 1, 2).reshape(-1, *self.of_threads[1:])

    def unflat_state(self, x: Float[Array, "B*E/8/V N/4 4 8 V"], shape) -> Float[Array, "B channels states"]:
        x = jnp.swapaxes(x.reshape(-1, self.N, _LANES * self.V), 1, 2)
        return x.reshape(self.B, self.E, self.N)[:, : shape[1], : shape[2]]

    def states(self, rows: int) -> jax.ShapeDtypeStruct:
        """Those of all channels for so many rows, as ``flat_state`` leaves them."""
        return jax.ShapeDtypeStruct((rows * self.E // (_LANES * self.V), *self.of_threads[1:]), jnp.float32)

    def tiled_states(self, x: Float[Array, "rows*E/8/V N/4 4 8 V"]) -> Float[Array, "rows E/8/V N 8*V"]:
        """As a copy into shared memory reads them: it moves 16 bytes or more at a time."""
        return x.reshape(-1, self.E // (_LANES * self.V), self.N, _LANES * self.V)

    # ---- inside the kernels

    def of_block(self, row, block):
        """Of states, those of a row's block of channels."""
        return pl.ds((row * (self.E // self.width) + block) * _WARPS, _WARPS)

    def of_steps(self, row, n, block, steps):
        """Of [B T, E], tile n of ``steps``."""
        return pl.ds(row * self.T + n * steps, steps), pl.ds(block * self.width, self.width)

    def run(self, body: Callable, ref, tiles, row, block, steps: int, *, carry: Any, reverse: bool = False) -> Any:
        """``body(n, tiles in shared memory, carry) -> carry`` for every tile of ``steps``."""
        count = self.T // steps

        def number(i):
            return count - 1 - i if reverse else i

        def spec(name, x):
            if name == "starts":
                return plgpu.BlockSpec((None, _WARPS, *x.shape[2:]), lambda i: (row * count + number(i), block, 0, 0))
            if name in ("B", "C", "reset"):
                return plgpu.BlockSpec((steps, x.shape[-1]), lambda i: (row * count + number(i), 0))
            return plgpu.BlockSpec((steps, self.width), lambda i: (row * count + number(i), block))

        def by_name(index, *refs):
            return body(number(index[0]), dict(zip(tiles, refs)), refs[-1])

        return plgpu.emit_pipeline(
            by_name,
            grid=(count,),
            in_specs=[spec(name, x) for name, x in tiles.items()],
            max_concurrent_steps=_STAGES,
            init_carry=carry,
        )(*(getattr(ref, name) for name in tiles))

    def load(self, ref, layout, *shape: int) -> Array:
        """What a tile holds, by threads; ``layout`` None: as what it is combined with wants it."""
        if self.interpret:  # which knows no other shape of a reference
            return plgpu.load(ref, layout=layout, optimized=False).reshape(shape)
        return plgpu.load(ref.reshape(shape), layout=layout, optimized=False)

    def store(self, ref, x: Array) -> None:
        """``load`` the other way, in the dtype of the tile."""
        x = x.astype(ref.dtype)
        if self.interpret:
            ref[...] = x.reshape(ref.shape)
        else:
            ref.reshape(x.shape)[...] = x

    def state(self, ref) -> Float[Array, "4 N/4 4 8 V"]:
        return self.load(ref, self._layout, *self.of_threads)

    def by_channel(self, ref, t) -> Float[Array, "4 8 V"]:
        """Row t of a tile [steps, width]."""
        return self.load(ref.at[t], None, _WARPS, _LANES, self.V).astype(jnp.float32)

    def by_state(self, ref, t) -> Float[Array, "N/4 4"]:
        """Row t of a tile [steps, N]."""
        return self.load(ref.at[t], None, self.N // _SHARED, _SHARED)

    def over_states(self, x: Float[Array, "4 8 V"]) -> Float[Array, "4 N/4 4 8 V"]:
        return self._over(x, 0, 3, 4)

    def over_channels(self, x: Float[Array, "N/4 4"]) -> Float[Array, "4 N/4 4 8 V"]:
        return self._over(x, 1, 2)

    def _over(self, x, *axes: int) -> Float[Array, "4 N/4 4 8 V"]:
        """x along ``axes``, over the others, in layouts that are said. Mosaic's inference would guess that of one broadcast after the
        other, and go through the constraints of the whole program after each guess.
        """
        if self.interpret:
            return lax.broadcast_in_dim(x, self.of_threads, axes)
        others = tuple(axis for axis in range(len(self.of_threads)) if axis not in axes)
        result = plgpu.ShapeDtypeStruct(self.of_threads, x.dtype, layout=self._layout)

        @plgpu.inline_mgpu(arg_types=(self._layout.reduce(others),), return_type=result)
        def broadcast(_, x):
            return x.broadcast_in_dim(self.of_threads, axes, self._layout.to_mgpu())

        return broadcast(x)

    def step(self, rate, h, x, dt, B):
        """The state after a step."""
        return jnp.exp2(self.over_states(dt) * rate) * h + self.over_states(dt * x) * self.over_channels(B)

    def sum_over_states(self, parts) -> Float[Array, "8 4 8 V"]:
        """What the threads that share a channel have left, [8 steps, 4, 4, 8, V]; each warp adds up every fourth step."""
        return jnp.sum(self.load(parts, self._by_step, *parts.shape), axis=2)

    def of_stretch(self, ref) -> Float[Array, "8 4 8 V"]:
        """A tile [8 steps, width] as ``sum_over_states`` leaves its sums."""
        return self.load(ref, self._by_step.reduce(2), _KEPT, _WARPS, _LANES, self.V).astype(jnp.float32)

    def sum_over_channels(self, parts) -> Float[Array, "8 N/4 4"]:
        """What the threads that share a state have left, [8 steps, 4, N / 4, 4, 8]."""
        return jnp.sum(jnp.sum(self.load(parts, _BY_STEP_AND_STATE, *parts.shape), axis=1), axis=3)

    @property
    def _layout(self):
        tile = (_WARPS, 1, _SHARED, _LANES, self.V)
        return plgpu.Layout.TILED(plgpu.Tiling((tile,)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def _by_step(self):
        tile = (4, _WARPS, 1, _LANES, self.V)
        return plgpu.Layout.TILED(plgpu.Tiling((tile,)), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1)


def _keep(h, tile, t):
    """h where step t belongs to the same document as step t - 1, else zero."""
    if "reset" not in tile:
        return h
    starts = lax.broadcast_in_dim(tile["reset"][t, 0], h.shape, ()) != 0
    return jnp.where(starts, jnp.zeros_like(h), h)
