"""The recurrence over chunks (``ops/chunk_scan.py``) on Hopper: the state stays in registers from the first chunk to the last.

A block is one warpgroup. It has one head and 64 of its V value channels, and goes through all chunks: ``emit_pipeline`` brings the
next chunk's tiles into shared memory while the tensor cores work on this one's. Blocks never meet: a column of the state needs no
other column. Forward:

    S in registers, float32; its copy S_s in shared memory, bfloat16, is the right operand of W S and q~ S, and what is kept
    u = U - W S            (W only for the delta rule; u goes through shared memory to be an operand)
    o = q~ S [+ P u]       float32, by tile
    S = gamma[:, None] * S * b_keep[None, :] + k~^T u

Backward, in reversed order, of the state's cotangent d_S' alone:

    d_u = P^T d_o + k~ d_S'   (for the delta rule, or where it is wanted as the gradient of the values; d_S needs it only with W)
    d_S = gamma[:, None] * d_S' * b_keep[None, :] + q~^T (d_o * b_read) - W^T d_u

Everything else is parallel over chunks. Of gated linear attention it is done by the kernels of ``gpu/gated_linear_attention.py``,
around ``walk`` and ``backward_scan``; of the rest by XLA, around ``forward`` and ``backward``: the preparation,
``* b_read + O``, and the gradients of a chunk's inputs from the states at its ends.

Products take bfloat16 and add in float32; decays and the carried state are float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from seqmodels.ops.chunk import Chunk, power_of_two
from seqmodels.ops.kernels.gpu import common
from seqmodels.ops.kernels.gpu.tiles import COLUMNS, NARROW, OPERAND, STAGES, STEPS, load, matmul, pad, padded

MATRICES = ("read", "write", "value", "erase", "scores")


def unsupported_reason(*, precision: lax.Precision, channels: int, width: int, chunk_size: int) -> str | None:
    """What keeps a call from the kernel, for K ``channels``, V ``width`` and C ``chunk_size``."""
    if lacking := common.unsupported_reason():
        return lacking
    if precision == lax.Precision.HIGHEST:
        return "float32 q and k ask for float32 products, which Hopper's tensor cores do not have"
    if channels > NARROW:
        return f"K = {channels} key channels are more than {NARROW}"
    if power_of_two(chunk_size) > STEPS:
        return f"chunks of {chunk_size} steps are longer than {STEPS}"
    return None


def forward(
    chunk: Chunk,
    state: Float[Array, "B *heads K V"],
    *,
    precision: lax.Precision,
    keep_starts: bool,
    interpret: bool,
) -> tuple[Float[Array, "N B *heads C V"], Float[Array, "B *heads K V"], Float[Array, "N B *heads K V"] | None]:
    """Outputs, the final state (both float32), and the states at chunk starts (bfloat16) if they are kept."""
    count, heads, width = chunk.read.shape[0], state.shape[:-2], state.shape[-1]
    steps, channels = chunk.read.shape[-2:]
    arrays = _arrays(chunk)
    K, V = padded(channels, width)
    outputs, final, *starts = walk(
        _places(arrays, heads, count, K, V),
        {name: x.reshape(-1, x.shape[-1]) for name, x in arrays.items()},
        pad(state, K, V).reshape(-1, V),
        output_dtype=jnp.float32,
        keep_starts=keep_starts,
        interpret=interpret,
    )
    outputs = outputs.reshape(count, *heads, STEPS, V)[..., :steps, :width]
    if chunk.value_read is not None:
        outputs = outputs * chunk.value_read
    if chunk.inside is not None:
        outputs = outputs + chunk.inside
    final = final.reshape(*heads, K, V)[..., :channels, :width]
    if not keep_starts:
        return outputs, final, None
    return outputs, final, starts[0].reshape(count, *heads, K, V)[..., :channels, :width]


def backward(
    chunk: Chunk,
    d_outputs: Float[Array, "N B *heads C V"],
    d_final: Float[Array, "B *heads K V"],
    *,
    precision: lax.Precision,
    interpret: bool,
) -> tuple[Float[Array, "N B *heads K V"], Float[Array, "B *heads K V"]]:
    """The cotangents of the states after every chunk and of the first state, float32."""
    count, heads, (channels, width) = d_outputs.shape[0], d_final.shape[:-2], d_final.shape[-2:]
    if chunk.value_read is not None:
        d_outputs = d_outputs * chunk.value_read
    arrays = _arrays(chunk._replace(value=d_outputs))  # d_o lies as U does
    K, V = padded(channels, width)
    places = _places(arrays, heads, count, K, V)
    if "erase" not in arrays:
        arrays = {name: x for name, x in arrays.items() if name not in ("write", "scores")}
    ends, first = backward_scan(
        places,
        {name: x.reshape(-1, x.shape[-1]) for name, x in arrays.items()},
        pad(d_final, K, V).reshape(-1, V),
        interpret=interpret,
    )
    ends = ends.reshape(count, *heads, K, V)[..., :channels, :width].astype(jnp.float32)
    return ends, first.reshape(*heads, K, V)[..., :channels, :width]


# ---- the kernels


class Places(NamedTuple):
    """How far a walk goes, and where it finds and puts things."""

    count: int
    """Chunks."""
    heads: int
    """Counting the batch."""
    K: int
    V: int
    find: Callable[[str, Any, Any], tuple[Any, Any]]
    """For a name, the number of a chunk and that of a head: (number of the tile of rows, number of the head in a row). Names are the
    tiles' and ``"output"``."""


