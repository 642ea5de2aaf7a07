"""A complex decay per key channel (GateLoop, arXiv 2311.01927), as real gated linear attention with K doubled.

    S_t = exp(log_decay_t + i angle_t)[:, None] * S_{t-1} + k_t v_t^T  (complex)        o_t = Re(q_t^T S_t)

Let A_t be the sum of the angles up to step t. The turned state exp(-i A_t) S_t decays with the real part alone, is written
with k_t exp(-i A_t) and read with q_t exp(i A_t); real and imaginary part are two rows of a real state. The state that is carried
is turned back, so that it does not depend on where a call began.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops import sequence_parallel
from seqmodels.ops.arguments import check_arguments, check_heads, shapes_of
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.placement import per_shard


def _sequence_parallel(op, q, k, v, log_decay, angle, *, state=None, reset=None, **options):
    _, added = op(q, k, v, log_decay, angle, reset=reset, **options)
    shrink = jnp.exp(jnp.sum(log_decay.astype(jnp.float32), axis=1))
    turn = _angle_in_document(angle.astype(jnp.float32), None)[:, -1]

    def apply(decay, state):
        return _turned(state, *(x[..., None] for x in decay))

    cut = sequence_parallel.has_reset(reset, q.shape[0])
    first = jnp.zeros_like(added) if state is None else state.astype(jnp.float32)
    decay = shrink * jnp.cos(turn), shrink * jnp.sin(turn)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, decay, added, apply))
    o, after = op(q, k, v, log_decay, angle, state=before, reset=reset, **options)
    return o, sequence_parallel.from_last_device(after)


def _turned(state: Float[Array, "B H keys V"], cos: Float[Array, "B H #K 1"], sin: Float[Array, "B H #K 1"]):
    """(real + i imaginary) (cos + i sin)."""
    real, imaginary = jnp.split(state, 2, axis=2)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=2)


@per_shard(
    {"q": "b t h", "k": "b t h", "v": "b t h", "log_decay": "b t h", "angle": "b t h", "state": "b h", "reset": "b t"},
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)
def complex_gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"],
    angle: Float[Array, "B T H K"] | Float[Array, "B T H 1"],
    *,
    state: Float[Array, "B H 2*K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H 2*K V"]]:
    """Runs the recurrence at the top of this file; arguments not named here are those of ``gated_linear_attention``.

    Args:
      log_decay: logarithm of the decay's modulus, <= 0.
      angle: of the decay, in radians.
      state: the real part of the state in the first K rows, the imaginary part in the last K.

    Returns:
      ``(o, state)`` with ``o`` in the dtype of ``v`` and the state laid out like the argument, float32.

    Raises:
      ValueError, NotImplementedError: as ``gated_linear_attention``.
    """
    check_heads(q, k, v)
    allowed = q.shape, (*q.shape[:3], 1)
    expected = {"log_decay": (log_decay, *allowed), "angle": (angle, *allowed), "reset": (reset, q.shape[:2])}
    check_arguments(expected, shapes_of(q=q, v=v))
    turned = jnp.broadcast_to(_angle_in_document(angle.astype(jnp.float32), reset), q.shape)
    cos, sin = jnp.cos(turned), jnp.sin(turned)
    if log_decay.shape[-1] != 1:
        log_decay = jnp.concatenate([log_decay, log_decay], axis=-1)
    o, state = gated_linear_attention(
        jnp.concatenate([q * cos, -q * sin], axis=-1),
        jnp.concatenate([k * cos, -k * sin], axis=-1),
        v,
        log_decay,
        state=state,
        reset=reset,
        implementation=implementation,
        chunk_size=chunk_size,
    )
    return o, _turned(state, cos[:, -1, :, :, None], sin[:, -1, :, :, None])


def _angle_in_document(angle: Float[Array, "B T H X"], reset: Bool[Array, "B T"] | None) -> Float[Array, "B T H X"]:
    """Sum of the angles since the start of the document or the call, modulo a full turn.

    Every partial sum is brought back to one turn, in two words of 2 pi: a running sum of thousands of radians would
    have lost the digits that cosine and sine need.
    """
    starts = jnp.zeros(angle.shape[:2], bool) if reset is None else reset

    def then(first, second):
        before = jnp.where(second[0], 0.0, first[1])
        return first[0] | second[0], _within_a_turn(before + second[1])

    marks = starts[:, :, None, None]
    return lax.associative_scan(then, (marks, angle), axis=1)[1]


def _within_a_turn(angle):
    turns = lax.stop_gradient(jnp.round(angle / 6.2831853))
    return (angle - turns * 6.28125) - turns * 1.9353071795864769e-03
