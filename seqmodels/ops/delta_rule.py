"""The delta rule: a matrix state that corrects what it remembers under a key, with and without decay.

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T
    o_t = q_t^T S_t

The first line is one step of gradient descent, with step size beta_t, on |v_t - S^T k_t|^2 / 2 from the decayed
state. Without decay it is DeltaNet (arXiv 2406.06484), with one decay per head Gated DeltaNet (arXiv 2412.06464),
with one per key channel KDA (arXiv 2510.26692).

``recurrent`` is the definition, step by step. ``chunked`` writes what step i adds as k_i u_i^T, where u_i is beta_i
times what the memory lacks under k_i. It depends on the steps before i in the chunk and on S, which the chunk starts
from:

    (I + L) u = beta (v - k e^prefix S)
    L_ij = beta_i k_i^T diag(exp(sum of log decay between j and i)) k_j      for i > j

so that u = U - W S with U = T beta v, W = T beta k e^prefix, T = (I + L)^-1; the rest is linear attention to u.
``chunk.py`` says why this is stable for every decay; ``unit_lower_inverse``, why for any set of keys. ``pallas`` is
``chunked`` in kernels: all of it (``delta_rule``), or the recurrence between chunks (``chunk_scan``).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops import chunk_scan, documents, kernels, sequence_parallel
from seqmodels.ops.arguments import check_arguments, check_heads, shapes_of
from seqmodels.ops.chunk import (
    Chunk,
    float32,
    local_sums,
    pair_log_decay,
    pair_scores,
    product_precision,
    solve_unit_lower,
)
from seqmodels.ops.dispatch import KernelForm, dispatch
from seqmodels.ops.placement import per_shard


class _Inputs(NamedTuple):
    """Heads are two axes here: G groups of q and k, R value heads in each."""

    q: Float[Array, "B T G 1 K"]
    k: Float[Array, "B T G 1 K"]
    v: Float[Array, "B T G R V"]
    beta: Float[Array, "B T G R 1"]
    log_decay: Float[Array, "B T G R X"] | None


def _sequence_parallel(op, q, k, v, beta, log_decay=None, *, state=None, reset=None, **options):
    """What all steps do to a state is a K x K matrix of each head, and the op makes it: of the identity, with nothing written."""
    _, added = op(q, k, v, beta, log_decay, reset=reset, **options)
    batch, heads, channels, _ = added.shape
    identity = jnp.broadcast_to(jnp.eye(channels, dtype=jnp.float32), (batch, heads, channels, channels))
    nothing = jnp.zeros((*v.shape[:3], channels), v.dtype)
    _, decay = op(q, k, nothing, beta, log_decay, state=identity, reset=reset, **options)
    product = functools.partial(jnp.einsum, "bhij,bhjv->bhiv", precision=lax.Precision.HIGHEST)
    cut = sequence_parallel.has_reset(reset, batch)
    first = jnp.zeros_like(added) if state is None else state.astype(jnp.float32)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, decay, added, product))
    o, after = op(q, k, v, beta, log_decay, state=before, reset=reset, **options)
    return o, sequence_parallel.from_last_device(after)


@per_shard(
    {"q": "b t g", "k": "b t g", "v": "b t h", "beta": "b t h", "log_decay": "b t h", "state": "b h", "reset": "b t"},
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)
def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None = None,
    *,
    state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the recurrence at the top of this file over a sequence.

    H must be a multiple of G: head h reads with the queries and keys of group ``h // (H // G)`` (grouped values).
    Nothing scales ``q`` or normalises ``k``: the state is bounded while beta |k|^2 is within [0, 2]. The state and all
    sums are float32 whatever the inputs are; float32 inputs get float32 products on every device.

    Args:
      beta: how much of the error under k_t is corrected: 0 none, 1 all of it; above 1 the state's component along k_t
        changes sign (a negative eigenvalue).
      log_decay: natural logarithm of the decay, <= 0, minus infinity allowed; per key channel or one per head.
      state: what was read before; ``None`` is an empty state of zeros.
      reset: a new document starts at step t: S_{t-1} is taken to be zero. Non-finite values then stay in their
        document and head.
      implementation: ``"recurrent"``, ``"chunked"``, ``"pallas"``, or ``None`` for the fastest here: recurrent for one step,
        else pallas where the device has the kernel, else chunked.
      chunk_size: steps per chunk of ``"chunked"`` and ``"pallas"``, any number >= 1; ``None`` for the fastest here.

    Returns:
      ``(o, state)``: outputs in the dtype of ``v``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a chunk size below 1.
      NotImplementedError: a form that does not exist, or a kernel that cannot run; the message says why.
    """
    _check_shapes(q, k, v, beta, log_decay, state, reset)
    batch, steps, heads, width = v.shape
    if state is None:
        state = jnp.zeros((batch, heads, q.shape[3], width), jnp.float32)
    form = dispatch(
        "delta_rule", _FORMS, implementation,
        steps=steps, chunk_size=chunk_size, kernel_forms=_kernel_forms(q, k, v, log_decay, reset),
    )  # fmt: skip
    o, state = form(q, k, v, beta, log_decay, state.astype(jnp.float32), reset)
    return o.astype(v.dtype), state