def walk(
    places: Places,
    tiles: dict[str, Array],
    state: Float[Array, "heads*K V"],
    *,
    output_dtype: jnp.dtype,
    keep_starts: bool,
    interpret: bool,
) -> list[Array]:
    """From the first chunk to the last: outputs, laid out as the values are, the final state, and the states at chunk starts if kept.

    Args:
      tiles: by the names of ``Chunk``, arrays [rows, columns]: matrices of 64 rows a chunk, decays of one. With ``scores`` what
        a chunk's own steps contribute is in the output.
    """
    count, heads, K, V, _ = places
    product = functools.partial(matmul, interpret)
    scratch = [plgpu.SMEM((K, COLUMNS), OPERAND), plgpu.SMEM((STEPS, COLUMNS), output_dtype)]
    if "erase" in tiles:
        scratch.append(plgpu.SMEM((STEPS, COLUMNS), OPERAND))

    def body(*refs):
        inputs, initial = dict(zip(tiles, refs)), refs[len(tiles)]
        (outputs, final, *starts), (S_s, o_s, *u_s) = refs[len(tiles) + 1 : -len(scratch)], refs[-len(scratch) :]
        head, block = lax.axis_index("head"), lax.axis_index("block")
        of_head = pl.ds(head * K, K)

        def step(index, *carried):
            (n,), tile, S = index, dict(zip(tiles, carried)), carried[-1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # S_s and o_s are free again
            S_s[...] = S.astype(OPERAND)
            S = _decayed(S, tile)  # before the barrier: after the last one of a step its tiles may be overwritten
            plgpu.commit_smem()
            if keep_starts:
                plgpu.copy_smem_to_gmem(S_s, starts[0].at[pl.ds((n * heads + head) * K, K), _columns(block)])
            update = tile["value"]
            if "erase" in tile:
                u_s[0][...] = (load(update) - product(tile["erase"], S_s)).astype(OPERAND)
                plgpu.commit_smem()
                update = u_s[0]
            o = product(tile["read"], S_s)
            if "scores" in tile:
                o = product(tile["scores"], update, plus=o)
            o_s[...] = o.astype(output_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s, outputs.at[_of_outputs(places, n, head, block)])
            return product(tile["write"].transpose((1, 0)), update, plus=S)

        S = load(initial.at[of_head, _columns(block)])
        S = _chunks(step, places, tiles, head, block, S)(*inputs.values())
        final.at[of_head, _columns(block)][...] = S
        plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct(tiles["value"].shape, output_dtype),
        jax.ShapeDtypeStruct((heads * K, V), jnp.float32),
    ]
    if keep_starts:
        out_type.append(jax.ShapeDtypeStruct((count * heads * K, V), OPERAND))
    return common.launch(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid={"head": heads, "block": V // COLUMNS},
        interpret=interpret,
    )(*tiles.values(), state)


def backward_scan(
    places: Places,
    tiles: dict[str, Array],
    d_final: Float[Array, "heads*K V"],
    *,
    value_dtype: jnp.dtype | None = None,
    interpret: bool,
) -> list[Array]:
    """From the last chunk to the first: the cotangents of the states after every chunk (bfloat16) and of the first state (float32).

    Args:
      tiles: as for ``walk``, with the outputs' cotangents as ``value``; ``write`` and ``scores`` only where one of ``erase`` and
        ``value_dtype`` is given.
      value_dtype: given, the cotangents of the values are returned as well, in this dtype (never with ``erase``).
    """
    count, heads, K, V, _ = places
    product = functools.partial(matmul, interpret)

    def body(*refs):
        inputs, last = dict(zip(tiles, refs)), refs[len(tiles)]
        ends, first, *d_values = refs[len(tiles) + 1 : -2]
        d_S_s, d_u_s = refs[-2:]
        head, block = lax.axis_index("head"), lax.axis_index("block")
        of_head = pl.ds(head * K, K)

        def step(index, *carried):
            (i,), tile, d_S = index, dict(zip(tiles, carried)), carried[-1]
            n = count - 1 - i
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dS_s is free again
            d_S_s[...] = d_S.astype(OPERAND)
            d_S = _decayed(d_S, tile)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_S_s, ends.at[pl.ds((n * heads + head) * K, K), _columns(block)])
            d_o = tile["value"]
            if "write" in tile:
                d_u = product(tile["scores"].transpose((1, 0)), d_o)
                d_u = product(tile["write"], d_S_s, plus=d_u)
                d_u_s[...] = (-d_u if "erase" in tile else d_u).astype(d_u_s.dtype)
                plgpu.commit_smem()
            for d_value in d_values:
                plgpu.copy_smem_to_gmem(d_u_s, d_value.at[_of_outputs(places, n, head, block)])
            d_S = product(tile["read"].transpose((1, 0)), d_o, plus=d_S)
            return product(tile["erase"].transpose((1, 0)), d_u_s, plus=d_S) if "erase" in tile else d_S

        d_S = load(last.at[of_head, _columns(block)])
        d_S = _chunks(step, places, tiles, head, block, d_S, reverse=True)(*inputs.values())
        first.at[of_head, _columns(block)][...] = d_S
        plgpu.wait_smem_to_gmem(0)

    out_type = [
        jax.ShapeDtypeStruct((count * heads * K, V), OPERAND),
        jax.ShapeDtypeStruct((heads * K, V), jnp.float32),
    ]
    if value_dtype is not None:
        out_type.append(jax.ShapeDtypeStruct(tiles["value"].shape, value_dtype))
    return common.launch(
        body,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((K, COLUMNS), OPERAND), plgpu.SMEM((STEPS, COLUMNS), value_dtype or OPERAND)],
        grid={"head": heads, "block": V // COLUMNS},
        interpret=interpret,
    )(*tiles.values(), d_final)


