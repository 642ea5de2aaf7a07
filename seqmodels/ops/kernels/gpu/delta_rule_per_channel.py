"""The delta rule's chunks with a decay per key channel (KDA, arXiv 2510.26692) on Hopper: what ``delta_rule.py`` walks over, and back.

With q~ = q e^prefix, k^ = k e^prefix and k~ = k e^suffix (log decays since the start of the chunk and until its end) a chunk does to
the state S what ``delta_rule.py`` says, of k^ where k S is read and of k~ where S is written. A decay per channel does not come out of
the products q k^T and k k^T: both are made level by level (``local_sums.py``), of the same tile of keys,

    P_ij = q_i . diag(decay between j and i) k_j  for i >= j,   O_ij = k_i . diag(decay between j and i) k_j  for i > j

and T = (I + beta O)^-1. Backward two kernels follow the walk's d_r = T^T d_u. One makes u again, for all key channels at once, and

    d_v = beta d_r,   d_A = d_o u^T,  d_E = d_r u^T  (above the diagonal their transposes),   d_beta = sum(d_r (v - k^ S)), a part

The other, 64 key channels each, takes the gradients of q~, k^, k~ and of a level's factors from there to q, k, beta and the log decay:

    d_q~ = d_o S^T, d_k^ = -beta d_r S^T, d_k~ = u d_S'^T, d_P = tril(d_A), d_O = -beta tril(d_E, -1), d_beta -= sum(tril(d_E, -1) O)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.ops.kernels.gpu import common
from seqmodels.ops.kernels.gpu.local_sums import (
    Decays,
    level_sums,
    over_levels,
    reader_or_read,
    send_decayed,
    sums_of_single_steps,
)
from seqmodels.ops.kernels.gpu.tiles import (
    BLOCK,
    COLUMNS,
    LEVELS,
    OPERAND,
    PRECISE,
    STAGES,
    STEPS,
    Chunks,
    Sizes,
    Tile,
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
    unit_lower_inverse,
    zeros,
)


def prepare(sizes: Sizes, inputs: dict[str, jax.Array], interpret: bool) -> dict[str, jax.Array]:
    """``read`` (q~), ``erase`` (k^), ``write`` (k~), ``keep`` (gamma), ``scores`` (P) and ``inverse`` (T) of every chunk.

    64 key channels after the other; P and O, sums over them, stay in registers.
    """
    product = functools.partial(matmul, interpret)
    blocks, parts = sizes.K // BLOCK, parts_of(sizes.heads, sizes.N)

    def prepare(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, block, tile, carry):
            row = sizes.of_chunk(n, chunks.head)
            of_chunk = pl.ds(row * STEPS, STEPS)
            at = Tile.make(row + block)
            P, O = (jnp.where(block == 0, 0.0, 1.0) * x for x in carry)
            decays = Decays.of(interpret, at, tile, ref.g_s, False)
            send_decayed(ref, tile, decays, row, block, "read", "erase", "write")
            P = P + at.diagonal(jnp.sum(load(tile["q"]) * load(tile["k"]), axis=1))

            def add_level(level, carry, sums):
                P, O = carry
                at = Tile.make(row + level)
                decay = jnp.exp(sums)
                read, keys = (load(tile["q"]) * decay).astype(OPERAND), ref.Z_s.transpose((1, 0))
                ref.Z_s[...] = (load(tile["k"]) * decay).astype(OPERAND)
                plgpu.commit_smem()  # the last barrier of a turn, after which its tiles may be overwritten
                P = P + jnp.where(at.is_pair_below(level), product(read, keys), 0.0)
                return P, O + jnp.where(at.is_pair_below(level), product(ref.Z_s, keys), 0.0)

            P, O = over_levels(interpret, row, add_level, (P, O), tile, at, ref.g_s, False)

            @pl.when(block == blocks - 1)
            def _():
                at = Tile.make(row + block)
                L = jnp.where(at.is_below(), O * of_steps(tile["beta"]), 0.0)
                # The log decays have done their work: L takes their tile, which is float16 as well.
                inverse = unit_lower_inverse(interpret, row, L, ref.g_s, ref.T_s)
                send(ref.T_s, inverse, ref.inverse.at[of_chunk])
                send(ref.scores_s, P, ref.scores.at[of_chunk])

            return P, O

        zero = zeros(interpret)
        in_turn, of_heads = chunks.keys(sizes.G, block=lambda turn: turn), chunks.keys(sizes.H, block=lambda turn: turn)
        tiles = {"q": (ref.q, in_turn), "k": (ref.k, in_turn), "g": (ref.g, of_heads), "beta": (ref.beta, chunks.row())}
        chunks.run(step, tiles, carry=(zero, zero), stages=STAGES, turns=blocks)
        plgpu.wait_smem_to_gmem(0)

    rows = sizes.N * sizes.heads
    keys = jax.ShapeDtypeStruct((rows * STEPS, sizes.K), OPERAND)
    matrices = jax.ShapeDtypeStruct((rows * STEPS, STEPS), PRECISE)
    tile, precise = plgpu.SMEM((STEPS, BLOCK), OPERAND), plgpu.SMEM((STEPS, STEPS), PRECISE)
    return common.call(
        prepare, {name: inputs[name] for name in ("q", "k", "g", "beta")},
        outputs={
            "read": keys, "erase": keys, "write": keys, "keep": jax.ShapeDtypeStruct((rows, sizes.K), jnp.float32),
            "scores": matrices, "inverse": matrices,
        },
        scratch={
            "g_s": precise, "T_s": precise, "scores_s": precise, "Z_s": tile, "read_s": tile, "erase_s": tile, "write_s": tile,
            "keep_s": plgpu.SMEM((BLOCK,), jnp.float32),
        },
        grid={"head": sizes.heads, "part": parts}, interpret=interpret,
    )  # fmt: skip


def gradients(
    sizes: Sizes, inputs: dict[str, jax.Array], blocks: range, value_dtype: jnp.dtype, dtype: jnp.dtype, interpret: bool
) -> dict[str, jax.Array]:
    """What comes of some ``blocks`` of 64 value channels: as ``delta_rule.py``'s, but for ``d_g``, which is as wide as keys."""
    made = _updates(sizes, inputs, blocks, value_dtype, interpret)
    found = _by_key(sizes, inputs | made, blocks, dtype, interpret)
    d_beta = made["d_beta"] + jnp.sum(found["d_beta"].reshape(-1, *made["d_beta"].shape), axis=0)
    return found | {"d_v": made["d_v"], "d_beta": d_beta}


