"""Gated linear attention on a TPU in one kernel forwards and one backwards: nothing is prepared, nothing in between is stored.

The grid is (rows of the batch, groups, parts of a group's heads, chunks), the last in order: a step reads one chunk of a few
heads, where they lie in [B, T, H, K], and advances their states, which stay in scratch memory from the first chunk to the
last. q, k, v and the decays are read once and o is written once, in the dtypes they have. The forward pass leaves the states
at chunk starts; the backward pass walks from the last chunk with the cotangent of the state, and gives all gradients on the way.

What a step computes is in ``tpu/decay_per_head.py`` (one decay per head, or none) and ``tpu/decay_per_channel.py``.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqmodels.ops.chunk import power_of_two
from seqmodels.ops.kernels.tpu import decay_per_channel, decay_per_head
from seqmodels.ops.kernels.tpu.common import VMEM_BYTES, Walk, heads_at_once, operand_dtype, tile_bytes, unsupported_dtype


def unsupported_reason(*, q: Array, k: Array, v: Array, decays: int, precision: lax.Precision, chunk_size: int) -> str | None:
    """What keeps a call from this kernel; ``decays``: how many a head has, 0, 1 or one per channel."""
    reason = unsupported_dtype(q=q, k=k, v=v)
    if reason is not None:
        return reason
    if chunk_size < q.shape[1] and chunk_size != _steps(chunk_size, q.shape[1], decays):
        return f"its chunks have 16, 32, 64, ... steps (of one decay per head or none, any multiple of 16), not {chunk_size}"
    heads = heads_at_once(q.shape[2], v.shape[2] // q.shape[2], q.shape[3], v.shape[3])
    if heads is None:
        return f"heads of {q.shape[3]} and {v.shape[3]} channels do not fill whole registers"
    needed = _step_bytes(heads, _steps(chunk_size, q.shape[1], decays), decays)
    if needed > VMEM_BYTES:
        return f"its step needs {needed / 2**20:.0f} MiB of VMEM, of {VMEM_BYTES / 2**20:.0f}"
    return None


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
    output_dtype: DTypeLike,
    keep_starts: bool,
    interpret,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"], Array | None]:
    """Outputs, final state, and (if kept) the states at chunk starts in this kernel's layout.

    Without a bonus term; ``start_log_mask``, for reading before: the logarithm of what of the state a step may read, 0 or minus
    infinity where a document starts.
    """
    form = _form(_decays(log_decay))
    walk = Walk(q, v, _steps(chunk_size, q.shape[1], _decays(log_decay)), reverse=False)
    outputs = {"o": ("values", output_dtype)}
    if keep_starts:
        outputs["starts"] = ("starts", operand_dtype(precision))
    final, found = walk.call(
        functools.partial(form.forward, heads=walk.heads, read_before=read_before, precision=precision),
        _inputs(walk, q, k, v, log_decay, start_log_mask),
        outputs,
        form.states(state, walk.heads),
        interpret=interpret,
    )
    return walk.of_lanes(found["o"], v.shape), form.of_states(final, walk.heads), found["starts"] if keep_starts else None


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
    interpret,
) -> tuple[Array, Array, Array, Array | None, Array]:
    """Gradients of q, k, v, log_decay (None without one) and the state."""
    form = _form(_decays(log_decay))
    walk = Walk(q, v, _steps(chunk_size, q.shape[1], _decays(log_decay)), reverse=True)
    outputs = walk.d_keys(q, k) | {"d_v": ("values", v.dtype)}
    inputs = _inputs(walk, q, k, v, log_decay, start_log_mask)
    if log_decay is not None:
        outputs["d_decays"] = (inputs["decays"][0], jnp.float32)
    d_state, found = walk.call(
        functools.partial(form.backward, heads=walk.heads, read_before=read_before, precision=precision),
        inputs | {"d_output": ("values", walk.lanes(d_output)), "starts": ("starts", starts)},
        outputs,
        form.states(d_final, walk.heads),
        interpret=interpret,
    )
    return (
        *walk.of_d_keys(found, q, k),
        walk.of_lanes(found["d_v"], v.shape),
        None if log_decay is None else walk.of_decays(found["d_decays"], log_decay),
        form.of_states(d_state, walk.heads),
    )


def _decays(log_decay):
    return 0 if log_decay is None else log_decay.shape[-1]


def _form(decays):
    """The kernels' bodies and the layout they want states in."""
    return decay_per_head if decays <= 1 else decay_per_channel


def _inputs(walk, q, k, v, log_decay, start_log_mask):
    inputs = {"q": ("keys", walk.lanes(q)), "k": ("keys", walk.lanes(k)), "v": ("values", walk.lanes(v))}
    if log_decay is not None:
        inputs["decays"] = walk.decays(log_decay)
    if start_log_mask is not None:
        inputs["start_log_mask"] = ("row", walk.padded(start_log_mask).reshape(walk.batch, walk.count, 1, walk.steps))
    return inputs


def _steps(chunk_size: int, steps: int, decays: int) -> int:
    """The steps of a chunk: whole registers of bfloat16, which are 16 rows; with decays by channel, a power of two."""
    size = -(-min(steps, chunk_size) // 16) * 16
    return size if decays <= 1 else power_of_two(size)


def _step_bytes(heads, steps: int, decays: int) -> int:
    """VMEM of a step of the backward pass, the larger one; blocks are held twice, to load ahead."""
    tile = functools.partial(tile_bytes, size=4)
    count = heads.groups * heads.repeats
    by_chunk = 4 * tile(steps, heads.groups * heads.channels) + 3 * tile(steps, count * heads.width)
    by_chunk += 2 * (tile(count, steps) if decays <= 1 else tile(steps, count * heads.channels))
    states = count * tile(heads.channels, heads.width)
    return 2 * (by_chunk + 3 * states) + states