def _kernel_forms(q, k, v, log_decay, reset):
    precision = product_precision(q, k)
    decays = (0 if reset is None else 1) if log_decay is None else log_decay.shape[-1]  # a reset is a decay, too
    whole = {"q": q, "k": k, "v": v, "decays": decays, "precision": precision}
    between = {"precision": precision, "channels": q.shape[3], "width": v.shape[3]}
    return {
        "delta_rule": KernelForm(functools.partial(_contained, _in_one_kernel), whole),
        "chunk_scan": KernelForm(_FORMS["chunked"], between),
    }


def _check_shapes(q, k, v, beta, log_decay, state, reset):
    check_heads(q, k, v)
    batch, steps, _, channels = q.shape
    heads, width = v.shape[2:]
    expected = {
        "beta": (beta, (batch, steps, heads)),
        "log_decay": (log_decay, (batch, steps, heads, channels), (batch, steps, heads, 1)),
        "state": (state, (batch, heads, channels, width)),
        "reset": (reset, (batch, steps)),
    }
    check_arguments(expected, shapes_of(q=q, v=v))


def _recurrent(q, k, v, beta, log_decay, state, reset):
    """The definition, one step after another."""
    repeats = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, repeats, axis=2), jnp.repeat(k, repeats, axis=2)
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def step(state, inputs):
        q, k, v, beta, log_decay = float32(inputs[:5])
        starts = inputs[5]
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], 0.0, state)
        if log_decay is not None:
            state = jnp.exp(log_decay)[..., :, None] * state
        correction = beta[..., None] * (v - product("bhk,bhkv->bhv", k, state))
        state = state + k[..., :, None] * correction[..., None, :]
        return state, product("bhk,bhkv->bhv", q, state)

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, log_decay, reset))
    state, o = lax.scan(step, state, by_step)
    return jnp.moveaxis(o, 0, 1), state


def _contained(form, q, k, v, beta, log_decay, state, reset, **options):
    """Runs a form made of matrix products, in which ``0 * nan`` would otherwise cross from document to document."""
    if reset is None:
        return form(q, k, v, beta, log_decay, state, reset, **options)
    repeats = v.shape[2] // q.shape[2]
    q, bad_q = documents.quarantine(q)
    k, bad_k = documents.quarantine(k)
    v, bad_v = documents.quarantine(v)
    beta, bad_beta = documents.quarantine(beta[..., None])
    clean_state, bad_state = documents.quarantine(state.reshape(*state.shape[:2], math.prod(state.shape[2:])))
    bad_q, bad_k = jnp.repeat(bad_q, repeats, axis=2), jnp.repeat(bad_k, repeats, axis=2)
    bad = bad_k | bad_v | bad_beta
    if log_decay is not None:
        log_decay, bad_decay = documents.quarantine(log_decay, allow_negative_infinity=True)
        bad |= bad_decay

    o, final = form(q, k, v, beta[..., 0], log_decay, clean_state.reshape(state.shape), reset, **options)

    tainted = documents.nan_reach(bad, reset, carried=bad_state)
    return documents.set_nan(o, tainted | bad_q), documents.set_nan(final, tainted[:, -1, :, None])


