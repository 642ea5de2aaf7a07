"""Sums of log decays per key channel within a chunk's blocks of 1, 2, 4, ... 32 steps, on tensor cores (``chunk.py`` says why).

A matrix of zeros and ones, in registers, times a tile of log decays, float16, gives each row its sum; an exponent is off by 2^-11 of
itself, its exponential by 2e-4 or less. ``tile`` is, by name, what a kernel has of a chunk in shared memory: ``g``, the log decays of
64 channels, perhaps ``start_log_mask``, what of the state a step may read where a document starts, ``q`` and ``k``.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from seqmodels.ops.kernels.gpu.tiles import BLOCK, CLOSED, LEVELS, OPERAND, PRECISE, STEPS, Tile, load, matmul, of_steps


class Decays(NamedTuple):
    """Of 64 key channels: since the start of the chunk, until its end, and over all of it."""

    prefix: Float[Array, "64 64"]
    suffix: Float[Array, "64 64"]
    total: Float[Array, " 64"]

    @classmethod
    def of(cls, interpret: bool, at: Tile, tile: dict, g_s, read_before: bool) -> "Decays":
        """Leaves the log decays in ``g_s``, float16."""
        g = log_decay(tile)
        g_s[...] = g.astype(PRECISE)
        total = jnp.exp(jnp.sum(g, axis=0))
        plgpu.commit_smem()
        before = matmul(interpret, jnp.where(at.is_below(), 1.0, 0.0).astype(PRECISE), g_s, plus=None if read_before else g)
        after = matmul(interpret, jnp.where(at.row < at.column, 1.0, 0.0).astype(PRECISE), g_s)
        return cls(jnp.exp(before + opening(tile)), jnp.exp(after), total)


def send_decayed(ref: types.SimpleNamespace, tile: dict, decays: Decays, row, block, *names: str) -> None:
    """Leaves 64 key channels of a chunk in device memory, those of ``names``: ``read`` (q e^prefix), ``erase`` (k e^prefix) and
    ``write`` (k e^suffix), and their decays over all of it, ``keep``; each through its tile in shared memory.
    """
    of_chunk, columns = pl.ds(row * STEPS, STEPS), pl.ds(block * BLOCK, BLOCK)
    sources = {"read": ("q", decays.prefix), "erase": ("k", decays.prefix), "write": ("k", decays.suffix)}
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tiles of what was sent are free again
    for name in names:
        keys, decay = sources[name]
        getattr(ref, f"{name}_s")[...] = (load(tile[keys]) * decay).astype(OPERAND)
    ref.keep_s[...] = decays.total
    plgpu.commit_smem()
    for name in names:
        plgpu.copy_smem_to_gmem(getattr(ref, f"{name}_s"), getattr(ref, name).at[of_chunk, columns])
    plgpu.copy_smem_to_gmem(ref.keep_s, ref.keep.at[row, columns])


def over_levels(interpret: bool, now, add_level: Callable, carry: Any, tile: dict, at: Tile, g_s, read_before: bool) -> Any:
    """``add_level(level, carry, sums) -> carry`` for blocks of 1, 2, 4, ... 32 steps, with what lies between a step and its block's
    end.
    """
    carry = add_level(0, carry, sums_of_single_steps(tile, at, read_before))

    def add_wide_level(level, carry):
        return add_level(level, carry, level_sums(interpret, now, level, g_s, read_before))

    return lax.fori_loop(1, LEVELS, add_wide_level, carry)


def log_decay(tile):
    return jnp.maximum(load(tile["g"]), CLOSED)


def level_sums(interpret, now, level, g_s, read_before):
    """For each row what lies between it and its block's end towards the neighbour (``Tile.is_summed``)."""
    summed = Tile.make(now + level).is_summed(level, read_before)
    return matmul(interpret, jnp.where(summed, 1.0, 0.0).astype(PRECISE), g_s)


def sums_of_single_steps(tile, at, read_before):
    """Of blocks of one step: what lies between a step and the one before."""
    if read_before:
        return jnp.zeros((STEPS, BLOCK), jnp.float32)
    return jnp.where(at.is_upper(0), log_decay(tile), 0.0)


def opened(tile, at, level, sums):
    """With what of the state a step may read where a document starts."""
    return jnp.where(at.is_upper(level), sums + opening(tile), sums) if "start_log_mask" in tile else sums


def reader_or_read(tile, at, level):
    """q for the rows that read in a level, k for those that are read."""
    return jnp.where(at.is_upper(level), load(tile["q"]), load(tile["k"]))


def opening(tile):
    return of_steps(tile["start_log_mask"]) if "start_log_mask" in tile else 0.0
