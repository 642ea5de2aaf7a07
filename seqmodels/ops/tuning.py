"""How many steps a chunk has where the caller does not say: by op and device, in one place.

The figures for a CPU were measured on two cores of an AMD EPYC, forward and backward. Those for a TPU and a GPU are what the
arithmetic of matrix units and of on-chip memory favours, to be replaced by measurements: no others have been tried on a device.
"""

import math

from seqmodels.ops import target

CHUNK_SIZES = {
    # CPU: 32 steps take 1.0 to 1.2 times as long, 128 1.1 to 1.4 times (B 1 to 16, T 256 to 4096).
    "gated_linear_attention": {"cpu": 64, "tpu": 64, "gpu": 64},
    # CPU: 16 and 64 take 1.3 to 1.8 times as long as 32 (B 4, T 1024, H 4, K = V = 64).
    "delta_rule": {"cpu": 32, "tpu": 64, "gpu": 64},
    # CPU: 8 to 64 take the same time; larger ones save fewer states, smaller ones recompute in less memory.
    "selective_scan": {"cpu": 32, "tpu": 64, "gpu": 64},
    # CPU: the fastest at B 16, T 256, D 128, N 64.
    "diagonal_ssm": {"cpu": 64, "tpu": 64, "gpu": 64},
    # CPU: 32 as fast as 64, with fewer steps to make its tables.
    "dplr_ssm": {"cpu": 32, "tpu": 32, "gpu": 32},
}


def num_blocks(steps: int) -> int:
    """How many blocks of ``linear_recurrence`` run side by side.

    On a CPU one, which reads its inputs once: with 2 to 8, a gradient takes 1.05 to 1.4 times as long (B 1 and 4, E 512, T
    1024 to 32768). Any other device wants the fewest steps one after the other, counting those within a block and those
    between blocks.
    """
    return 1 if target.device() == "cpu" else math.isqrt(steps - 1) + 1


def chunk_size(op: str, steps: int, asked: int | None) -> int:
    """Steps per chunk of a sequence of ``steps``: what the caller asked for, else the table's for the device."""
    return min(steps, CHUNK_SIZES[op][target.device()] if asked is None else asked)