def _chunked(q, k, v, beta, log_decay, state, reset, *, chunk_size, kernel=None):
    """Chunks prepared by XLA; the recurrence between them by XLA or in the kernel ``chunk_scan``."""
    batch, steps, groups, _ = q.shape
    repeats = v.shape[2] // groups
    log_decay = _with_resets(log_decay, reset, heads=v.shape[2])

    def grouped(x):
        return x.reshape(batch, steps, groups, repeats, math.prod(x.shape[3:]))

    inputs = _Inputs(q[:, :, :, None], k[:, :, :, None], *jax.tree.map(grouped, (v, beta, log_decay)))
    precision = product_precision(q, k)
    prepare = functools.partial(_prepare, precision=precision)
    grouped_state = state.reshape(batch, groups, repeats, *state.shape[2:])
    o, final = chunk_scan.run(prepare, chunk_size, precision, inputs, grouped_state, kernel=kernel)
    return o.reshape(v.shape), final.reshape(state.shape)


def _with_resets(log_decay, reset, *, heads):
    """A reset as what it is to a decay: the logarithm of zero."""
    if reset is None:
        return log_decay
    decay = jnp.zeros((heads, 1)) if log_decay is None else log_decay
    return jnp.where(reset[:, :, None, None], -jnp.inf, decay)


def _in_one_kernel(q, k, v, beta, log_decay, state, reset, *, chunk_size, kernel):
    """All of it in the kernel ``delta_rule``, whose chunks have one length."""
    log_decay = _with_resets(log_decay, reset, heads=v.shape[2])
    return _whole(kernel, q, k, v, beta, log_decay, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(kernel: kernels.Kernel, q, k, v, beta, log_decay, state):
    """Outputs and the final state."""
    return kernel.passes.forward(q, k, v, beta, log_decay, state, keep_starts=False, interpret=kernel.interpret)[:2]


def _whole_forward(kernel, *inputs):
    o, final, kept = kernel.passes.forward(*inputs, keep_starts=True, interpret=kernel.interpret)
    return (o, final), (*inputs[:-1], kept)


def _whole_backward(kernel, residuals, cotangents):
    return kernel.passes.backward(*residuals, *cotangents, interpret=kernel.interpret)


_whole.defvjp(_whole_forward, _whole_backward)


def _prepare(inputs: _Inputs, *, precision: lax.Precision) -> Chunk:
    """What chunks [..., G, R, C, features] do to the state; ``overlaps`` is L without beta."""
    q, k, v, beta, log_decay = float32(inputs)
    product = functools.partial(jnp.einsum, precision=precision)
    keep = None
    if log_decay is None:
        read, write, seen = q, k, k
        scores = jnp.where(np.tri(q.shape[-2], dtype=bool), product("...ik,...jk->...ij", q, k), 0.0)
        overlaps = product("...ik,...jk->...ij", k, k)
    else:
        sums = local_sums(log_decay)
        prefix = jnp.exp(sums.prefix)
        read, write, seen, keep = q * prefix, k * jnp.exp(sums.suffix), k * prefix, jnp.exp(sums.total)
        if log_decay.shape[-1] == 1:
            decay = jnp.exp(pair_log_decay(sums, jnp.zeros_like(log_decay[..., 0])))
            scores = product("...ik,...jk->...ij", q, k) * decay
            overlaps = product("...ik,...jk->...ij", k, k) * decay
        else:
            own = jnp.broadcast_to(jnp.sum(q * k, axis=-1), v.shape[:-1])
            scores = pair_scores(q, k, sums, own, precision)
            overlaps = pair_scores(k, k, sums, jnp.zeros_like(own), precision)
    value, erase = solve_unit_lower(beta * overlaps, (beta * v, beta * seen), precision)
    return Chunk(read=read, write=write, value=value, scores=scores, keep=keep, erase=erase)


_FORMS = {
    "recurrent": _recurrent,
    "chunked": functools.partial(_contained, _chunked),
    "associative": (
        "delta_rule has no associative form: a step multiplies the state by a K x K matrix, and a scan over products "
        "of such matrices takes K times the work of the recurrence; use implementation='chunked'"
    ),
    "parallel": (
        "delta_rule has no parallel form: every update depends on all before it, through the inverse of a T x T "
        "matrix; use implementation='chunked', which inverts one of chunk_size steps"
    ),
}
