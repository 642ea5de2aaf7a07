"""The recurrence over chunks (``ops/chunk_scan.py``) on a TPU: a state stays in VMEM from its first chunk to its last.

    u  = U - W S,   o = (q~ S) * b_read + (O or P u),   S' = gamma[:, None] * S * b_keep[None, :] + k~^T u

Chunks are prepared by XLA, all at once. Here the grid is (heads, repeats, value channels, chunks), the last axis in order:
each step reads one chunk of a few heads and advances their states, float32 in scratch memory that outlives the step. Value
channels never meet, so a wide state is cut along them. Products take bfloat16 operands where the inputs were narrow, else
float32 in six passes; sums and states are float32.

The backward pass is the same walk from the last chunk to the first, of the state's cotangent alone: it needs no state, so the
gradients of the chunks are left to XLA, which has all cotangents at once afterwards.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqmodels.ops.chunk import Chunk, power_of_two
from seqmodels.ops.kernels.tpu.common import VMEM_BYTES, operand_dtype, product, steps_in_order, tile_bytes

_WIDEST = 512  # value channels of a state in one step
_MOST_HEADS = 4  # in one step: their chains of products do not wait for each other
# Of a chunk's arrays [N, B, G, R, C, X], those whose X is the value channels.
_ALONG_VALUES = ("value", "inside", "value_read", "row_keep", "d_outputs")


def unsupported_reason(*, precision: lax.Precision, channels: int, width: int, chunk_size: int) -> str | None:
    """What keeps a chunk of ``chunk_size`` steps and a state [channels, width] from this kernel."""
    needed = _step_bytes(1, channels, _value_block(width), power_of_two(chunk_size), operand_dtype(precision))
    if needed > VMEM_BYTES:
        return f"a state of {channels} x {width} needs {needed / 2**20:.0f} MiB of VMEM, of {VMEM_BYTES / 2**20:.0f}"
    return None


def forward(
    chunk: Chunk, state: Float[Array, "B G R K V"], *, precision: lax.Precision, keep_starts: bool, interpret
) -> tuple[Float[Array, "N B G R C V"], Float[Array, "B G R K V"], Float[Array, "N B G R K V"] | None]:
    """Outputs, the final state, and the states at chunk starts, in the dtype of the products' operands, if they are kept."""
    arrays = _arrays(chunk, ("read", "write", "value", "inside", "scores", "keep", "erase", "value_read"), precision)
    count, _, _, _, steps, _ = chunk.value.shape
    walk = _Walk(state.shape, count, steps, precision, reverse=False)
    outputs = walk.call(
        functools.partial(_forward_kernel, precision=precision, keep_starts=keep_starts),
        arrays,
        state,
        by_chunk=[(steps, jnp.float32)] + [(state.shape[-2], operand_dtype(precision))] * keep_starts,
        interpret=interpret,
    )
    final, outputs, *starts = outputs
    return outputs, final, starts[0] if keep_starts else None


def backward(
    chunk: Chunk,
    d_outputs: Float[Array, "N B G R C V"],
    d_final: Float[Array, "B G R K V"],
    *,
    precision: lax.Precision,
    interpret,
) -> tuple[Float[Array, "N B G R K V"], Float[Array, "B G R K V"]]:
    """The cotangents of the states after every chunk, and of the state before the first."""
    needed = ("read", "keep", "value_read")
    if chunk.erase is not None:
        needed += ("write", "erase") if chunk.scores is None else ("write", "erase", "scores")
    arrays = _arrays(chunk, needed, precision)
    arrays["d_outputs"] = d_outputs.astype(operand_dtype(precision))
    count, _, _, _, steps, _ = d_outputs.shape
    walk = _Walk(d_final.shape, count, steps, precision, reverse=True)
    d_state, d_ends = walk.call(
        functools.partial(_backward_kernel, precision=precision),
        arrays,
        d_final,
        by_chunk=[(d_final.shape[-2], jnp.float32)],
        interpret=interpret,
    )
    return d_ends, d_state