def _updates(sizes, inputs, blocks, value_dtype, interpret):
    """``u`` and -beta d_r (``erased``), bfloat16; ``d_A`` and ``d_E``; ``d_v``; ``d_beta`` without what comes through the inverse."""
    product = functools.partial(matmul, interpret)
    parts = parts_of(sizes.heads, sizes.N)
    names, by_value = ("beta", "inverse", "erase"), ("v", "d_o", "d_r", "starts")

    def updates(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, tile):
            now = sizes.of_chunk(n, chunks.head)
            v, d_o, d_r, S = ([tile[name, block] for block in blocks] for name in by_value)
            u = [getattr(ref, f"u{i}_s") for i in range(len(blocks))]  # tiles of their own, as each is sent
            beta = of_steps(tile["beta"])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
            d_beta = None
            for i in range(len(blocks)):
                place = columns_of(sizes, n, chunks.head, i, len(blocks))
                lacking = load(v[i]) - product(tile["erase"], S[i])
                ref.r_s[...] = (beta * lacking).astype(PRECISE)
                plgpu.commit_smem()
                u[i][...] = product(tile["inverse"], ref.r_s).astype(OPERAND)
                of_block = jnp.sum(load(d_r[i]) * lacking, axis=1)
                d_beta = of_block if d_beta is None else d_beta + of_block
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(u[i], ref.u.at[place])
                send(ref.value_s, beta * load(d_r[i]), ref.d_v.at[place])
                send(ref.erased_s, -beta * load(d_r[i]), ref.erased.at[place])
            at = Tile.make(now)
            for tile_s, of_rows, out in ((ref.A_s, d_o, ref.d_A), (ref.E_s, d_r, ref.d_E)):
                lower, upper = over_values(interpret, of_rows, u), over_values(interpret, u, of_rows)
                send(tile_s, jnp.where(at.is_visible(), lower, upper), out.at[pl.ds(now * STEPS, STEPS)])
            send(ref.row_s, d_beta, ref.d_beta.at[chunks.head * sizes.N + n])

        specs = chunks.row(), chunks.matrix(), chunks.prepared()
        tiles = {name: (getattr(ref, name), spec) for name, spec in zip(names, specs)}
        for block in blocks:
            tiles |= {(name, block): (getattr(ref, name), chunks.values(block)) for name in by_value[:3]}
            tiles["starts", block] = ref.starts, chunks.state(block)
        chunks.run(step, tiles, stages=1)
        plgpu.wait_smem_to_gmem(0)

    rows, width = sizes.B * sizes.N * STEPS, len(blocks) * COLUMNS
    values = jax.ShapeDtypeStruct((rows, sizes.H * width), OPERAND)
    matrices = jax.ShapeDtypeStruct((sizes.N * sizes.heads * STEPS, STEPS), OPERAND)
    tile = plgpu.SMEM((STEPS, STEPS), OPERAND)
    return common.call(
        updates, {name: inputs[name] for name in (*names, *by_value)},
        outputs={
            "u": values, "erased": values, "d_A": matrices, "d_E": matrices,
            "d_v": jax.ShapeDtypeStruct((rows, sizes.H * width), value_dtype),
            "d_beta": jax.ShapeDtypeStruct((sizes.heads * sizes.N, STEPS), jnp.float32),
        },
        scratch={
            "r_s": plgpu.SMEM((STEPS, COLUMNS), PRECISE), "A_s": tile, "E_s": tile, "erased_s": tile,
            "value_s": plgpu.SMEM((STEPS, COLUMNS), value_dtype), "row_s": plgpu.SMEM((STEPS,), jnp.float32),
        } | {f"u{i}_s": tile for i in range(len(blocks))},
        grid={"head": sizes.heads, "part": parts}, interpret=interpret,
    )  # fmt: skip


