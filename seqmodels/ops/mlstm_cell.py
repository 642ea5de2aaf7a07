"""The mLSTM's matrix memory: an exponential input gate, a normaliser, and a stabiliser that keeps both in range.

    m_t = max(log f_t + m_{t-1}, i_t)                        log f_t = log_sigmoid(f~_t), i_t = i~_t, the gates' logits
    C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
    n_t = exp(log f_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
    h_t = q_t^T C_t / (max(|q_t . n_t|, exp(-m_t)) + eps)

"xLSTM", arXiv 2405.04517, eq. 19-27, and eq. 15-17 for the stabiliser; ``eps`` is its authors' code's. An empty
state is C = n = m = 0, at the beginning and where a document starts.

``recurrent`` is this definition, one step after another. Every other form is ``gated_linear_attention`` with one decay
per head: m by a parallel prefix over the maps m -> max(m + a, b), then both exponents above are <= 0 by the choice of
m, and n is the memory of one more value column, which holds ones.

*m is a gauge.* What the past is worth is exp(m) C and exp(m) n: with any other m the same h comes out, but for
``eps``. Two consequences. States are compared by exp(m) C and exp(m) n. And a gradient through m is a sum of terms
that cancel, which costs digits, so that the parallel forms hold m constant where it cancels and differentiate it where
it does not: at ``eps``, and in the state that enters and leaves.

*No overflow.* m_t falls by 300 a step when both gates are shut as far, and exp(-m_t) leaves float32 at the first. h is
therefore computed with numerator and denominator multiplied by exp(c), c = min(m_t, 0): every exponent is <= 0 again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops import dispatch, sequence_parallel
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.placement import per_shard

WORTH_NOTHING = -1e30  # an m; minus infinity would be subtracted from itself


class MLSTMState(NamedTuple):
    """What was read, float32."""

    C: Float[Array, "B H K V"]
    n: Float[Array, "B H K"]
    m: Float[Array, "B H"]


def empty_mlstm_state(batch: int, heads: int, key_width: int, value_width: int) -> MLSTMState:
    """The state of nothing read yet: zeros."""
    return MLSTMState(
        jnp.zeros((batch, heads, key_width, value_width), jnp.float32),
        jnp.zeros((batch, heads, key_width), jnp.float32),
        jnp.zeros((batch, heads), jnp.float32),
    )


def _sequence_parallel(op, q, k, v, input_gate_logit, forget_gate_logit, *, state=None, reset=None, **options):
    """m -> max(m + a, b) over a device's steps, a the sum of log f; b is m after them from a state that is worth nothing."""
    first = state
    if first is None:
        first = empty_mlstm_state(q.shape[0], *q.shape[2:], v.shape[3])
    first = MLSTMState(*(x.astype(jnp.float32) for x in first))
    nothing = MLSTMState(jnp.zeros_like(first.C), jnp.zeros_like(first.n), jnp.full_like(first.m, WORTH_NOTHING))
    gates = input_gate_logit, forget_gate_logit
    _, added = op(q, k, v, *gates, state=nothing, reset=reset, **options)
    log_decay = jnp.sum(jax.nn.log_sigmoid(forget_gate_logit.astype(jnp.float32)), axis=1)
    cut = sequence_parallel.has_reset(reset, q.shape[0])

    def advance(summary, state):
        cut, log_decay, added = summary
        carried = sequence_parallel.select(cut, nothing, state)
        m = jnp.maximum(log_decay + carried.m, added.m)
        old, new = jnp.exp(log_decay + carried.m - m), jnp.exp(added.m - m)
        C = old[..., None, None] * carried.C + new[..., None, None] * added.C
        return MLSTMState(C, old[..., None] * carried.n + new[..., None] * added.n, m)

    before = sequence_parallel.state_before(first, (cut, log_decay, added), advance)
    h, after = op(q, k, v, *gates, state=before, reset=reset, **options)
    return h, sequence_parallel.from_last_device(after)