# ---- the kernels: refs hold one chunk of a few heads, [heads, rows, columns]


def _forward_kernel(refs, state_ref, outputs_ref, *starts_ref, precision, keep_starts):
    dot = functools.partial(product, precision=precision)
    for head in range(state_ref.shape[0]):
        chunk = {name: ref[head] for name, ref in refs.items()}
        state = state_ref[head]
        if keep_starts:
            starts_ref[0][head] = state.astype(starts_ref[0].dtype)
        operand = state.astype(chunk["read"].dtype)
        update = chunk["value"]
        if "erase" in chunk:
            update = update.astype(jnp.float32) - dot(chunk["erase"], operand, 1, 0)
            update = update.astype(operand.dtype)
        output = dot(chunk["read"], operand, 1, 0)
        if "value_read" in chunk:
            output *= chunk["value_read"]
        outputs_ref[head] = output + (chunk["inside"] if "inside" in chunk else dot(chunk["scores"], update, 1, 0))
        state_ref[head] = _kept(state, chunk) + dot(chunk["write"], update, 0, 0)


def _backward_kernel(refs, d_state_ref, d_ends_ref, *, precision):
    dot = functools.partial(product, precision=precision)
    for head in range(d_state_ref.shape[0]):
        chunk = {name: ref[head] for name, ref in refs.items()}
        d_state, d_output = d_state_ref[head], chunk["d_outputs"]
        d_ends_ref[head] = d_state
        d_read = d_output
        if "value_read" in chunk:
            d_read = (d_output.astype(jnp.float32) * chunk["value_read"]).astype(d_output.dtype)
        before = _kept(d_state, chunk) + dot(chunk["read"], d_read, 0, 0)
        if "erase" in chunk:
            d_update = dot(chunk["write"], d_state.astype(d_output.dtype), 1, 0)
            if "scores" in chunk:
                d_update += dot(chunk["scores"], d_output, 0, 0)
            before -= dot(chunk["erase"], d_update.astype(d_output.dtype), 0, 0)
        d_state_ref[head] = before


def _kept(state, chunk):
    """What is left of a state [K, V] after the chunk: gamma[:, None] * S * b_keep[None, :]."""
    if "keep" in chunk:
        # The row as a column: summing one number and zeros is exact.
        row, column = (lax.broadcasted_iota(jnp.int32, (state.shape[0],) * 2, axis) for axis in (0, 1))
        state = state * jnp.sum(jnp.where(row == column, chunk["keep"], 0.0), axis=1, keepdims=True)
    if "row_keep" in chunk:
        state = state * chunk["row_keep"]
    return state


# ---- layouts and the grid


def _arrays(chunk: Chunk, names: tuple[str, ...], precision: lax.Precision) -> dict[str, Float[Array, "N B G R rows X"]]:
    """The named arrays of a chunk, what products read in the dtype they read it in.

    The decay of the whole state over the chunk is a row of K numbers, ``keep``, or one of V, ``row_keep``: one number for all
    joins the latter.
    """
    arrays = {name: getattr(chunk, name) for name in names if getattr(chunk, name) is not None}
    for name in {"read", "write", "value", "scores", "erase"} & arrays.keys():
        arrays[name] = arrays[name].astype(operand_dtype(precision))
    row_keep = chunk.value_keep
    if "keep" in arrays and arrays["keep"].shape[-1] == 1:
        keep = jnp.broadcast_to(arrays.pop("keep"), (*chunk.keep.shape[:-1], chunk.value.shape[-1]))
        row_keep = keep if row_keep is None else keep * row_keep
    if row_keep is not None:
        arrays["row_keep"] = row_keep[..., None, :]
    if "keep" in arrays:
        arrays["keep"] = arrays["keep"][..., None, :]
    return arrays


def _value_block(width: int) -> int:
    """Value channels of one step: all of them, or whole registers' worth of them that divide them."""
    if width <= _WIDEST or width % 128:
        return width
    return max(block for block in range(128, _WIDEST + 1, 128) if width % block == 0)