def _by_key(sizes, inputs, blocks, dtype, interpret):
    """``d_q``, ``d_k`` (in ``dtype``), ``d_g`` and, a part for each 64 key channels, what ``d_beta`` gets by the inverse (float32)."""
    product, sums_of = functools.partial(matmul, interpret), functools.partial(sums_by, interpret)
    key_blocks = sizes.K // BLOCK
    parts = parts_of(sizes.heads * key_blocks, sizes.N)
    names, by_value = ("q", "k", "g", "beta", "d_A", "d_E"), ("d_o", "erased", "u", "starts", "ends")

    def by_key(ref):
        chunks, key_block = Chunks.of_part(sizes, parts), lax.axis_index("block")

        def step(n, tile):
            now = sizes.of_chunk(n, chunks.head)
            at = Tile.make(now)
            d_o, erased, u, S, d_S = ([tile[name, i] for i in range(len(blocks))] for name in by_value)
            q, k = tile["q"], tile["k"]

            # The backward passes from gamma, q~, k^ and k~.
            decays = Decays.of(interpret, at, tile, ref.g_s, False)
            d_g = in_columns(decays.total * state_products(interpret, at, S, d_S))
            d_q = over_values(interpret, d_o, S) * decays.prefix
            d_k = over_values(interpret, erased, S) * decays.prefix
            by_prefix = load(q) * d_q + load(k) * d_k
            d_g = sums_of(at.row < at.column, by_prefix, ref.part_s, plus=d_g + by_prefix)
            written = over_values(interpret, u, d_S) * decays.suffix
            d_g = sums_of(at.is_below(), load(k) * written, ref.part_s, plus=d_g)
            d_k = d_k + written

            own = jnp.sum(jnp.where(at.row == at.column, load(tile["d_A"]), 0.0), axis=1)
            own = lax.broadcast_in_dim(own, (STEPS, BLOCK), (0,))
            d_q, d_k = d_q + own * load(k), d_k + own * load(q)
            d_beta = jnp.sum(own * 0.0, axis=1)

            def add_level(level, d_q, d_k, d_beta, sums):
                at = Tile.make(now + level)
                decay, upper, pair = jnp.exp(sums), at.is_upper(level), at.is_pair(level)
                beta = of_steps(tile["beta"])
                # Of P: how rows of upper blocks read those of lower ones, and with which weight these are read.
                ref.Z_s[...] = (reader_or_read(tile, at, level) * decay).astype(OPERAND)
                ref.pairs_s[...] = jnp.where(pair, load(tile["d_A"]), 0.0).astype(OPERAND)
                plgpu.commit_smem()
                d_scores = product(ref.pairs_s, ref.Z_s) * decay
                # Of O, keys on both sides.
                ref.Z_s[...] = (load(k) * jnp.where(upper, -beta, 1.0) * decay).astype(OPERAND)
                ref.pairs_s[...] = jnp.where(pair, load(tile["d_E"]), 0.0).astype(OPERAND)
                plgpu.commit_smem()
                d_overlaps = product(ref.pairs_s, ref.Z_s) * decay
                d_beta = d_beta - jnp.sum(jnp.where(upper, load(k) * d_overlaps, 0.0), axis=1)
                d_overlaps = jnp.where(upper, -beta, 1.0) * d_overlaps
                d_q = d_q + jnp.where(upper, d_scores, 0.0)
                d_k = d_k + jnp.where(upper, 0.0, d_scores) + d_overlaps
                return d_q, d_k, d_beta, d_scores * reader_or_read(tile, at, level) + d_overlaps * load(k)

            def add_wide_level(level, carry):
                *carry, d_g = carry
                *carry, d_sums = add_level(level, *carry, level_sums(interpret, now, level, ref.g_s, False))
                summed = Tile.make(now + level).transposed().is_summed(level, False)
                return *carry, sums_of(summed, d_sums, ref.part_s, plus=d_g)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
            d_q, d_k, d_beta, d_sums = add_level(0, d_q, d_k, d_beta, sums_of_single_steps(tile, at, False))
            d_g = d_g + jnp.where(at.is_upper(0), d_sums, 0.0)
            d_q, d_k, d_beta, d_g = lax.fori_loop(1, LEVELS, add_wide_level, (d_q, d_k, d_beta, d_g))
            place = columns_of(sizes, n, chunks.head, key_block, key_blocks)
            ref.d_g.at[place][...] = d_g
            send(ref.row_s, d_beta, ref.d_beta.at[(key_block * sizes.heads + chunks.head) * sizes.N + n])
            # Through tiles that are free by then.
            send(ref.Z_s if dtype == OPERAND else ref.wide_s, d_q, ref.d_q.at[place])
            send(ref.pairs_s if dtype == OPERAND else ref.wide_s, d_k, ref.d_k.at[place])

        keys = chunks.keys(sizes.G, key_block)
        tiles = {"q": (ref.q, keys), "k": (ref.k, keys), "g": (ref.g, chunks.keys(sizes.H, key_block))}
        tiles |= {"beta": (ref.beta, chunks.row()), "d_A": (ref.d_A, chunks.matrix()), "d_E": (ref.d_E, chunks.matrix())}
        for i, block in enumerate(blocks):
            tiles["d_o", i] = ref.d_o, chunks.values(block)
            tiles |= {(name, i): (getattr(ref, name), chunks.values(i, len(blocks))) for name in ("erased", "u")}
            tiles |= {(name, i): (getattr(ref, name), chunks.state(block, key_block)) for name in ("starts", "ends")}
        chunks.run(step, tiles, stages=1)
        plgpu.wait_smem_to_gmem(0)

    steps = sizes.B * sizes.N * STEPS, sizes.H * sizes.K
    tile = plgpu.SMEM((STEPS, BLOCK), OPERAND)
    wide = {} if dtype == OPERAND else {"wide_s": plgpu.SMEM((STEPS, BLOCK), dtype)}
    return common.call(
        by_key, {name: inputs[name] for name in (*names, *by_value)},
        outputs={
            "d_q": jax.ShapeDtypeStruct(steps, dtype), "d_k": jax.ShapeDtypeStruct(steps, dtype),
            "d_g": jax.ShapeDtypeStruct(steps, jnp.float32),
            "d_beta": jax.ShapeDtypeStruct((key_blocks * sizes.heads * sizes.N, STEPS), jnp.float32),
        },
        scratch={
            "g_s": plgpu.SMEM((STEPS, BLOCK), PRECISE), "Z_s": tile, "pairs_s": tile, "part_s": tile,
            "row_s": plgpu.SMEM((STEPS,), jnp.float32),
        } | wide,
        grid={"head": sizes.heads, "block": key_blocks, "part": parts}, interpret=interpret,
    )  # fmt: skip