@per_shard(
    {
        "q": "b t h", "k": "b t h", "v": "b t h", "input_gate_logit": "b t h", "forget_gate_logit": "b t h",
        "state": MLSTMState("b h", "b h", "b h"), "reset": "b t",
    },
    results=("b t h", MLSTMState("b h", "b h", "b h")),
    sequence_parallel=_sequence_parallel,
)  # fmt: skip
def mlstm_cell(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    input_gate_logit: Float[Array, "B T H"],
    forget_gate_logit: Float[Array, "B T H"],
    *,
    state: MLSTMState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """Runs the recurrence at the top of this file over a sequence.

    Nothing scales ``q`` or ``k``: the paper has k / sqrt(K), its authors' later code q / sqrt(K). Sums, gates and state
    are float32 whatever the inputs are.

    Args:
      input_gate_logit: i~, of the exponential gate; any finite number (right and finite at +-300).
      forget_gate_logit: f~, of the sigmoid gate; likewise.
      state: what was read before; ``None`` is the empty state.
      reset: a new document starts at step t: the state before it is empty. Non-finite values then stay in their
        document and head.
      implementation: ``"recurrent"``, or a form of ``gated_linear_attention``; ``None`` is recurrent for one step, else that
        op's choice.
      chunk_size: steps per chunk of ``"chunked"`` and ``"pallas"``, any number >= 1; ``None`` for the fastest here.
      eps: added to the denominator, in the gauge of m as in the authors' code.

    Returns:
      ``(h, state)``: outputs in the dtype of ``v``, and the state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, a chunk size below 1.
      NotImplementedError: ``implementation="pallas"`` where the kernel cannot run; the message says why.
    """
    _check(q, k, v, input_gate_logit, forget_gate_logit, state, reset)
    implementation = dispatch.requested(implementation, q.shape[1] == 1, chunk_size)
    if state is None:
        state = empty_mlstm_state(q.shape[0], *q.shape[2:], v.shape[3])
    state = MLSTMState(*(x.astype(jnp.float32) for x in state))
    i = input_gate_logit.astype(jnp.float32)
    log_f = jax.nn.log_sigmoid(forget_gate_logit.astype(jnp.float32))
    if implementation == "recurrent":
        dispatch.record("mlstm_cell", implementation)
        h, state = _recurrent(q, k, v, i, log_f, state, reset, eps)
    else:
        h, state = _by_linear_attention(q, k, v, i, log_f, state, reset, eps, implementation, chunk_size)
    return h.astype(v.dtype), state


def _check(q, k, v, input_gate_logit, forget_gate_logit, state, reset):
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must both be [B, T, H, K] and v [B, T, H, V]; got {shapes_of(q=q, k=k, v=v)}")
    batch, steps, heads, channels = q.shape
    if steps == 0:
        raise ValueError(f"a sequence has at least one step; got q {list(q.shape)}")
    C, n, m = (None, None, None) if state is None else state
    expected = {
        "input_gate_logit": (input_gate_logit, (batch, steps, heads)),
        "forget_gate_logit": (forget_gate_logit, (batch, steps, heads)),
        "state.C": (C, (batch, heads, channels, v.shape[3])),
        "state.n": (n, (batch, heads, channels)),
        "state.m": (m, (batch, heads)),
        "reset": (reset, (batch, steps)),
    }
    check_arguments(expected, shapes_of(q=q, v=v))


def _read(numerator, denominator, gauge, m, eps):
    """h from q^T C [..., V] and q . n [...], both in ``gauge``, which has the value of ``m`` and perhaps no gradient."""
    c = lax.stop_gradient(jnp.minimum(m, 0.0))  # a gauge as well: h does not depend on it
    bound = jnp.maximum(jnp.abs(denominator) * jnp.exp(c), jnp.exp(c - gauge))
    return numerator * (jnp.exp(c) / (bound + eps * jnp.exp(c + (m - gauge))))[..., None]


def _recurrent(q, k, v, i, log_f, state, reset, eps):
    """The definition, one step after another."""

    def step(state, inputs):
        q, k, v, i, log_f = (x.astype(jnp.float32) for x in inputs[:5])
        starts = inputs[5]
        if starts is not None:
            state = MLSTMState(*(jnp.where(starts.reshape(starts.shape + (1,) * (x.ndim - 1)), 0.0, x) for x in state))
        m = jnp.maximum(log_f + state.m, i)
        decay, weight = jnp.exp(log_f + state.m - m), jnp.exp(i - m)
        written = weight[..., None] * k
        C = decay[..., None, None] * state.C + written[..., :, None] * v[..., None, :]
        n = decay[..., None] * state.n + written
        numerator = jnp.einsum("bhk,bhkv->bhv", q, C, precision=lax.Precision.HIGHEST)
        return MLSTMState(C, n, m), _read(numerator, jnp.sum(q * n, axis=-1), m, m, eps)

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, i, log_f, reset))
    state, h = lax.scan(step, state, by_step)
    return jnp.moveaxis(h, 0, 1), state


def _by_linear_attention(q, k, v, i, log_f, state, reset, eps, implementation, chunk_size):
    """[C | n] is one memory, with one decay per head; the input gate weighs [v | 1] rather than k."""
    m = _stabilisers(i, log_f, state.m, reset)
    gauge = lax.stop_gradient(m)
    # The state that enters is in its own gauge, whose gradient counts.
    before = jnp.concatenate([state.m[:, None], gauge[:, :-1]], axis=1)
    if reset is not None:
        before = jnp.where(reset[:, :, None], 0.0, before)
    # float32, so that the op rounds neither numerator nor denominator before they are divided.
    values = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:3], 1), jnp.float32)], axis=-1)
    sums, memory = gated_linear_attention(
        q,
        k,
        jnp.exp(i - gauge)[..., None] * values,
        (log_f + before - gauge)[..., None],
        state=jnp.concatenate([state.C, state.n[..., None]], axis=-1),
        reset=reset,
        implementation=implementation,
        chunk_size=chunk_size,
    )
    h = _read(sums[..., :-1], sums[..., -1], gauge, m, eps)
    # The state that leaves is in the gauge m: the factor is 1, its gradient is not.
    memory = memory * jnp.exp(gauge - m)[:, -1, :, None, None]
    return h, MLSTMState(memory[..., :-1], memory[..., -1], m[:, -1])


def _stabilisers(i, log_f, m, reset) -> Float[Array, "B T H"]:
    """Every m_t, by a parallel prefix over the maps m -> max(m + a, b); a document's first step is a constant map."""
    starts = jnp.zeros(i.shape[:2], bool) if reset is None else jnp.asarray(reset)
    starts = starts[:, :, None]
    entering = jnp.concatenate([m[:, None], jnp.zeros_like(i[:, 1:])], axis=1)
    known = starts.at[:, 0].set(True)  # steps of which the stabiliser before them is known
    entering = jnp.where(starts, 0.0, entering)
    b = jnp.where(known, jnp.maximum(log_f + entering, i), i)

    def then(first, second):
        known_1, a_1, b_1 = first
        known_2, a_2, b_2 = second
        # Selected, not given weight minus infinity: a NaN of an earlier document would come through.
        a = jnp.where(known_2, a_2, a_1 + a_2)
        b = jnp.where(known_2, b_2, jnp.maximum(b_1 + a_2, b_2))
        return known_1 | known_2, a, b

    return lax.associative_scan(then, (known, log_f, b), axis=1)[2]