def _step_bytes(heads, channels, width, steps, operand_dtype) -> int:
    """VMEM of one step of the grid, with every array that a chunk can have; blocks are held twice, to load ahead."""
    size = jnp.dtype(operand_dtype).itemsize
    along_keys = 3 * tile_bytes(steps, channels, size) + tile_bytes(steps, steps, size) + tile_bytes(1, channels, 4)
    along_values = tile_bytes(steps, width, size) + 3 * tile_bytes(steps, width, 4) + tile_bytes(1, width, 4)
    states = 3 * tile_bytes(channels, width, 4)  # in, out, and one of every chunk
    scratch = tile_bytes(channels, width, 4)
    return heads * (2 * (along_keys + along_values + states) + scratch)


class _Walk:
    """A grid over heads, repeats and value channels, and inside it over chunks in order."""

    def __init__(self, state_shape, count, steps, precision, *, reverse: bool):
        self.batch, self.groups, self.repeats, self.channels, self.width = state_shape
        self.count, self.reverse = count, reverse
        self.problems = self.batch * self.groups
        self.block = _value_block(self.width)
        self.heads = max(
            heads
            for heads in range(1, _MOST_HEADS + 1)
            if self.problems % heads == 0
            and (heads == 1 or _step_bytes(heads, self.channels, self.block, steps, operand_dtype(precision)) <= VMEM_BYTES)
        )

    def call(self, kernel, arrays, state, *, by_chunk: list[tuple[int, DTypeLike]], interpret):
        """Runs ``kernel(refs, state, *outputs)`` over all chunks.

        Returns the state after the last step, and for every (rows, dtype) of ``by_chunk`` an array [N, B, G, R, rows, V].
        """
        names = list(arrays)
        flat = [x.reshape(self.count, self.problems, *x.shape[3:]) for x in arrays.values()]
        shape = (self.problems, self.repeats, self.channels, self.width)
        per_state = pl.BlockSpec((self.heads, None, self.channels, self.block), lambda p, r, v, n: (p, r, 0, v))
        outputs = [jax.ShapeDtypeStruct(shape, jnp.float32)]
        outputs += [jax.ShapeDtypeStruct((self.count, *shape[:2], rows, self.width), dtype) for rows, dtype in by_chunk]
        last = self.count - 1

        def body(*refs):
            arrays, (first, final, *outputs, state) = refs[: len(names)], refs[len(names) :]
            n = pl.program_id(3)

            @pl.when(n == 0)
            def _():
                state[...] = first[...]

            kernel(dict(zip(names, arrays)), state, *outputs)

            @pl.when(n == last)
            def _():
                final[...] = state[...]

        found = pl.pallas_call(
            body,
            grid=(self.problems // self.heads, self.repeats, self.width // self.block, self.count),
            in_specs=[self._per_chunk(name, x) for name, x in zip(names, flat)] + [per_state],
            out_specs=[per_state] + [self._per_chunk("value", x) for x in outputs[1:]],
            out_shape=outputs,
            scratch_shapes=[pltpu.VMEM((self.heads, self.channels, self.block), jnp.float32)],
            compiler_params=steps_in_order(4),
            interpret=interpret,
        )(*flat, state.reshape(shape))
        return [found[0].reshape(state.shape)] + [x.reshape(self.count, self.batch, self.groups, *x.shape[2:]) for x in found[1:]]

    def _per_chunk(self, name, x):
        """One chunk of [N, B G, R, rows, X], where R may be 1 for all."""
        along_values = name in _ALONG_VALUES
        columns = self.block if along_values else x.shape[-1]
        shared, last = x.shape[2] == 1, self.count - 1

        def place(p, r, v, n):
            n = last - n if self.reverse else n
            return n, p, 0 if shared else r, 0, v if along_values else 0

        return pl.BlockSpec((None, self.heads, None, x.shape[-2], columns), place)
