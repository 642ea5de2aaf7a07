"""Gated linear attention on Hopper, with a decay per key channel or per head, or none: only its inputs and outputs are XLA's.

Forward, two kernels. One prepares all chunks, in parallel: q~ and k~, how every step of a chunk reads the others (A, 64 x 64),
and the decay over the chunk. The other, ``chunk_scan``, walks over the chunks with the state:

    o = q~ S + A v,   S = gamma[:, None] * S + k~^T v

(Without decays q~ and k~ are q and k, and only A is prepared.) Backward, three: the same preparation again; the walk from the last
chunk with the state's cotangent d_S', which gives d_v = A^T d_o + k~ d_S' on its way; and, in parallel over chunks and 64 key channels
each, what is left:

    d_q~ = d_o S^T,  d_k~ = v d_S'^T,  d_gamma = sum(S * d_S'),  d_A = d_o v^T

with their backward passes through q~, k~, gamma and A to q, k and the log decay. Values wider than 128 channels are taken in parts,
as all of this is a sum over them; of more than 128 key channels each 128 are a head, and the outputs are added. Chunks have 64 steps:
the numbers are the same.

*Local sums on tensor cores.* ``chunk.py`` says why A is made level by level of sums within blocks of 1, 2, 4, ... 32
steps. Here each level is two products of whole tiles. A matrix of zeros and ones, in registers, times the log decays gives each row
its sum: from the block's start for the rows of upper blocks, which read, to the block's end for those of lower blocks, which are
read. One tile Z holds q or k, whichever a row needs, times the exponential of that; of Z Z^T the level's pairs are taken.
Backwards, with P = d_A + d_A^T cut down to the level's pairs, d_Z = P Z, and the matrix's transpose adds a log decay's gradients up.
With one decay per head A is q k^T times the exponential of what lies between each pair of steps (``tiles.PairSums``).

*What is rounded.* Log decays go through the tensor cores as float16: an exponent is off by 2^-11 of itself, its exponential by
2e-4 or less, a tenth of what the tile is rounded by. Their gradients, which may be of any size, go through as two bfloat16 numbers,
the rounded value and the rest, which keeps 16 bits of each. Sums are float32, and nothing is subtracted.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from seqmodels.ops.kernels.gpu import chunk_scan, common
from seqmodels.ops.kernels.gpu.local_sums import (
    Decays,
    level_sums,
    opened,
    over_levels,
    reader_or_read,
    send_decayed,
    sums_of_single_steps,
)
from seqmodels.ops.kernels.gpu.tiles import (
    BLOCK,
    CLOSED,
    COLUMNS,
    LEVELS,
    NARROW,
    OPERAND,
    PRECISE,
    STAGES,
    STEPS,
    Chunks,
    PairSums,
    Sizes,
    Tile,
    by_column,
    columns_of,
    in_columns,
    load,
    matmul,
    of_steps,
    over_values,
    parts_of,
    send,
    state_products,
    sums_by,
    zeros,
)

BLOCKS_AT_ONCE = 2  # of 64 value channels, whose gradients one kernel makes: more would not fit into shared memory


def unsupported_reason(*, q: Array, k: Array, v: Array, decays: int, precision: lax.Precision, chunk_size: int) -> str | None:
    """What keeps a call from this kernel; ``decays``: how many a head has, 0, 1 or one per channel."""
    if chunk_size < q.shape[1] and chunk_size != STEPS:
        return f"its chunks have {STEPS} steps, not {chunk_size}"
    channels = min(q.shape[3], NARROW)  # more are taken in blocks
    return chunk_scan.unsupported_reason(precision=precision, channels=channels, width=v.shape[3], chunk_size=STEPS)


def forward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H X"] | None,
    start_log_mask: Float[Array, "B T"] | None,
    state: Float[Array, "B H K V"],
    *,
    chunk_size: int,
    read_before: bool,
    precision: lax.Precision,
    output_dtype: jnp.dtype,
    keep_starts: bool,
    interpret: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"], Array | None]:
    """Outputs, final state, and (if kept) the states at chunk starts in this kernel's layout.

    Without a bonus term; ``start_log_mask``, for reading before: the logarithm of what of the state a step may read, 0 or minus
    infinity where a document starts.
    """
    if (blocks := _KeyBlocks.of(q, v)) is not None:
        o, final, starts = forward(
            *blocks.split(q, k, v, log_decay), start_log_mask, blocks.split_state(state),
            chunk_size=chunk_size, read_before=read_before, precision=precision, output_dtype=jnp.float32,
            keep_starts=keep_starts, interpret=interpret,
        )  # fmt: skip
        return blocks.summed(o).astype(output_dtype), blocks.joined_state(final), starts
    sizes = Sizes.of(q, v, log_decay)
    chunks = _prepare(sizes, _inputs(sizes, q, k, log_decay, start_log_mask), read_before, interpret)
    o, final, *starts = chunk_scan.walk(
        _places(sizes), chunks | {"value": sizes.flat(v, sizes.V)}, sizes.flat_state(state),
        output_dtype=output_dtype, keep_starts=keep_starts, interpret=interpret,
    )  # fmt: skip
    return sizes.unflat(o, v.shape), sizes.unflat_state(final, state.shape), starts[0] if keep_starts else None


def backward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H X"] | None,
    start_log_mask: Float[Array, "B T"] | None,
    starts: Array,
    d_output: Float[Array, "B T H V"],
    d_final: Float[Array, "B H K V"],
    *,
    chunk_size: int,
    read_before: bool,
    precision: lax.Precision,
    interpret: bool,
) -> tuple[Array, Array, Array, Array | None, Array]:
    """Gradients of q, k, v, log_decay (None without one) and the state."""
    if (blocks := _KeyBlocks.of(q, v)) is not None:
        _, _, d_output, _ = blocks.split(q, k, d_output, None)
        d_q, d_k, d_v, d_g, d_state = backward(
            *blocks.split(q, k, v, log_decay), start_log_mask, starts, d_output, blocks.split_state(d_final),
            chunk_size=chunk_size, read_before=read_before, precision=precision, interpret=interpret,
        )  # fmt: skip
        if log_decay is not None:
            d_g = blocks.summed(d_g) if log_decay.shape[3] == 1 else blocks.joined_decay(d_g)
        return blocks.joined(d_q), blocks.joined(d_k), blocks.summed(d_v).astype(v.dtype), d_g, blocks.joined_state(d_state)
    sizes = Sizes.of(q, v, log_decay)
    inputs = _inputs(sizes, q, k, log_decay, start_log_mask)
    d_o = sizes.flat(d_output, sizes.V)
    chunks = _prepare(sizes, inputs, read_before, interpret)
    ends, first, d_v = chunk_scan.backward_scan(
        _places(sizes), chunks | {"value": d_o}, sizes.flat_state(d_final), value_dtype=v.dtype, interpret=interpret
    )
    inputs |= {"v": sizes.flat(v, sizes.V), "d_o": d_o, "starts": starts, "ends": ends}
    blocks = range(sizes.V // COLUMNS)
    parts = [blocks[first : first + BLOCKS_AT_ONCE] for first in blocks[::BLOCKS_AT_ONCE]]
    dtype = OPERAND if len(parts) == 1 and sizes.G == sizes.H else jnp.float32
    make = _gradients_per_channel if sizes.per == "channel" else _gradients_per_head
    found = [make(sizes, inputs, part, dtype, read_before, interpret) for part in parts]
    d = {name: sum(of_part[name] for of_part in found) for name in found[0]}
    return (
        sizes.of_groups(d["d_q"], q.shape).astype(q.dtype),
        sizes.of_groups(d["d_k"], k.shape).astype(k.dtype),
        sizes.unflat(d_v, v.shape),
        None if log_decay is None else sizes.unflat_decay(d["d_g"], log_decay.shape).astype(log_decay.dtype),
        sizes.unflat_state(first, d_final.shape),
    )


class _KeyBlocks(NamedTuple):
    """More key channels than a state in registers has, as ``count`` heads for each head: its output is the sum of theirs.

    G groups of R heads, K channels; a block has ``width`` of them, the last one perhaps zeros.
    """

    G: int
    R: int
    K: int
    count: int

    @classmethod
    def of(cls, q: Float[Array, "B T G K"], v: Float[Array, "B T H V"]) -> "_KeyBlocks | None":
        groups, channels = q.shape[2:]
        count = -(-channels // NARROW)
        return None if count == 1 else cls(groups, v.shape[2] // groups, channels, count)

    @property
    def width(self) -> int:
        return -(-self.K // self.count)

    def split(self, q, k, v, log_decay):
        """q, k, v and log_decay of the heads that are blocks."""

        def repeated(x):
            x = x.reshape(*x.shape[:2], self.G, 1, self.R, -1)
            return jnp.broadcast_to(x, (*x.shape[:3], self.count, *x.shape[4:])).reshape(*x.shape[:2], -1, x.shape[-1])

        def in_blocks(x):
            return self._padded(x, 3).reshape(*x.shape[:2], -1, self.width)

        if log_decay is not None and log_decay.shape[3] > 1:
            x = self._padded(log_decay, 3).reshape(*log_decay.shape[:2], self.G, self.R, self.count, self.width)
            log_decay = jnp.swapaxes(x, 3, 4).reshape(*x.shape[:2], -1, self.width)
        elif log_decay is not None:
            log_decay = repeated(log_decay)
        return in_blocks(q), in_blocks(k), repeated(v), log_decay

    def split_state(self, x: Float[Array, "B H K V"]) -> Float[Array, "B blocks width V"]:
        x = self._padded(x, 2).reshape(x.shape[0], self.G, self.R, self.count, self.width, x.shape[3])
        return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], -1, self.width, x.shape[-1])

    def joined(self, x: Float[Array, "B T blocks width"]) -> Float[Array, "B T G K"]:
        """Of q and k."""
        return x.reshape(*x.shape[:2], self.G, -1)[..., : self.K]

    def joined_decay(self, x: Float[Array, "B T blocks width"]) -> Float[Array, "B T H K"]:
        x = x.reshape(*x.shape[:2], self.G, self.count, self.R, self.width)
        return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:2], self.G * self.R, -1)[..., : self.K]

    def joined_state(self, x: Float[Array, "B blocks width V"]) -> Float[Array, "B H K V"]:
        x = x.reshape(x.shape[0], self.G, self.count, self.R, self.width, x.shape[3])
        return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], self.G * self.R, -1, x.shape[-1])[:, :, : self.K]

    def summed(self, x: Float[Array, "B T blocks X"]) -> Float[Array, "B T H X"]:
        x = x.reshape(*x.shape[:2], self.G, self.count, self.R, x.shape[3])
        return jnp.sum(x, axis=3).reshape(*x.shape[:2], -1, x.shape[-1])

    def _padded(self, x, axis):
        ends = [(0, 0)] * x.ndim
        ends[axis] = 0, self.count * self.width - self.K
        return jnp.pad(x, ends)


def _places(sizes: Sizes) -> chunk_scan.Places:
    """For the walk: what was prepared lies chunk by chunk, the rest where it came from."""

    def find(name, n, head):
        if name in ("value", "output"):
            return sizes.of_steps(n, head)
        if sizes.per is None and name in ("read", "write"):
            return sizes.of_steps(n, head, sizes.G)
        return sizes.of_chunk(n, head), 0

    return chunk_scan.Places(sizes.N, sizes.B * sizes.H, sizes.K, sizes.V, find)


def _inputs(sizes, q, k, log_decay, start_log_mask):
    """What both of the kernels below read."""
    inputs = {"q": sizes.flat(q, sizes.K), "k": sizes.flat(k, sizes.K)}
    if sizes.per == "channel":
        inputs["g"] = sizes.flat(log_decay, sizes.K, jnp.float32)
    elif sizes.per == "head":
        inputs["head_g"] = sizes.flat_rows(log_decay[..., 0].astype(jnp.float32))
    if start_log_mask is not None:
        inputs["start_log_mask"] = jnp.maximum(sizes.flat_rows(start_log_mask[..., None]), CLOSED)
    return inputs


def _prepare(sizes, inputs, read_before, interpret):
    """``read`` (q~), ``write`` (k~), ``keep`` (gamma) and ``scores`` (A) of every chunk, as the walk reads them."""
    if sizes.per == "channel":
        return _prepare_per_channel(sizes, inputs, read_before, interpret)
    return {"read": inputs["q"], "write": inputs["k"]} | _prepare_per_head(sizes, inputs, read_before, interpret)


# ---- one decay per key channel


def _prepare_per_channel(sizes, inputs, read_before, interpret):
    """64 key channels after the other; A, a sum over them, stays in registers."""
    product = functools.partial(matmul, interpret)
    blocks, parts = sizes.K // BLOCK, parts_of(sizes.heads, sizes.N)

    def prepare(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, block, tile, A):
            row = sizes.of_chunk(n, chunks.head)
            at = Tile.make(row + block)
            A = jnp.where(block == 0, 0.0, 1.0) * A
            decays = Decays.of(interpret, at, tile, ref.g_s, read_before)
            send_decayed(ref, tile, decays, row, block, "read", "write")
            if not read_before:
                A = A + at.diagonal(jnp.sum(load(tile["q"]) * load(tile["k"]), axis=1))

            def add_level(level, A, sums):
                at = Tile.make(row + level)
                Z = reader_or_read(tile, at, level) * jnp.exp(opened(tile, at, level, sums))
                ref.Z_s[...] = Z.astype(OPERAND)
                plgpu.commit_smem()
                return A + jnp.where(at.is_pair_below(level), product(ref.Z_s, ref.Z_s.transpose((1, 0))), 0.0)

            A = over_levels(interpret, row, add_level, A, tile, at, ref.g_s, read_before)

            @pl.when(block == blocks - 1)
            def _():
                send(ref.scores_s, A, ref.scores.at[pl.ds(row * STEPS, STEPS)])

            return A

        in_turn = chunks.keys(sizes.G, block=lambda turn: turn)
        tiles = {"q": (ref.q, in_turn), "k": (ref.k, in_turn), "g": (ref.g, chunks.keys(sizes.H, block=lambda turn: turn))}
        if "start_log_mask" in inputs:
            tiles["start_log_mask"] = ref.start_log_mask, chunks.row_of_batch()
        chunks.run(step, tiles, carry=zeros(interpret), stages=STAGES, turns=blocks)
        plgpu.wait_smem_to_gmem(0)

    rows, tile = sizes.N * sizes.heads, plgpu.SMEM((STEPS, BLOCK), OPERAND)
    return common.call(
        prepare, inputs,
        outputs={
            "scores": jax.ShapeDtypeStruct((rows * STEPS, STEPS), OPERAND),
            "read": jax.ShapeDtypeStruct((rows * STEPS, sizes.K), OPERAND),
            "write": jax.ShapeDtypeStruct((rows * STEPS, sizes.K), OPERAND),
            "keep": jax.ShapeDtypeStruct((rows, sizes.K), jnp.float32),
        },
        scratch={
            "g_s": plgpu.SMEM((STEPS, BLOCK), PRECISE), "Z_s": tile, "read_s": tile, "write_s": tile, "scores_s": tile,
            "keep_s": plgpu.SMEM((BLOCK,), jnp.float32),
        },
        grid={"head": sizes.heads, "part": parts}, interpret=interpret,
    )  # fmt: skip


def _gradients_per_channel(sizes, inputs, blocks, dtype, read_before, interpret):
    """What comes of some ``blocks`` of 64 value channels, for every head: ``d_q``, ``d_k`` (in ``dtype``) and ``d_g`` (float32)."""
    product, sums_of = functools.partial(matmul, interpret), functools.partial(sums_by, interpret)

    def gradients(ref, chunk):
        now, tile = chunk.number, chunk.tile
        at = Tile.make(now)
        d_o, v, S, d_S = (chunk.of_values(name) for name in BY_VALUE)
        q, k = tile["q"], tile["k"]

        # The backward passes from gamma, q~ and k~.
        decays = Decays.of(interpret, at, tile, ref.g_s, read_before)
        d_g = in_columns(decays.total * state_products(interpret, at, S, d_S))
        d_q, d_k = over_values(interpret, d_o, S) * decays.prefix, over_values(interpret, v, d_S) * decays.suffix
        by_prefix = d_q * load(q)
        d_g = sums_of(at.row < at.column, by_prefix, ref.part_s, plus=d_g if read_before else d_g + by_prefix)
        d_g = sums_of(at.is_below(), d_k * load(k), ref.part_s, plus=d_g)

        # Symmetric: with which weight step i reads or is read by step j.
        weights = over_values(interpret, d_o, v)
        own = jnp.sum(jnp.where(at.row == at.column, weights, 0.0), axis=1)
        weights = jnp.where(at.is_below(), weights, over_values(interpret, v, d_o)).astype(OPERAND)
        if not read_before:
            own = lax.broadcast_in_dim(own, (STEPS, BLOCK), (0,))
            d_q, d_k = d_q + own * load(k), d_k + own * load(q)

        def add_level(level, d_q, d_k, sums):
            at = Tile.make(now + level)
            decay = jnp.exp(opened(tile, at, level, sums))
            ref.Z_s[...] = (reader_or_read(tile, at, level) * decay).astype(OPERAND)
            ref.pairs_s[...] = jnp.where(at.is_pair(level), weights, jnp.zeros_like(weights))
            plgpu.commit_smem()
            d = product(ref.pairs_s, ref.Z_s) * decay
            upper = at.is_upper(level)
            return d_q + jnp.where(upper, d, 0.0), d_k + jnp.where(upper, 0.0, d), d * reader_or_read(tile, at, level)

        def add_wide_level(level, carry):
            d_q, d_k, d_g = carry
            d_q, d_k, d_sums = add_level(level, d_q, d_k, level_sums(interpret, now, level, ref.g_s, read_before))
            summed = Tile.make(now + level).transposed().is_summed(level, read_before)
            return d_q, d_k, sums_of(summed, d_sums, ref.part_s, plus=d_g)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
        d_q, d_k, d_sums = add_level(0, d_q, d_k, sums_of_single_steps(tile, at, read_before))
        if not read_before:
            d_g = d_g + jnp.where(at.is_upper(0), d_sums, 0.0)
        d_q, d_k, d_g = lax.fori_loop(1, LEVELS, add_wide_level, (d_q, d_k, d_g))
        place = chunk.keys
        ref.d_g.at[place][...] = d_g
        # Through tiles that are free by then.
        send(ref.Z_s if dtype == OPERAND else ref.wide_s, d_q, ref.d_q.at[place])
        send(ref.pairs_s if dtype == OPERAND else ref.wide_s, d_k, ref.d_k.at[place])

    steps = sizes.B * sizes.N * STEPS, sizes.H * sizes.K
    tile = plgpu.SMEM((STEPS, BLOCK), OPERAND)
    wide = {} if dtype == OPERAND else {"wide_s": plgpu.SMEM((STEPS, BLOCK), dtype)}
    return _over_chunks(
        gradients, sizes, inputs, blocks,
        outputs={
            "d_q": jax.ShapeDtypeStruct(steps, dtype), "d_k": jax.ShapeDtypeStruct(steps, dtype),
            "d_g": jax.ShapeDtypeStruct(steps, jnp.float32),
        },
        scratch={
            "g_s": plgpu.SMEM((STEPS, BLOCK), PRECISE), "Z_s": tile, "pairs_s": tile, "part_s": tile
        } | wide,
        # Sums over the heads of a group are float32 and leave no room for a second chunk.
        stages=STAGES if dtype == OPERAND else 1, interpret=interpret,
    )  # fmt: skip


# ---- one decay per head, or none


def _prepare_per_head(sizes, inputs, read_before, interpret):
    """Without decays A alone."""
    product = functools.partial(matmul, interpret)
    blocks, parts = range(sizes.K // BLOCK), parts_of(sizes.heads, sizes.N)

    def prepare(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, tile):
            row = sizes.of_chunk(n, chunks.head)
            of_chunk = pl.ds(row * STEPS, STEPS)
            at = Tile.make(row)
            A = product(tile["q"], tile["k"].transpose((1, 0)))
            if sizes.per is not None:
                sums = _pair_sums(interpret, at, tile, ref.g_s, read_before)
                A = A * jnp.exp(jnp.where(at.is_below(), sums.between, 0.0))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
                ref.keep_s[...] = _total_per_head(tile)
                ref.vector_s[...] = jnp.exp(sums.suffix)
                plgpu.commit_smem()
                prefix = lax.broadcast_in_dim(jnp.exp(sums.prefix), (STEPS, BLOCK), (0,))
                for block in blocks:
                    columns = pl.ds(block * BLOCK, BLOCK)
                    send(ref.read_s, load(tile["q"].at[:, columns]) * prefix, ref.read.at[of_chunk, columns])
                    plgpu.copy_smem_to_gmem(ref.keep_s, ref.keep.at[row, columns])
                    ref.write_s[...] = (load(tile["k"].at[:, columns]) * of_steps(ref.vector_s)).astype(OPERAND)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(ref.write_s, ref.write.at[of_chunk, columns])
            send(ref.scores_s, jnp.where(at.is_visible(read_before), A, 0.0), ref.scores.at[of_chunk])

        tiles = {"q": (ref.q, chunks.keys(sizes.G)), "k": (ref.k, chunks.keys(sizes.G))} | _rows(chunks, ref, inputs)
        chunks.run(step, tiles, stages=STAGES)
        plgpu.wait_smem_to_gmem(0)

    rows, tile = sizes.N * sizes.heads, plgpu.SMEM((STEPS, BLOCK), OPERAND)
    outputs, scratch = {"scores": jax.ShapeDtypeStruct((rows * STEPS, STEPS), OPERAND)}, {"scores_s": tile}
    if sizes.per is not None:
        keys, vector = jax.ShapeDtypeStruct((rows * STEPS, sizes.K), OPERAND), plgpu.SMEM((STEPS,), jnp.float32)
        outputs |= {"read": keys, "write": keys, "keep": jax.ShapeDtypeStruct((rows, sizes.K), jnp.float32)}
        scratch |= {
            "g_s": plgpu.SMEM((STEPS, STEPS), PRECISE),
            "read_s": tile,
            "write_s": tile,
            "keep_s": vector,
            "vector_s": vector,
        }
    return common.call(
        prepare, inputs, outputs=outputs, scratch=scratch, grid={"head": sizes.heads, "part": parts}, interpret=interpret
    )


def _gradients_per_head(sizes, inputs, blocks, dtype, read_before, interpret):
    """What comes of some ``blocks`` of 64 value channels, for every head: ``d_q``, ``d_k`` (in ``dtype``) and, with decays, ``d_g``
    (float32; a part for each 64 key channels).
    """
    product = functools.partial(matmul, interpret)

    def gradients(ref, chunk):
        now, tile = chunk.number, chunk.tile
        at = Tile.make(now)
        d_o, v, S, d_S = (chunk.of_values(name) for name in BY_VALUE)
        q, k = tile["q"], tile["k"]
        d_q, d_k, weights = over_values(interpret, d_o, S), over_values(interpret, v, d_S), over_values(interpret, d_o, v)
        if sizes.per is not None:
            sums = _pair_sums(interpret, at, tile, ref.g_s, read_before)
            d_q = d_q * lax.broadcast_in_dim(jnp.exp(sums.prefix), (STEPS, BLOCK), (0,))
            ref.suffix_s[...] = jnp.exp(sums.suffix)  # a vector of its own: Mosaic reads each one way, by rows or by columns
            plgpu.commit_smem()
            d_k = d_k * of_steps(ref.suffix_s)
            # What the log decay of step m gets: of q~ of the steps that read after it, of k~ of those before it, of gamma.
            by_prefix = by_column(jnp.sum(load(q) * d_q, axis=1), ref.vector_s)
            after = at.row < at.column if read_before else at.row <= at.column
            d_g = jnp.sum(jnp.where(after, by_prefix, 0.0), axis=1)
            by_suffix = by_column(jnp.sum(load(k) * d_k, axis=1), ref.vector_s)
            d_g = d_g + jnp.sum(jnp.where(at.is_below(), by_suffix, 0.0), axis=1)
            by_gamma = _total_per_head(tile) * state_products(interpret, at, S, d_S)
            d_g = d_g + jnp.sum(in_columns(by_gamma), axis=1)
            weights = weights * jnp.exp(jnp.where(at.is_below(), sums.between, 0.0))
        weights = jnp.where(at.is_visible(read_before), weights, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
        ref.pairs_s[...] = weights.astype(OPERAND)
        plgpu.commit_smem()
        if sizes.per is not None:
            pairs = jnp.where(at.is_below(), weights * product(q, k.transpose((1, 0))), 0.0)
            between = sums_by(interpret, at.row < at.column, pairs, ref.part_s, plus=None if read_before else pairs)
            d_g = d_g + jnp.sum(jnp.where(at.is_below(), between, 0.0), axis=1)
            send(ref.row_s, d_g, ref.d_g.at[(chunk.key_block * sizes.heads + chunk.head) * sizes.N + chunk.n])
        place = chunk.keys
        send(ref.d_q_s, product(ref.pairs_s, k, d_q), ref.d_q.at[place])
        send(ref.d_k_s, product(ref.pairs_s.transpose((1, 0)), q, d_k), ref.d_k.at[place])

    keys = jax.ShapeDtypeStruct((sizes.B * sizes.N * STEPS, sizes.H * sizes.K), dtype)
    outputs, scratch = {"d_q": keys, "d_k": keys}, {"pairs_s": plgpu.SMEM((STEPS, STEPS), OPERAND)}
    scratch |= dict.fromkeys(("d_q_s", "d_k_s"), plgpu.SMEM((STEPS, BLOCK), dtype))
    if sizes.per is not None:
        vector = plgpu.SMEM((STEPS,), jnp.float32)
        outputs["d_g"] = jax.ShapeDtypeStruct((sizes.K // BLOCK * sizes.heads * sizes.N, STEPS), jnp.float32)
        scratch |= dict.fromkeys(("suffix_s", "vector_s", "row_s"), vector)
        scratch |= {"g_s": plgpu.SMEM((STEPS, STEPS), PRECISE), "part_s": scratch["pairs_s"]}
    return _over_chunks(gradients, sizes, inputs, blocks, outputs=outputs, scratch=scratch, stages=STAGES, interpret=interpret)


def _pair_sums(interpret, at, tile, g_s, read_before):
    """``PairSums`` with what of the state a step may read where a document starts."""
    sums = PairSums.of(interpret, at, jnp.maximum(of_steps(tile["head_g"]), CLOSED), g_s, read_before)
    if "start_log_mask" not in tile:
        return sums
    opening = plgpu.load(tile["start_log_mask"], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return sums._replace(between=sums.between + of_steps(tile["start_log_mask"]), prefix=sums.prefix + opening)


def _total_per_head(tile):
    """Over the chunk, the same for 64 key channels."""
    return jnp.exp(jnp.sum(jnp.maximum(of_steps(tile["head_g"]), CLOSED), axis=0))


# ---- both


def _rows(chunks: Chunks, ref: types.SimpleNamespace, inputs) -> dict[str, tuple[Any, plgpu.BlockSpec]]:
    """Inputs with a number for each step, and how a chunk lies in them."""
    specs = {"head_g": chunks.row(), "start_log_mask": chunks.row_of_batch()}
    return {name: (getattr(ref, name), spec) for name, spec in specs.items() if name in inputs}


BY_VALUE = ("d_o", "v", "starts", "ends")


class _Chunk(NamedTuple):
    """Of chunk n of a head, 64 key channels and some ``blocks`` of 64 value channels."""

    sizes: Sizes
    n: Int32[Array, ""]
    head: Int32[Array, ""]
    key_block: Int32[Array, ""]
    blocks: range
    tile: dict
    """In shared memory, by name or by (name, block of value channels)."""

    @property
    def number(self):
        """Among all heads' chunks."""
        return self.sizes.of_chunk(self.n, self.head)

    @property
    def keys(self):
        """Where its key channels lie in an array of every head's."""
        return columns_of(self.sizes, self.n, self.head, self.key_block, self.sizes.K // BLOCK)

    def of_values(self, name: str) -> list:
        return [self.tile[name, block] for block in self.blocks]


def _over_chunks(gradients, sizes, inputs, blocks, *, outputs, scratch, stages, interpret):
    """A kernel that calls ``gradients(ref, chunk)`` for all chunks of every head and 64 key channels each; its outputs by name."""
    key_blocks = sizes.K // BLOCK
    parts = parts_of(sizes.heads * key_blocks, sizes.N)

    def body(ref):
        chunks, key_block = Chunks.of_part(sizes, parts), lax.axis_index("block")
        keys = chunks.keys(sizes.G, key_block)
        tiles = {"q": (ref.q, keys), "k": (ref.k, keys)} | _rows(chunks, ref, inputs)
        if "g" in inputs:
            tiles["g"] = ref.g, chunks.keys(sizes.H, key_block)
        for block in blocks:
            specs = zip(BY_VALUE, (chunks.values(block),) * 2 + (chunks.state(block, key_block),) * 2)
            tiles |= {(name, block): (getattr(ref, name), spec) for name, spec in specs}
        chunks.run(lambda n, tile: gradients(ref, _Chunk(sizes, n, chunks.head, key_block, blocks, tile)), tiles, stages=stages)
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = gradients.__name__
    return common.call(
        body, inputs,
        outputs=outputs, scratch=scratch, grid={"head": sizes.heads, "block": key_blocks, "part": parts}, interpret=interpret,
    )  # fmt: skip
