"""The delta rule on Hopper, without decay, with one per head or per key channel: only its inputs and outputs are XLA's.

Of a chunk of 64 steps one 64 x 64 matrix is prepared, in parallel over chunks: the inverse of the triangle by which a step's
correction depends on those before it (DeltaNet, arXiv 2406.06484, section 3; Gated DeltaNet, arXiv 2412.06464, section 3.3):

    T = (I + L)^-1,  L_ij = beta_i (k_i . k_j) D_ij  for i > j,   D_ij = exp(sum of log decay between j and i)

What is as wide as keys or values is never made. A second kernel walks over the chunks with the state; its rows of k and q are scaled
by the decays since the start of the chunk (p) and until its end (s):

    u = T beta (v - p k S),   o = p q S + P u,   S' = gamma S + k^T s u,   P_ij = (q_i . k_j) D_ij  for i >= j

(Without decays the walk makes P as well; with decays P comes with T, which needs D too.) Backward, two more. The walk from the last
chunk with the state's cotangent d_S',

    d_u = P^T d_o + s k d_S',   d_r = T^T d_u,   d_S = gamma d_S' + q^T p d_o - k^T p beta d_r

leaves d_r and d_S' of every chunk in memory. Then, in parallel over chunks,

    d_v = beta d_r,  d_A = tril(d_o u^T) D,  d_E = -beta tril(d_r u^T, -1) D
    d_q = p d_o S^T + d_A k,   d_k = s u d_S'^T - p d_v S^T + d_A^T q + (d_E + d_E^T) k
    d_beta = sum(d_r (v - p k S)) - sum(tril(d_r u^T, -1) (k k^T) D)

With a decay per key channel (``delta_rule_per_channel.py``) the decays are in q~, k^ and k~, which take the place of p q, p k and s k.

The inverse needs no derivative of its own: (I + L) u = r gives d_L = -d_r u^T, as for any linear system.

*The inverse* is made as ``chunk.unit_lower_inverse`` makes it, by blocks of 1, 2, 4, ... 32 steps: of blocks inverted in T, the next
level is T - T L T, cut down to the pairs that join two blocks. T L T is made whole, with T and T L as operands in registers.

*Where float16.* For alike keys u is a sum of numbers of changing sign. T, P, beta (v - k S) and u, none of which is an input, are
rounded to float16, which has three bits more than bfloat16 and reaches 65,504: values of v beyond that overflow. Cotangents, which
may be small, are bfloat16. (Emulated with 128 channels, 256 steps and keys of pairwise correlation 0.95: o is off by 4e-3 of its
largest value, and by 9e-3 if all were bfloat16.)
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from seqmodels.ops.kernels.gpu import chunk_scan, common, delta_rule_per_channel
from seqmodels.ops.kernels.gpu.tiles import (
    BLOCK,
    CHANNELS,
    CLOSED,
    COLUMNS,
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
    unit_lower_inverse,
)

# By what a decay is of: the tiles that a chunk reads with, erases with and writes with, and all that a walk wants of keys and decays.
KEYS = {None: ("q", "k", "k"), "head": ("q", "k", "k"), "channel": ("read", "erase", "write")}
WALKED = {
    None: ("q", "k"),
    "head": ("q", "k", "scores", "prefix", "suffix"),
    "channel": ("read", "erase", "write", "scores", "keep"),
}
BLOCKS_AT_ONCE = 2  # of 64 value channels, whose gradients one kernel makes: more would not fit into shared memory


def unsupported_reason(*, q: Array, k: Array, v: Array, decays: int, precision: lax.Precision, chunk_size: int) -> str | None:
    """What keeps a call from this kernel; ``decays``: how many a head has, 0, 1 or one per channel."""
    if chunk_size < q.shape[1] and chunk_size != STEPS:
        return f"its chunks have {STEPS} steps, not {chunk_size}"
    if q.shape[3] > CHANNELS[-1]:
        return f"K = {q.shape[3]} key channels are more than {CHANNELS[-1]}"
    channels = min(q.shape[3], NARROW)  # the rest is as for any matrix state
    return chunk_scan.unsupported_reason(precision=precision, channels=channels, width=v.shape[3], chunk_size=STEPS)


def forward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H X"] | None,
    state: Float[Array, "B H K V"],
    *,
    keep_starts: bool,
    interpret: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"], dict[str, Array] | None]:
    """Outputs in the dtype of ``v``, the final state, and what ``backward`` wants of this pass (None unless ``keep_starts``)."""
    sizes = Sizes.of(q, v, log_decay)
    inputs = _inputs(sizes, q, k, beta, log_decay)
    prepare = delta_rule_per_channel.prepare if sizes.per == "channel" else _prepare
    prepared = prepare(sizes, inputs, interpret)
    inputs |= prepared | {"v": sizes.flat(v, sizes.V)}
    found = _walk(sizes, inputs, sizes.flat_state(state), v.dtype, keep_starts, interpret)
    kept = prepared | {"starts": found["starts"]} if keep_starts else None
    return sizes.unflat(found["outputs"], v.shape), sizes.unflat_state(found["final"], state.shape), kept


def backward(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H X"] | None,
    kept: dict[str, Array],
    d_output: Float[Array, "B T H V"],
    d_final: Float[Array, "B H K V"],
    *,
    interpret: bool,
) -> tuple[Array, Array, Array, Array, Array | None, Array]:
    """Gradients of q, k, v, beta, log_decay (None without one) and the state."""
    sizes = Sizes.of(q, v, log_decay)
    inputs = _inputs(sizes, q, k, beta, log_decay) | {name: x for name, x in kept.items() if name != "starts"}
    inputs["d_o"] = sizes.flat(d_output, sizes.V)
    walked = _backward_walk(sizes, inputs, sizes.flat_state(d_final), interpret)
    inputs |= {"v": sizes.flat(v, sizes.V), "d_r": walked["d_r"], "starts": kept["starts"], "ends": walked["ends"]}
    # A part of the value channels has no more than fit into shared memory; what q and k get is a sum over all of them.
    blocks = range(sizes.V // COLUMNS)
    at_once = 1 if sizes.per != "channel" and sizes.K > NARROW else BLOCKS_AT_ONCE
    parts = [blocks[first : first + at_once] for first in blocks[::at_once]]
    dtype = OPERAND if len(parts) == 1 and sizes.G == sizes.H else jnp.float32
    make = delta_rule_per_channel.gradients if sizes.per == "channel" else _gradients
    found = [make(sizes, inputs, part, v.dtype, dtype, interpret) for part in parts]
    d = {name: sum(of_part[name] for of_part in found) for name in found[0] if name != "d_v"}
    d_v = jnp.concatenate([sizes.unflat(of_part["d_v"], (*v.shape[:3], sizes.V)) for of_part in found], axis=3)
    return (
        sizes.of_groups(d["d_q"], q.shape).astype(q.dtype),
        sizes.of_groups(d["d_k"], k.shape).astype(k.dtype),
        d_v[..., : v.shape[3]],
        sizes.unflat_rows(d["d_beta"], beta.shape).astype(beta.dtype),
        None if log_decay is None else sizes.unflat_decay(d["d_g"], log_decay.shape).astype(log_decay.dtype),
        sizes.unflat_state(walked["first"], d_final.shape),
    )


def _inputs(sizes, q, k, beta, log_decay):
    """What every kernel below reads."""
    inputs = {
        "q": sizes.flat(q, sizes.K),
        "k": sizes.flat(k, sizes.K),
        "beta": sizes.flat_rows(beta.astype(jnp.float32)),
    }
    if sizes.per == "head":
        inputs["g"] = jnp.maximum(sizes.flat_rows(log_decay[..., 0].astype(jnp.float32)), CLOSED)
    elif sizes.per == "channel":
        inputs["g"] = sizes.flat(log_decay, sizes.K, jnp.float32)
    return inputs


# ---- the kernels


def _prepare(sizes, inputs, interpret):
    """``inverse`` (T) of every chunk; with decays also ``scores`` (P), ``prefix`` (p) and ``suffix`` (s)."""
    product = functools.partial(matmul, interpret)
    parts = parts_of(sizes.heads, sizes.N)
    names = ("k", "beta") if sizes.per is None else ("q", "k", "beta", "g")

    def prepare(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, tile):
            row = sizes.of_chunk(n, chunks.head)
            at = Tile.make(row)
            overlaps = product(tile["k"], tile["k"].transpose((1, 0)))
            if sizes.per is not None:
                sums = PairSums.of(interpret, at, of_steps(tile["g"]), ref.sums_s)
                weights = jnp.exp(jnp.where(at.is_below(), sums.between, 0.0))
                overlaps = overlaps * weights
                scores = jnp.where(at.is_visible(), product(tile["q"], tile["k"].transpose((1, 0))) * weights, 0.0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what is sent are free again
                ref.scores_s[...] = scores.astype(PRECISE)
                ref.prefix_s[...], ref.suffix_s[...] = jnp.exp(sums.prefix), jnp.exp(sums.suffix)
            L = jnp.where(at.is_below(), overlaps * of_steps(tile["beta"]), 0.0)
            inverse = unit_lower_inverse(interpret, row, L, ref.L_s, ref.T_s)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ref.inverse_s[...] = inverse.astype(PRECISE)
            plgpu.commit_smem()
            matrix = pl.ds(row * STEPS, STEPS)
            plgpu.copy_smem_to_gmem(ref.inverse_s, ref.inverse.at[matrix])
            if sizes.per is not None:
                plgpu.copy_smem_to_gmem(ref.scores_s, ref.scores.at[matrix])
                plgpu.copy_smem_to_gmem(ref.prefix_s, ref.prefix.at[chunks.head * sizes.N + n])
                plgpu.copy_smem_to_gmem(ref.suffix_s, ref.suffix.at[chunks.head * sizes.N + n])

        chunks.run(step, _tiles(chunks, ref, *names), stages=STAGES)
        plgpu.wait_smem_to_gmem(0)

    matrices = jax.ShapeDtypeStruct((sizes.N * sizes.heads * STEPS, STEPS), PRECISE)
    rows = jax.ShapeDtypeStruct((sizes.heads * sizes.N, STEPS), jnp.float32)
    tile, vector = plgpu.SMEM((STEPS, STEPS), PRECISE), plgpu.SMEM((STEPS,), jnp.float32)
    outputs, scratch = {"inverse": matrices}, {"L_s": tile, "T_s": tile, "inverse_s": tile}
    if sizes.per is not None:
        outputs |= {"scores": matrices, "prefix": rows, "suffix": rows}
        scratch |= {"sums_s": tile, "scores_s": tile, "prefix_s": vector, "suffix_s": vector}
    return common.call(
        prepare, {name: inputs[name] for name in names},
        outputs=outputs, scratch=scratch, grid={"head": sizes.heads, "part": parts}, interpret=interpret,
    )  # fmt: skip


def _walk(sizes, inputs, state, dtype, keep_starts, interpret):
    """``outputs``, the ``final`` state, and the ``starts`` of chunks if kept; a block has 64 value channels of a head."""
    product = functools.partial(matmul, interpret)
    read, erase, write = KEYS[sizes.per]
    names = ("v", "beta", "inverse", *WALKED[sizes.per])

    def walk(ref):
        head, block = lax.axis_index("head"), lax.axis_index("block")
        columns, of_head = pl.ds(block * COLUMNS, COLUMNS), pl.ds(head * sizes.K, sizes.K)
        chunks = Chunks(sizes, head)
        o_s = ref.write_s if dtype == OPERAND else ref.o_s  # free by then

        def step(n, tile, S):
            at = Tile.make(n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
            ref.S_s[...] = S.astype(OPERAND)
            S = _kept(S, tile)  # here, as a step's tiles may be overwritten after its last barrier
            scores = tile["scores"] if sizes.per is not None else ref.P_s
            if sizes.per is None:
                P = product(tile["q"], tile["k"].transpose((1, 0)))
                ref.P_s[...] = jnp.where(at.is_visible(), P, 0.0).astype(PRECISE)
            plgpu.commit_smem()
            if keep_starts:
                plgpu.copy_smem_to_gmem(ref.S_s, ref.starts.at[_of_state(sizes, n, head), columns])
            lacking = load(tile["v"]) - _scaled(product(tile[erase], ref.S_s), tile, "prefix")
            ref.u_s[...] = (of_steps(tile["beta"]) * lacking).astype(PRECISE)
            plgpu.commit_smem()
            u = product(tile["inverse"], ref.u_s)
            ref.u_s[...] = u.astype(PRECISE)
            ref.write_s[...] = _scaled(u, tile, "suffix").astype(OPERAND)
            plgpu.commit_smem()
            o = product(scores, ref.u_s, plus=_scaled(product(tile[read], ref.S_s), tile, "prefix"))
            S = product(tile[write].transpose((1, 0)), ref.write_s, plus=S)
            o_s[...] = o.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s, ref.outputs.at[columns_of(sizes, n, head, block, sizes.V // COLUMNS)])
            return S

        S = load(ref.state.at[of_head, columns])
        S = chunks.run(step, _tiles(chunks, ref, *names, block=block), carry=S, stages=_stages(sizes))
        ref.final.at[of_head, columns][...] = S
        plgpu.wait_smem_to_gmem(0)

    outputs = {
        "outputs": jax.ShapeDtypeStruct(inputs["v"].shape, dtype),
        "final": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if keep_starts:
        outputs["starts"] = jax.ShapeDtypeStruct((sizes.N * sizes.heads * sizes.K, sizes.V), OPERAND)
    scratch = {
        "S_s": plgpu.SMEM((sizes.K, COLUMNS), OPERAND),
        "u_s": plgpu.SMEM((STEPS, COLUMNS), PRECISE),
        "write_s": plgpu.SMEM((STEPS, COLUMNS), OPERAND),
    }
    if dtype != OPERAND:
        scratch["o_s"] = plgpu.SMEM((STEPS, COLUMNS), dtype)
    if sizes.per is None:
        scratch["P_s"] = plgpu.SMEM((STEPS, STEPS), PRECISE)
    return common.call(
        walk, {name: inputs[name] for name in names} | {"state": state},
        outputs=outputs, scratch=scratch, grid={"head": sizes.heads, "block": sizes.V // COLUMNS}, interpret=interpret,
    )  # fmt: skip


def _backward_walk(sizes, inputs, d_final, interpret):
    """``d_r`` of every step, the cotangents of the states at the ``ends`` of chunks (both bfloat16) and of the ``first`` state."""
    product = functools.partial(matmul, interpret)
    read, erase, write = KEYS[sizes.per]
    names = ("d_o", "beta", "inverse", *WALKED[sizes.per])

    def backward_walk(ref):
        head, block = lax.axis_index("head"), lax.axis_index("block")
        chunks = Chunks(sizes, head, reverse=True)
        columns, of_head = pl.ds(block * COLUMNS, COLUMNS), pl.ds(head * sizes.K, sizes.K)

        def step(n, tile, d_S):
            at = Tile.make(n)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
            ref.d_S_s[...] = d_S.astype(OPERAND)
            d_S = _kept(d_S, tile)
            if sizes.per is None:
                P = product(tile["q"], tile["k"].transpose((1, 0)))
                ref.P_s[...] = jnp.where(at.is_visible(), P, 0.0).astype(OPERAND)
            else:
                ref.P_s[...] = load(tile["scores"]).astype(OPERAND)
            d_o_read = tile["d_o"]
            if "prefix" in tile:
                ref.d_o_s[...] = _scaled(load(tile["d_o"]), tile, "prefix").astype(OPERAND)
                d_o_read = ref.d_o_s
            ref.T_s[...] = load(tile["inverse"]).astype(OPERAND)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref.d_S_s, ref.ends.at[_of_state(sizes, n, head), columns])
            d_u = product(ref.P_s.transpose((1, 0)), tile["d_o"], plus=_scaled(product(tile[write], ref.d_S_s), tile, "suffix"))
            ref.d_u_s[...] = d_u.astype(OPERAND)
            plgpu.commit_smem()
            d_r = product(ref.T_s.transpose((1, 0)), ref.d_u_s)
            ref.d_r_s[...] = d_r.astype(OPERAND)
            ref.d_u_s[...] = -_scaled(of_steps(tile["beta"]) * d_r, tile, "prefix").astype(OPERAND)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ref.d_r_s, ref.d_r.at[columns_of(sizes, n, head, block, sizes.V // COLUMNS)])
            d_S = product(tile[read].transpose((1, 0)), d_o_read, plus=d_S)
            return product(tile[erase].transpose((1, 0)), ref.d_u_s, plus=d_S)

        d_S = load(ref.d_final.at[of_head, columns])
        d_S = chunks.run(step, _tiles(chunks, ref, *names, block=block), carry=d_S, stages=_stages(sizes))
        ref.first.at[of_head, columns][...] = d_S
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((STEPS, COLUMNS), OPERAND)
    scratch = {"d_S_s": plgpu.SMEM((sizes.K, COLUMNS), OPERAND), "P_s": tile, "T_s": tile, "d_u_s": tile, "d_r_s": tile}
    if sizes.per == "head":
        scratch["d_o_s"] = tile
    return common.call(
        backward_walk, {name: inputs[name] for name in names} | {"d_final": d_final},
        outputs={
            "ends": jax.ShapeDtypeStruct((sizes.N * sizes.heads * sizes.K, sizes.V), OPERAND),
            "first": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
            "d_r": jax.ShapeDtypeStruct(inputs["d_o"].shape, OPERAND),
        },
        scratch=scratch, grid={"head": sizes.heads, "block": sizes.V // COLUMNS}, interpret=interpret,
    )  # fmt: skip


def _gradients(sizes, inputs, blocks, value_dtype, dtype, interpret):
    """What comes of some ``blocks`` of 64 value channels, for every head: ``d_v`` of theirs (in ``value_dtype``), ``d_q`` and ``d_k``
    (in ``dtype``), ``d_beta`` and with decays ``d_g`` (float32).
    """
    product = functools.partial(matmul, interpret)
    parts = parts_of(sizes.heads, sizes.N)
    names = ("q", "k", "beta", "inverse", *(() if sizes.per is None else ("g", "prefix", "suffix")))
    by_value = ("v", "d_o", "d_r", "starts", "ends")

    def gradients(ref):
        chunks = Chunks.of_part(sizes, parts)

        def step(n, tile):
            now = sizes.of_chunk(n, chunks.head)
            tiles_of = {name: [tile[name, block] for block in blocks] for name in by_value}
            u = [ref.u_s.at[:, pl.ds(i * COLUMNS, COLUMNS)] for i in range(len(blocks))]

            d_beta = None
            for i, (v, S, d_r) in enumerate(zip(tiles_of["v"], tiles_of["starts"], tiles_of["d_r"])):
                beta, d_r = of_steps(tile["beta"]), load(d_r)
                lacking = load(v) - _scaled(product(tile["k"], S), tile, "prefix")
                ref.r_s[...] = (beta * lacking).astype(PRECISE)
                plgpu.commit_smem()
                u[i][...] = product(tile["inverse"], ref.r_s).astype(OPERAND)
                of_block = jnp.sum(d_r * lacking, axis=1)
                d_beta = of_block if d_beta is None else d_beta + of_block
                # The values are not read again: from here on their tile holds what p k S gets.
                v[...] = -_scaled(beta * d_r, tile, "prefix").astype(OPERAND)
                send(ref.value_s, beta * d_r, ref.d_v.at[columns_of(sizes, n, chunks.head, i, len(blocks))])

            at = Tile.make(now + 1)
            by_update = jnp.where(at.is_below(), over_values(interpret, tiles_of["d_r"], u), 0.0)
            A = jnp.where(at.is_visible(), over_values(interpret, tiles_of["d_o"], u), 0.0)
            if sizes.per is not None:
                between = PairSums.of(interpret, at, of_steps(tile["g"]), ref.r_s).between
                weights = jnp.exp(jnp.where(at.is_below(), between, 0.0))
                by_update, A = by_update * weights, A * weights
            overlaps = product(tile["k"], tile["k"].transpose((1, 0)))
            d_beta = d_beta - jnp.sum(by_update * overlaps, axis=1)
            E = -of_steps(tile["beta"]) * by_update
            if sizes.per is not None:
                pairs = A * product(tile["q"], tile["k"].transpose((1, 0))) + E * overlaps
                # Step m's log decay lies between all pairs j < m <= i.
                d_g = sums_by(interpret, at.row < at.column, pairs, ref.E_s, plus=pairs)
                d_g = jnp.sum(jnp.where(at.is_below(), d_g, 0.0), axis=1)
            ref.E_s[...] = E.astype(OPERAND)
            ref.A_s[...] = A.astype(OPERAND)
            send(ref.row_s, d_beta, ref.d_beta.at[chunks.head * sizes.N + n])

            for i in range(sizes.K // BLOCK):
                channels = pl.ds(i * BLOCK, BLOCK)
                q, k = tile["q"].at[:, channels], tile["k"].at[:, channels]
                S, d_S = ([state.at[channels] for state in tiles_of[name]] for name in ("starts", "ends"))
                place = columns_of(sizes, n, chunks.head, i, sizes.K // BLOCK)
                d_q = _scaled(over_values(interpret, tiles_of["d_o"], S), tile, "prefix")
                d_k_read = over_values(interpret, tiles_of["v"], S)
                d_k_write = _scaled(over_values(interpret, u, d_S), tile, "suffix")
                if sizes.per is not None:
                    at = Tile.make(now + i)
                    by_prefix = by_column(jnp.sum(load(q) * d_q + load(k) * d_k_read, axis=1), ref.vector_s)
                    d_g = d_g + jnp.sum(jnp.where(at.is_below(), 0.0, by_prefix), axis=1)
                    by_suffix = by_column(jnp.sum(load(k) * d_k_write, axis=1), ref.vector_s)
                    d_g = d_g + jnp.sum(jnp.where(at.is_below(), by_suffix, 0.0), axis=1)
                    by_gamma = _kept(state_products(interpret, at, S, d_S), tile)
                    d_g = d_g + jnp.sum(in_columns(by_gamma), axis=1)
                send(ref.key_s, product(ref.A_s, k, plus=d_q), ref.d_q.at[place])
                d_k = product(ref.A_s.transpose((1, 0)), q, plus=d_k_read + d_k_write)
                d_k = product(ref.E_s, k, plus=d_k)
                d_k = product(ref.E_s.transpose((1, 0)), k, plus=d_k)
                send(ref.key_s, d_k, ref.d_k.at[place])
            if sizes.per is not None:
                send(ref.row_s, d_g, ref.d_g.at[chunks.head * sizes.N + n])

        tiles = _tiles(chunks, ref, *names)
        for block in blocks:
            tiles |= {(name, block): tile for name, tile in _tiles(chunks, ref, *by_value, block=block).items()}
        chunks.run(step, tiles, stages=1)
        plgpu.wait_smem_to_gmem(0)

    steps, width = sizes.B * sizes.N * STEPS, len(blocks) * COLUMNS
    keys = jax.ShapeDtypeStruct((steps, sizes.H * sizes.K), dtype)
    rows = jax.ShapeDtypeStruct((sizes.heads * sizes.N, STEPS), jnp.float32)
    tile, vector = plgpu.SMEM((STEPS, STEPS), OPERAND), plgpu.SMEM((STEPS,), jnp.float32)
    outputs = {"d_q": keys, "d_k": keys, "d_v": jax.ShapeDtypeStruct((steps, sizes.H * width), value_dtype), "d_beta": rows}
    scratch = {
        "u_s": plgpu.SMEM((STEPS, width), OPERAND),
        "r_s": plgpu.SMEM((STEPS, STEPS), PRECISE),
        "E_s": tile,
        "A_s": tile,
        "value_s": plgpu.SMEM((STEPS, COLUMNS), value_dtype),
        "key_s": plgpu.SMEM((STEPS, BLOCK), dtype),
        "row_s": vector,
    }
    if sizes.per is not None:
        outputs["d_g"], scratch["vector_s"] = rows, vector
    return common.call(
        gradients, {name: inputs[name] for name in (*names, *by_value)},
        outputs=outputs, scratch=scratch, grid={"head": sizes.heads, "part": parts}, interpret=interpret,
    )  # fmt: skip


# ---- inside the kernels


def _tiles(chunks: Chunks, ref: types.SimpleNamespace, *names: str, block=None) -> dict[str, tuple[Any, plgpu.BlockSpec]]:
    """By name an array and how a chunk lies in it; ``block``: which 64 value channels."""
    specs = dict.fromkeys(("q", "k"), chunks.keys(chunks.sizes.G)) | dict.fromkeys(("inverse", "scores"), chunks.matrix())
    specs |= dict.fromkeys(("beta", "g", "prefix", "suffix"), chunks.row()) | {"keep": chunks.channels()}
    specs |= dict.fromkeys(("read", "erase", "write"), chunks.prepared())
    specs |= dict.fromkeys(("v", "d_o", "d_r"), chunks.values(block)) | dict.fromkeys(("starts", "ends"), chunks.state(block))
    return {name: (getattr(ref, name), specs[name]) for name in names}


def _stages(sizes):
    """Chunks in shared memory of a walk: of wide keys there is room for one."""
    return STAGES if sizes.K <= NARROW else 1


def _of_state(sizes, n, head):
    """Rows of a state among those of all chunks."""
    return pl.ds(sizes.of_chunk(n, head) * sizes.K, sizes.K)


def _scaled(x, tile, name):
    """A step's row by its decay, if there are any."""
    return x * of_steps(tile[name]) if name in tile else x


def _kept(S, tile):
    """gamma S; one decay per head has over a chunk what it has before what the last step reads."""
    if "keep" in tile:
        keep = plgpu.load(tile["keep"], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return S * lax.broadcast_in_dim(keep, S.shape, (0,))
    return S * tile["prefix"][STEPS - 1] if "prefix" in tile else S
