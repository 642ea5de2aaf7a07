"""Gated linear attention on Hopper, with a decay per key channel or per head, or none: only its inputs and outputs are XLA's.

Forward, two kernels. One prepares all chunks, in parallel: q~ and k~, how every step of a chunk reads the others (A, 64 x 64),
and the decay over the chunk. The other, ``chunk_scan``, walks over the chunks with the state:

    o = q~ S + A v,   S = gamma[:, None] * S + k~^T v

(Without decays q~ and k~ are q and k, and only A is prepared.) Backward, three: the same preparation again; the walk from the last
chunk with the state's cotangent dS', which gives dv = A^T do + k~ dS' on its way; and, in parallel over chunks and 64 key channels
each, what is left:

    dq~ = do S^T,  dk~ = v dS'^T,  dgamma = sum(S * dS'),  dA = do v^T

with their backward passes through q~, k~, gamma and A to q, k and the log decay. Chunks have 64 steps: the
numbers are the same.

*Local sums on tensor cores.* ``chunk.py`` says why A is made level by level of sums within blocks of 1, 2, 4, ... 32
steps. Here each level is three products of whole tiles. A matrix of zeros and ones times the log decays gives each row its sum:
from the block's start for the rows of upper blocks, which read, to the block's end for those of lower blocks, which are
read. One tile Z holds q or k, whichever a row needs, times the exponential of that; of Z Z^T the level's pairs are taken.
Backwards, with P = dA + dA^T cut down to the level's pairs, dZ = P Z, and the matrix's transpose adds a log decay's gradients up.
Log decays (and their gradients) go through the tensor cores as two bfloat16 numbers, their rounded value and the rest, which
keeps 16 bits of each; sums are float32, and nothing is subtracted. With one decay per head A is q k^T times the exponential of what
lies between each pair of steps, two such products in all: of the pairs' log decays, step by step, with the first of the matrices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from seqmodels.ops.kernels.gpu import chunk_scan, common

STEPS = chunk_scan.STEPS
LEVELS = 6  # of blocks of 1, 2, 4, ... 32 steps
BLOCK = 64  # key channels that are worked on at once
BY_KEY = ("q", "k", "g", "starts", "ends")
WIDTH = 128  # the most value channels: more would not fit into shared memory
STAGES = 2  # chunks in shared memory: the one in work and the next
BLOCKS = 264  # of a grid at least, if there are as many chunks: two for each multiprocessor

CLOSED = -1e4
"""What minus infinity is taken for: 0 times it is 0, and its exponential is 0."""

OPERAND, matmul = chunk_scan.OPERAND, chunk_scan.matmul


def unsupported_reason(*, q: Array, k: Array, v: Array, decays: int, precision: lax.Precision, chunk_size: int) -> str | None:
    """What keeps a call from this kernel; ``decays``: how many a head has, 0, 1 or one per channel."""
    if v.shape[3] > WIDTH:
        return f"V = {v.shape[3]} value channels are more than {WIDTH}"
    if chunk_size < q.shape[1] and chunk_size != STEPS:
        return f"its chunks have {STEPS} steps, not {chunk_size}"
    return chunk_scan.unsupported_reason(precision=precision, channels=q.shape[3], width=v.shape[3], chunk_size=STEPS)


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
    sizes = _Sizes.of(q, v, log_decay)
    chunks = _prepare(sizes, _inputs(sizes, q, k, log_decay, start_log_mask), read_before, interpret)
    o, final, *starts = chunk_scan.walk(
        sizes.places, chunks | {"value": sizes.flat(v, sizes.V)}, sizes.flat_state(state),
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
    sizes = _Sizes.of(q, v, log_decay)
    inputs = _inputs(sizes, q, k, log_decay, start_log_mask)
    do = sizes.flat(d_output, sizes.V)
    chunks = _prepare(sizes, inputs, read_before, interpret)
    ends, first, dv = chunk_scan.backward_scan(
        sizes.places, chunks | {"value": do}, sizes.flat_state(d_final), value_dtype=v.dtype, interpret=interpret
    )
    inputs |= {"v": sizes.flat(v, sizes.V), "do": do, "starts": starts, "ends": ends}
    dq, dk, *dg = _gradients(sizes, inputs, OPERAND if sizes.G == sizes.H else jnp.float32, read_before, interpret)

    def of_groups(d, x):
        d = sizes.unflat(d, (*x.shape[:2], sizes.H, x.shape[3]))
        return jnp.sum(d.reshape(*x.shape[:3], -1, x.shape[3]), axis=3).astype(x.dtype)

    return (
        of_groups(dq, q),
        of_groups(dk, k),
        sizes.unflat(dv, v.shape),
        None if log_decay is None else sizes.unflat_decay(*dg, log_decay.shape).astype(log_decay.dtype),
        sizes.unflat_state(first, d_final.shape),
    )


class _Sizes(NamedTuple):
    """B rows of N chunks; G groups, H heads; K and V channels a head, padded to what the kernels want; one decay per what, if any."""

    B: int
    N: int
    G: int
    H: int
    K: int
    V: int
    per: str | None

    @classmethod
    def of(cls, q, v, log_decay):
        batch, steps, groups, channels = q.shape
        per = None if log_decay is None else "head" if log_decay.shape[3] == 1 else "channel"
        return cls(batch, -(-steps // STEPS), groups, v.shape[2], *chunk_scan.padded(channels, v.shape[3]), per)

    @property
    def places(self) -> chunk_scan.Places:
        """For the walk: what was prepared lies chunk by chunk, the rest where it came from."""

        def find(name, n, head):
            if name in ("value", "output"):
                return self.of_steps(n, head)
            if self.per is None and name in ("read", "write"):
                return self.of_steps(n, head, self.G)
            return self.of_chunk(n, head), 0

        return chunk_scan.Places(self.N, self.B * self.H, self.K, self.V, find)

    @property
    def matrices(self):
        """How many of ``_make_sums`` are needed: only decays per channel have levels."""
        return LEVELS if self.per == "channel" else 1

    def of_chunk(self, n, head):
        """The number of chunk n of a head among all heads' chunks."""
        return n * (self.B * self.H) + head

    def of_steps(self, n, head, heads=None):
        """(number of the tile of steps, number of the head in its row) of chunk n, where every row has ``heads``."""
        return lax.div(head, self.H) * self.N + n, lax.div(lax.rem(head, self.H), self.H // (heads or self.H))

    def flat(self, x, channels, dtype=OPERAND):
        """[B, T, heads, X] as [B T, heads X]."""
        x = jnp.pad(x, ((0, 0), (0, self.N * STEPS - x.shape[1]), (0, 0), (0, channels - x.shape[3])))
        return x.astype(dtype).reshape(self.B * self.N * STEPS, -1)

    def flat_rows(self, x):
        """[B, T, heads] as [B heads N, 64]."""
        x = jnp.pad(x, ((0, 0), (0, self.N * STEPS - x.shape[1]), (0, 0)))
        return jnp.moveaxis(x, 2, 1).reshape(-1, STEPS)

    def unflat(self, x, shape):
        """The backward pass, without what was padded."""
        return x.reshape(self.B, self.N * STEPS, shape[2], -1)[:, : shape[1], :, : shape[3]]

    def unflat_decay(self, x, shape):
        if self.per == "channel":
            return self.unflat(x, shape)
        x = jnp.sum(x.reshape(-1, self.B, self.H, self.N * STEPS), axis=0)
        return jnp.moveaxis(x, 1, 2)[:, : shape[1], :, None]

    def flat_state(self, x):
        return chunk_scan.pad(x, self.K, self.V).reshape(-1, self.V)

    def unflat_state(self, x, shape):
        return x.reshape(self.B, self.H, self.K, self.V)[..., : shape[2], : shape[3]]


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
    """read (q~), write (k~), keep (gamma) and scores (A) of every chunk, as the walk reads them."""
    N, K = sizes.N, sizes.K
    heads, blocks = sizes.B * sizes.H, K // BLOCK
    parts = _parts(heads, N)

    def body(*refs):
        in_refs, (scores, *decayed), buffers = refs[: len(inputs)], refs[len(inputs) : -7], refs[-7:]
        sums, hi, lo, Z, read_s, write_s, keep_s = buffers
        head, part = lax.axis_index("head"), lax.axis_index("part")
        local = functools.partial(_sum, interpret, sums, hi, lo)
        product = functools.partial(matmul, interpret)
        _make_sums(sums, read_before, sizes.matrices)

        def step(index, *tiles):
            row = sizes.of_chunk(part * (N // parts) + index[0], head)
            of_chunk = pl.ds(row * STEPS, STEPS)

            def send(tile, block, decays):
                columns = pl.ds(block * BLOCK, BLOCK)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the three tiles, and Z, are free again
                read_s[...] = (_load(tile["q"]) * decays.prefix).astype(OPERAND)
                write_s[...] = (_load(tile["k"]) * decays.suffix).astype(OPERAND)
                keep_s[...] = decays.total
                plgpu.commit_smem()
                read, write, keep = decayed
                plgpu.copy_smem_to_gmem(read_s, read.at[of_chunk, columns])
                plgpu.copy_smem_to_gmem(write_s, write.at[of_chunk, columns])
                plgpu.copy_smem_to_gmem(keep_s, keep.at[row, columns])

            A = jnp.zeros((STEPS, STEPS), jnp.float32)
            if sizes.per == "channel":
                for block in range(blocks):
                    tile = _of_block(inputs, tiles, block)
                    send(tile, block, _decays(tile, local, read_before))
                    at = _Tile.make(row + block)
                    if not read_before:
                        A = A + at.diagonal(jnp.sum(_load(tile["q"]) * _load(tile["k"]), axis=1))

                    def add_level(level, A, sums, tile=tile):
                        at = _Tile.make(row + level)
                        Z[...] = (_in_level(tile, at, level) * _level_decay(tile, at, level, sums)).astype(OPERAND)
                        plgpu.commit_smem()
                        return A + jnp.where(at.is_pair_below(level), product(Z, Z.transpose((1, 0))), 0.0)

                    A = add_level(0, A, _sums_of_single_steps(tile, at, read_before))
                    A = lax.fori_loop(1, LEVELS, lambda level, A: add_level(level, A, local(level)), A)
            else:
                tile = _of_block(inputs, tiles, 0)
                if sizes.per == "head":
                    decays = _decays(tile, local, read_before)
                    for block in range(blocks):
                        send(_of_block(inputs, tiles, block), block, decays)
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # Z is free again
                for block in range(blocks):
                    of_block = _of_block(inputs, tiles, block)
                    A = product(of_block["q"], of_block["k"].transpose((1, 0)), A)
                at = _Tile.make(row)
                if sizes.per == "head":
                    A = A * jnp.exp(_pair_sums(tile, at, local, read_before))
                A = jnp.where(at.is_visible(read_before), A, 0.0)
            Z[...] = A.astype(OPERAND)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(Z, scores.at[of_chunk])

        _pipeline(step, sizes, inputs, head, part, parts, range(blocks))(*in_refs)
        plgpu.wait_smem_to_gmem(0)

    rows = N * heads
    out_type = {"scores": jax.ShapeDtypeStruct((rows * STEPS, STEPS), OPERAND)}
    if sizes.per is not None:
        out_type |= {
            "read": jax.ShapeDtypeStruct((rows * STEPS, K), OPERAND),
            "write": jax.ShapeDtypeStruct((rows * STEPS, K), OPERAND),
            "keep": jax.ShapeDtypeStruct((rows, K), jnp.float32),
        }
    found = common.launch(
        body,
        out_type=list(out_type.values()),
        scratch_types=[
            plgpu.SMEM((sizes.matrices * STEPS, STEPS), OPERAND),
            *[plgpu.SMEM((STEPS, BLOCK), OPERAND)] * 5,
            plgpu.SMEM((BLOCK,), jnp.float32),
        ],
        grid={"head": heads, "part": parts},
        interpret=interpret,
    )(*inputs.values())
    return {"read": inputs["q"], "write": inputs["k"]} | dict(zip(out_type, found))


def _gradients(sizes, inputs, dtype, read_before, interpret):
    """Of q and k, in ``dtype``, and of the log decay, for every head."""
    N = sizes.N
    heads, blocks = sizes.B * sizes.H, sizes.K // BLOCK
    parts = _parts(heads * blocks, N)

    def body(*refs):
        in_refs, (dq_ref, dk_ref, *dg_ref), buffers = refs[: len(inputs)], refs[len(inputs) : -9], refs[-9:]
        sums, hi, lo, Z, pairs, hi_d, lo_d, vector, wide = buffers
        local = functools.partial(_sum, interpret, sums, hi, lo)
        head, block, part = lax.axis_index("head"), lax.axis_index("block"), lax.axis_index("part")
        _make_sums(sums, read_before, sizes.matrices)
        product = functools.partial(matmul, interpret)

        def send(n, head, block, dq, dk, *dg):
            row, column = sizes.of_steps(n, head)
            place = pl.ds(row * STEPS, STEPS), pl.ds(column * sizes.K + block * BLOCK, BLOCK)
            # Through tiles of their dtype that are free by then.
            narrow = (Z, pairs) if dtype == OPERAND else (wide, wide)
            for d, tile, ref in zip((*dg, dq, dk), (*(wide for _ in dg), *narrow), (*dg_ref[: len(dg)], dq_ref, dk_ref)):
                if tile is wide:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile[...] = d.astype(tile.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, ref.at[place])

        def step(index, *tiles):
            tile = _of_block(inputs, tiles, 0)
            n = part * (N // parts) + index[0]
            now = sizes.of_chunk(n, head)
            do, v, S, dS = tile["do"], tile["v"], tile["starts"], tile["ends"]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # Z and pairs are free again

            weights = product(do, v.transpose((1, 0)))  # of what step i reads of step j
            dq, dk = product(do, S.transpose((1, 0))), product(v, dS.transpose((1, 0)))
            if sizes.per is not None:
                # The backward passes from gamma, q~ and k~.
                decays = _decays(tile, local, read_before)
                vector[...] = jnp.sum(_load(S) * _load(dS), axis=1)
                plgpu.commit_smem()
                total = decays.total * plgpu.load(vector, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                dg = lax.broadcast_in_dim(total, (STEPS, BLOCK), (1,))
                dq, dk = dq * decays.prefix, dk * decays.suffix
                by_prefix = dq * _load(tile["q"])
                _split(by_prefix, hi_d, lo_d)
                dg = _sum(interpret, sums, hi_d, lo_d, 0, transposed=True, plus=dg if read_before else dg + by_prefix)
                _split(dk * _load(tile["k"]), hi_d, lo_d)
                dg = _sum(interpret, sums, hi_d, lo_d, 0, plus=dg)

            if sizes.per != "channel":
                at = _Tile.make(now)
                if sizes.per == "head":
                    weights = weights * jnp.exp(_pair_sums(tile, at, local, read_before))
                weights = jnp.where(at.is_visible(read_before), weights, 0.0)
                pairs[...] = weights.astype(OPERAND)
                plgpu.commit_smem()
                dq = product(pairs, tile["k"], dq)
                dk = product(pairs.transpose((1, 0)), tile["q"], dk)
                if sizes.per == "head":
                    d_sums = weights * product(tile["q"], tile["k"].transpose((1, 0)))
                    d_sums = jnp.where(at.is_below(), d_sums, 0.0)
                    _split(d_sums, hi_d, lo_d)
                    d_sums = _sum(interpret, sums, hi_d, lo_d, 0, transposed=True, plus=None if read_before else d_sums)
                    dg = dg + jnp.where(at.is_below(), d_sums, 0.0)
                    vector[...] = jnp.sum(dg, axis=1)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(vector, dg_ref[0].at[(block * heads + head) * N + n])
                send(n, head, block, dq, dk)
                return

            # Symmetric: with which weight step i reads or is read by step j.
            at = _Tile.make(now)
            own = jnp.sum(jnp.where(at.row == at.column, weights, 0.0), axis=1)
            weights = jnp.where(at.is_below(), weights, product(v, do.transpose((1, 0)))).astype(OPERAND)
            if not read_before:
                own = lax.broadcast_in_dim(own, (STEPS, BLOCK), (0,))
                dq, dk = dq + own * _load(tile["k"]), dk + own * _load(tile["q"])

            def add_level(level, dq, dk, sums):
                at = _Tile.make(now + level)
                decay = _level_decay(tile, at, level, sums)
                Z[...] = (_in_level(tile, at, level) * decay).astype(OPERAND)
                pairs[...] = jnp.where(at.is_pair(level), weights, jnp.zeros_like(weights))
                plgpu.commit_smem()
                d = product(pairs, Z) * decay
                upper = at.is_upper(level)
                return dq + jnp.where(upper, d, 0.0), dk + jnp.where(upper, 0.0, d), d * _in_level(tile, at, level)

            def add_wide_level(level, carry):
                dq, dk, dg = carry
                dq, dk, d_sums = add_level(level, dq, dk, local(level))
                _split(d_sums, hi_d, lo_d)
                return dq, dk, _sum(interpret, sums, hi_d, lo_d, level, transposed=True, plus=dg)

            dq, dk, d_sums = add_level(0, dq, dk, _sums_of_single_steps(tile, at, read_before))
            if not read_before:
                dg = dg + jnp.where(at.is_upper(0), d_sums, 0.0)
            dq, dk, dg = lax.fori_loop(1, LEVELS, add_wide_level, (dq, dk, dg))
            send(n, head, block, dq, dk, dg)

        _pipeline(step, sizes, inputs, head, part, parts, [block])(*in_refs)
        plgpu.wait_smem_to_gmem(0)

    shape = sizes.B * N * STEPS, sizes.H * sizes.K
    out_type = [jax.ShapeDtypeStruct(shape, dtype)] * 2
    if sizes.per is not None:
        shape = shape if sizes.per == "channel" else (blocks * heads * N, STEPS)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    return common.launch(
        body,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((sizes.matrices * STEPS, STEPS), OPERAND),
            *[plgpu.SMEM((STEPS, BLOCK), OPERAND)] * 6,
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.SMEM((STEPS, BLOCK), jnp.float32),
        ],
        grid={"head": heads, "block": blocks, "part": parts},
        interpret=interpret,
    )(*inputs.values())


def _parts(blocks, count):
    """Into how many parts, of equal length, blocks of a grid divide their chunks: enough to fill the device."""
    return next(parts for parts in range(1, count + 1) if count % parts == 0 and (blocks * parts >= BLOCKS or parts == count))


# ---- inside the kernels


def _pipeline(step, sizes, inputs, head, part, parts, blocks):
    """The loop over a part's chunks, as a function of the arrays in device memory: of arrays with key channels a tile for each of the
    blocks of them, the other arrays' tiles after them (``_of_block``).
    """

    def spec(name, block):
        def index(i):
            n = part * (sizes.N // parts) + i
            if name == "start_log_mask":
                return lax.div(head, sizes.H) * sizes.N + n, 0
            if name == "head_g":
                return head * sizes.N + n, 0
            if name in ("starts", "ends"):
                return sizes.of_chunk(n, head) * (sizes.K // BLOCK) + block, 0
            if name in ("v", "do"):
                return sizes.of_steps(n, head)
            row, column = sizes.of_steps(n, head, sizes.G if name in ("q", "k") else None)
            return row, column * (sizes.K // BLOCK) + block

        shapes = {"v": (STEPS, sizes.V), "do": (STEPS, sizes.V), "starts": (BLOCK, sizes.V), "ends": (BLOCK, sizes.V)}
        shapes |= {"start_log_mask": (None, STEPS), "head_g": (None, STEPS)}
        return plgpu.BlockSpec(shapes[name] if name in shapes else (STEPS, BLOCK), index)

    names = [(name, block) for block in blocks for name in inputs if name in BY_KEY]
    names += [(name, None) for name in inputs if name not in BY_KEY]
    run = plgpu.emit_pipeline(
        step, grid=(sizes.N // parts,), in_specs=[spec(*name) for name in names], max_concurrent_steps=1 if "do" in inputs else STAGES
    )
    return lambda *refs: run(*[dict(zip(inputs, refs))[name] for name, _ in names])


def _of_block(inputs, tiles, block):
    """By name: a block's tiles and those of no block."""
    by_key = [name for name in inputs if name in BY_KEY]
    others = [name for name in inputs if name not in BY_KEY]
    own = tiles[block * len(by_key) : (block + 1) * len(by_key)]
    return dict(zip(by_key, own)) | dict(zip(others, tiles[len(tiles) - len(others) :]))


def _make_sums(sums, read_before, count):
    """The matrices that add log decays up, one after the other: that of q~'s prefix (strict), whose transpose is k~'s suffix; from
    row 64 on the levels' of blocks of 2, 4, ... 32 steps.
    """
    at = _Tile.make()
    below = at.row - at.column - 1  # >= 0 where a row reads strictly
    for level in range(count):
        if level:
            reach = jnp.where(at.is_upper(level), below if read_before else below + 1, -2 - below)
            reach = jnp.where((at.row >> level) == (at.column >> level), reach, -1)
        else:
            reach = below
        sums.at[pl.ds(level * STEPS, STEPS)][...] = jnp.where(reach >= 0, 1.0, 0.0).astype(OPERAND)
    plgpu.commit_smem()


class _Tile(NamedTuple):
    """Where the numbers of a tile of 64 x 64 stand, and masks of it."""

    row: Int32[Array, "64 64"]
    column: Int32[Array, "64 64"]

    @classmethod
    def make(cls, now=0):
        """``now``: a small number that says where the program is. As far as the compiler knows, masks depend on it; else it would make
        all of them before the first step and keep them, in more registers than there are.
        """
        zero = lax.shift_right_logical(now, 30)
        row, column = (plgpu.broadcasted_iota(jnp.int32, (STEPS, STEPS), i, layout=plgpu.Layout.WGMMA) for i in (0, 1))
        return cls(row + zero, column + zero)

    def is_upper(self, level):
        """Rows of upper blocks of 2^level steps, which read."""
        return ((self.row >> level) & 1) == 1

    def is_visible(self, read_before):
        """Of which a row reads the column."""
        return self.is_below() if read_before else self.row >= self.column

    def is_below(self):
        return self.row > self.column

    def is_pair(self, level):
        """Steps that lie in neighbouring blocks of 2^level steps, of one block of twice as many."""
        return ((self.row ^ self.column) >> level) == 1

    def is_pair_below(self, level):
        """Those of which the row reads the column."""
        return jnp.where(self.is_below(), (self.row ^ self.column) >> level, 0) == 1

    def diagonal(self, x):
        return jnp.where(self.row == self.column, lax.broadcast_in_dim(x, (STEPS, STEPS), (0,)), 0.0)


def _load(ref):
    """A tile as wgmma's accumulators lie in registers, float32."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _log_decay(tile):
    """Of a tile's steps and channels; one per head is every channel's."""
    if "g" in tile:
        return jnp.maximum(_load(tile["g"]), CLOSED)
    return jnp.maximum(_of_steps(tile["head_g"]), CLOSED)


def _of_steps(ref):
    """A number for each step, over all channels."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(x, (STEPS, BLOCK), (0,))


def _split(x, hi, lo):
    """x into two tiles that add up to it."""
    rounded = x.astype(OPERAND)
    hi[...] = rounded
    lo[...] = (x - rounded.astype(jnp.float32)).astype(OPERAND)
    plgpu.commit_smem()


def _sum(interpret, sums, hi, lo, matrix, *, transposed=False, plus=None):
    """``plus`` and the rows' sums of what was split, by one of the matrices."""
    M = sums.at[pl.ds(matrix * STEPS, STEPS)]
    M = M.transpose((1, 0)) if transposed else M
    return matmul(interpret, M, lo, plus=matmul(interpret, M, hi, plus))


class _Decays(NamedTuple):
    """Since the start of the chunk, until its end, and over all of it."""

    prefix: Float[Array, "64 64"]
    suffix: Float[Array, "64 64"]
    total: Float[Array, " 64"]


def _decays(tile, local, read_before):
    g = _log_decay(tile)
    total = jnp.exp(jnp.sum(g, axis=0))
    _split(g, *local.args[2:])
    prefix = local(0)
    if not read_before:
        prefix = prefix + _log_decay(tile)
    return _Decays(jnp.exp(prefix + _opening(tile)), jnp.exp(local(0, transposed=True)), total)


def _pair_sums(tile, at, local, read_before):
    """With one decay per head: what lies between step j and step i > j."""
    between = jnp.where(at.is_below(), _log_decay(tile), 0.0)
    _split(between, *local.args[2:])
    return local(0, plus=None if read_before else between) + _opening(tile)


def _opening(tile):
    return _of_steps(tile["start_log_mask"]) if "start_log_mask" in tile else 0.0


def _sums_of_single_steps(tile, at, read_before):
    """Of blocks of one step: what lies between a step and the one before."""
    if read_before:
        return jnp.zeros((STEPS, BLOCK), jnp.float32)
    return jnp.where(at.is_upper(0), _log_decay(tile), 0.0)


def _level_decay(tile, at, level, sums):
    if "start_log_mask" in tile:
        sums = jnp.where(at.is_upper(level), sums + _opening(tile), sums)
    return jnp.exp(sums)


def _in_level(tile, at, level):
    """q for the rows that read in a level, k for those that are read."""
    return jnp.where(at.is_upper(level), _load(tile["q"]), _load(tile["k"]))