# ---- around the kernels


def _arrays(chunk) -> dict[str, Array]:
    """What the kernels read of a chunk, padded: operands [N, B, *heads, 64, X], decays [N, B, *heads, X].

    Axes of size 1 among the heads stay: their tile is read again for every head.
    """
    K, V = padded(chunk.read.shape[-1], chunk.value.shape[-1])
    widths = {"read": K, "write": K, "value": V, "erase": K, "scores": STEPS, "keep": K, "value_keep": V}
    arrays = {}
    for name, width in widths.items():
        x = getattr(chunk, name)
        if x is None or (name == "scores" and chunk.erase is None):
            continue
        if name in MATRICES:
            arrays[name] = pad(x, STEPS, width).astype(OPERAND)
        else:
            size = chunk.read.shape[-1] if name == "keep" else chunk.value.shape[-1]
            x = jnp.broadcast_to(x, (*x.shape[:-1], size))  # one decay for all channels is allowed
            arrays[name] = pad(x[..., None, :], 1, width)[..., 0, :]
    return arrays


def _places(arrays, heads, count, K, V):
    """Arrays [N, B, *heads, ...] flat as they are, the output over all heads."""
    lead = {name: x.shape[1 : 1 + len(heads)] for name, x in arrays.items()} | {"output": heads}

    def find(name, n, head):
        places, rest = [], head
        for size in reversed(heads):
            places.append(lax.rem(rest, size))
            rest = lax.div(rest, size)
        for size, place in zip(lead[name], reversed(places)):
            n = n * size + (place if size > 1 else 0)
        return n, 0

    return Places(count, math.prod(heads), K, V, find)


# ---- inside the kernels


def _chunks(step, places, tiles, head, block, carry, *, reverse=False):
    """The loop over chunks, as a function of the arrays in device memory."""

    def spec(name, x):
        by_value = name in ("value", "value_keep")

        def index(i):
            n = places.count - 1 - i if reverse else i
            row, column = places.find(name, n, head)
            return row, column * (places.V // COLUMNS) + block if by_value else column

        width = COLUMNS if by_value else STEPS if name == "scores" else places.K
        return plgpu.BlockSpec((STEPS if name in MATRICES else None, width), index)

    return plgpu.emit_pipeline(
        step,
        grid=(places.count,),
        in_specs=[spec(name, x) for name, x in tiles.items()],
        max_concurrent_steps=STAGES,
        init_carry=carry,
    )


def _of_outputs(places, n, head, block):
    """Rows and columns of a block of a chunk's outputs."""
    row, column = places.find("output", n, head)
    return pl.ds(row * STEPS, STEPS), pl.ds(column * places.V + block * COLUMNS, COLUMNS)


def _columns(block):
    return pl.ds(block * COLUMNS, COLUMNS)


def _decayed(S, tile):
    """gamma[:, None] * S * b_keep[None, :]"""
    for name, axis in (("keep", 0), ("value_keep", 1)):
        if name in tile:
            decay = plgpu.load(tile[name], layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)
            S = S * lax.broadcast_in_dim(decay, S.shape, (axis,))
    return S
