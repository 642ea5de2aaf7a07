"""Gated linear attention: a matrix state with decay, in every form of the same mathematics.

    S_t = exp(log_decay_t)[:, None] * S_{t-1} * exp(value_log_decay_t)[None, :] + k_t v_t^T
    o_t = q_t^T S_t                                    without a bonus: the state is read after the update
    o_t = q_t^T (S_{t-1} + diag(bonus) k_t v_t^T)      with a bonus: read before it, the current pair weighted (RWKV)

Table 1 of arXiv 2312.06635 lists what reduces to it: linear attention (no decay), RetNet, Mamba-2, gated RFA, mLSTM's core
(one decay per head), GLA, HGRN-2, RWKV-6 (one per key channel), DFW (key and value side), GateLoop (a complex decay:
``complex_decay.py``).

``recurrent`` is the definition, step by step, and the reference of the others; ``associative`` the textbook parallel scan over
the states (memory T K V); ``parallel`` the quadratic closed form; ``chunked`` the quadratic form inside chunks and a recurrence
between them (``chunk.py`` says why it is stable for every decay). ``pallas`` is a kernel for the whole of it, where the
device has one for the decays given, else ``chunked`` with the recurrence between chunks in a kernel.
"""

import functools
import math
from collections.abc import Callable
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
    advance,
    float32,
    local_sums,
    lower_half,
    pad_steps,
    pair_log_decay,
    pair_scores,
    power_of_two,
    product_precision,
    upper_half,
)
from seqmodels.ops.dispatch import KernelForm, dispatch
from seqmodels.ops.placement import per_shard


class _Inputs(NamedTuple):
    """Heads are two axes here: G groups of q and k, R value heads in each. ``None`` where there is nothing.

    With one decay per head, a group's value heads lie side by side instead: v [B, T, G, 1, R V], log_decay [B, T, G, 1, R].
    """

    q: Float[Array, "B T G 1 K"]
    k: Float[Array, "B T G 1 K"]
    v: Float[Array, "B T G R V"]
    log_decay: Float[Array, "B T G R X"] | None
    value_log_decay: Float[Array, "B T G R V"] | None
    start_log_mask: Float[Array, "B T 1 1 1"] | None
    """Only when reading before the update, with resets: minus infinity where a document starts, else 0."""


def _sequence_parallel(op, q, k, v, log_decay=None, *, value_log_decay=None, bonus=None, state=None, reset=None, **options):
    _check_shapes(q, k, v, log_decay, value_log_decay, bonus, state, reset)
    decays = {"log_decay": log_decay, "value_log_decay": value_log_decay}
    added, decay = _summary(k, v, *decays.values(), reset)
    cut = sequence_parallel.has_reset(reset, v.shape[0])
    first = jnp.zeros_like(added) if state is None else state.astype(jnp.float32)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, decay, added, jnp.multiply))
    o, after = op(q, k, v, **decays, bonus=bonus, state=before, reset=reset, **options)
    return o, sequence_parallel.from_last_device(after)


@jax.checkpoint
def _summary(k, v, log_decay, value_log_decay, reset) -> tuple[Float[Array, "B H K V"], Float[Array, "B H #K #V"]]:
    """The state that steps lead to from nothing, in one product, and their decay.

    What a step adds is decayed by all steps after it, and selected away where another document starts after it.
    """
    (batch, steps, heads, width), groups = v.shape, k.shape[2]
    ids = jnp.zeros((batch, steps), jnp.int32) if reset is None else documents.segment_ids(reset)
    last, bad = (ids == ids[:, -1:])[:, :, None], jnp.zeros((batch, steps, 1), bool)
    precision, decay = product_precision(k, v), jnp.ones((batch, heads, 1, 1), jnp.float32)

    def of_last(x, **options):
        nonlocal bad
        if reset is not None:
            x, found = documents.quarantine(x, **options)
            bad |= jnp.repeat(found, heads // x.shape[2], axis=2)
        return jnp.where(last[..., None], x.astype(jnp.float32), 0.0)

    def decays(log_decay):
        """After each step, and of all."""
        log_decay = of_last(log_decay, allow_negative_infinity=True)
        from_here = lax.cumsum(log_decay, axis=1, reverse=True)
        after = jnp.concatenate([from_here[:, 1:], jnp.zeros_like(log_decay[:, :1])], axis=1)
        return jnp.exp(after), jnp.exp(from_here[:, 0])

    k, v = of_last(k), of_last(v)
    if log_decay is not None:
        after, total = decays(log_decay)
        decay = decay * total[..., :, None]
        if log_decay.shape[-1] == 1:
            v = v * after
        else:
            k, groups = jnp.repeat(k, heads // groups, axis=2) * after, heads
    if value_log_decay is not None:
        after, total = decays(value_log_decay)
        v, decay = v * after, decay * total[..., None, :]
    by_group = v.reshape(batch, steps, groups, heads // groups, width)
    added = jnp.einsum("btgk,btgrv->bgrkv", k, by_group, precision=precision)
    added = added.reshape(batch, heads, k.shape[-1], width)
    return documents.set_nan(added, jnp.any(bad & last, axis=1)[..., None]), decay


@per_shard(
    {
        "q": "b t g", "k": "b t g", "v": "b t h", "log_decay": "b t h", "value_log_decay": "b t h", "bonus": "h",
        "state": "b h", "reset": "b t",
    },
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)  # fmt: skip
def gated_linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None = None,
    *,
    value_log_decay: Float[Array, "B T H V"] | None = None,
    bonus: Float[Array, "H K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the recurrence at the top of this file over a sequence.

    H must be a multiple of G: head h reads with the queries and keys of group ``h // (H // G)`` (Mamba-2's groups). Nothing scales
    ``q``. The state and all sums are float32 whatever the inputs are; float32 inputs get float32 products on every device.

    Args:
      log_decay: natural logarithm of the decay, <= 0, minus infinity allowed; per key channel or one per head.
      value_log_decay: the same for the value side of the state.
      bonus: given, the state is read before the update and the current pair counts with this weight per key channel.
      state: what was read before; ``None`` is an empty state of zeros.
      reset: a new document starts at step t: S_{t-1} is taken to be zero. Non-finite values then stay in their document and head.
      implementation: ``"recurrent"``, ``"associative"``, ``"parallel"``, ``"chunked"``, ``"pallas"``, or ``None`` for the fastest
        here: recurrent for one step, else pallas where the device has the kernel, else chunked.
      chunk_size: steps per chunk of ``"chunked"`` and ``"pallas"``, any number >= 1; ``None`` for the fastest here.

    Returns:
      ``(o, state)``: outputs in the dtype of ``v``, and the float32 state after the last step.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a chunk size below 1.
      NotImplementedError: ``implementation="pallas"`` where the kernel cannot run; the message says why.
    """
    _check_shapes(q, k, v, log_decay, value_log_decay, bonus, state, reset)
    batch, steps, heads, width = v.shape
    if state is None:
        state = jnp.zeros((batch, heads, q.shape[3], width), jnp.float32)
    form = dispatch(
        "gated_linear_attention", _FORMS, implementation,
        steps=steps, chunk_size=chunk_size, kernel_forms=_kernel_forms(q, k, v, log_decay, value_log_decay, bonus, reset),
    )  # fmt: skip
    o, state = form(q, k, v, log_decay, value_log_decay, bonus, state.astype(jnp.float32), reset)
    return o.astype(v.dtype), state


def _kernel_forms(q, k, v, log_decay, value_log_decay, bonus, reset):
    precision, repeats = product_precision(q, k), v.shape[2] // q.shape[2]
    decays = _decays_of_a_head(log_decay, reset)
    width = v.shape[3] * (repeats if _packs_heads(decays, value_log_decay, bonus) else 1)
    call = {"precision": precision, "channels": q.shape[3], "width": width}
    forms = {"chunk_scan": KernelForm(functools.partial(_contained, _chunked), call)}
    if value_log_decay is None:
        call = {"q": q, "k": k, "v": v, "decays": decays, "precision": precision}
        forms = {"gated_linear_attention": KernelForm(functools.partial(_contained, _in_one_kernel), call)} | forms
    return forms


def _decays_of_a_head(log_decay, reset) -> int:
    """0, 1 or K: a reset is a decay, too."""
    if log_decay is None:
        return 0 if reset is None else 1
    return log_decay.shape[-1]


def _packs_heads(decays: int, value_log_decay, bonus) -> bool:
    return decays == 1 and value_log_decay is None and bonus is None


def _check_shapes(q, k, v, log_decay, value_log_decay, bonus, state, reset):
    check_heads(q, k, v)
    batch, steps, _, channels = q.shape
    heads, width = v.shape[2:]
    expected = {
        "log_decay": (log_decay, (batch, steps, heads, channels), (batch, steps, heads, 1)),
        "value_log_decay": (value_log_decay, (batch, steps, heads, width)),
        "bonus": (bonus, (heads, channels)),
        "state": (state, (batch, heads, channels, width)),
        "reset": (reset, (batch, steps)),
    }
    check_arguments(expected, shapes_of(q=q, v=v))


def _recurrent(q, k, v, log_decay, value_log_decay, bonus, state, reset):
    """The definition, one step after another."""
    repeats = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, repeats, axis=2), jnp.repeat(k, repeats, axis=2)

    def step(state, inputs):
        q, k, v, log_decay, value_log_decay = float32(inputs[:5])
        starts = inputs[5]
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], 0.0, state)
        update = k[..., :, None] * v[..., None, :]
        before = state
        if log_decay is not None:
            state = jnp.exp(log_decay)[..., :, None] * state
        if value_log_decay is not None:
            state = state * jnp.exp(value_log_decay)[..., None, :]
        state = state + update
        read = state if bonus is None else before + bonus.astype(jnp.float32)[:, :, None] * update
        return state, jnp.einsum("bhk,bhkv->bhv", q, read, precision=lax.Precision.HIGHEST)

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, value_log_decay, reset))
    state, o = lax.scan(step, state, by_step)
    return jnp.moveaxis(o, 0, 1), state


def _associative(q, k, v, log_decay, value_log_decay, bonus, state, reset):
    """A parallel prefix over the affine maps S -> a * S + b that the steps are; a reset makes a map that forgets S."""
    batch, steps, heads, _ = v.shape
    repeats = heads // q.shape[2]
    q, k, v, log_decay, value_log_decay = float32((q, k, v, log_decay, value_log_decay))
    q, k = jnp.repeat(q, repeats, axis=2), jnp.repeat(k, repeats, axis=2)
    update = k[..., :, None] * v[..., None, :]
    decay = jnp.ones((batch, steps, heads, 1, 1), jnp.float32)
    if log_decay is not None:
        decay = decay * jnp.exp(log_decay)[..., :, None]
    if value_log_decay is not None:
        decay = decay * jnp.exp(value_log_decay)[..., None, :]
    starts = jnp.zeros((batch, steps), bool) if reset is None else reset
    starts = starts[:, :, None, None, None]

    def then(first, second):
        # Selecting every factor, not the product, also keeps a forgotten NaN out of the gradients.
        forget = second[0]
        decay_1, update_1, decay_2 = (jnp.where(forget, 0.0, x) for x in (first[1], first[2], second[1]))
        return first[0] | forget, decay_1 * decay_2, second[1] * update_1 + second[2]

    # The incoming state enters as the update of a step before the first.
    def prepend(x, first):
        return jnp.concatenate([jnp.broadcast_to(first, (batch, 1, *x.shape[2:])), x], axis=1)

    maps = (prepend(starts, False), prepend(decay, 1.0), prepend(update, state[:, None]))
    states = lax.associative_scan(then, maps, axis=1)[2]
    read = states[:, 1:]
    if bonus is not None:
        read = jnp.where(starts, 0.0, states[:, :-1]) + bonus.astype(jnp.float32)[:, :, None] * update
    o = jnp.einsum("bthk,bthkv->bthv", q, read, precision=lax.Precision.HIGHEST)
    return o, states[:, -1]


def _contained(form, q, k, v, log_decay, value_log_decay, bonus, state, reset, **options):
    """Runs a form made of matrix products, in which ``0 * nan`` would otherwise cross from document to document."""
    if reset is None:
        return form(q, k, v, log_decay, value_log_decay, bonus, state, reset, **options)
    repeats = v.shape[2] // q.shape[2]
    q, bad_q = documents.quarantine(q)
    k, bad_k = documents.quarantine(k)
    v, bad_v = documents.quarantine(v)
    clean_state, bad_state = documents.quarantine(state.reshape(*state.shape[:2], math.prod(state.shape[2:])))
    bad_q, bad_k = jnp.repeat(bad_q, repeats, axis=2), jnp.repeat(bad_k, repeats, axis=2)
    bad_decay = jnp.zeros_like(bad_v)
    if log_decay is not None:
        log_decay, bad = documents.quarantine(log_decay, allow_negative_infinity=True)
        bad_decay |= bad
    if value_log_decay is not None:
        value_log_decay, bad = documents.quarantine(value_log_decay, allow_negative_infinity=True)
        bad_decay |= bad

    o, final = form(q, k, v, log_decay, value_log_decay, bonus, clean_state.reshape(state.shape), reset, **options)

    tainted = documents.nan_reach(bad_k | bad_v | bad_decay, reset, carried=bad_state)
    tainted_output = tainted | bad_q
    if bonus is not None:
        before = jnp.concatenate([bad_state[:, None], tainted[:, :-1]], axis=1) & ~reset[:, :, None]
        tainted_output = before | bad_q | bad_k | bad_v
    return documents.set_nan(o, tainted_output), documents.set_nan(final, tainted[:, -1, :, None])


def _parallel(q, k, v, log_decay, value_log_decay, bonus, state, reset):
    """The quadratic closed form: the whole sequence as one chunk."""
    prepare, inputs, state, ungroup = _grouped(q, k, v, log_decay, value_log_decay, bonus, state, reset)
    padded = power_of_two(v.shape[1])
    chunk = prepare(jax.tree.map(lambda x: pad_steps(jnp.moveaxis(x, 1, -2), padded), inputs))
    o, final = advance(chunk, state, product_precision(q, k))
    o = jnp.moveaxis(o[..., : v.shape[1], :], -2, 1).reshape(v.shape)
    return o + _bonus_term(q, k, v, bonus), ungroup(final)


def _chunked(q, k, v, log_decay, value_log_decay, bonus, state, reset, *, chunk_size, kernel=None):
    """Chunks prepared by XLA; the recurrence between them by XLA or in the kernel ``chunk_scan``."""
    prepare, inputs, state, ungroup = _grouped(q, k, v, log_decay, value_log_decay, bonus, state, reset)
    o, final = chunk_scan.run(prepare, chunk_size, product_precision(q, k), inputs, state, kernel=kernel)
    return o.reshape(v.shape) + _bonus_term(q, k, v, bonus), ungroup(final)


def _in_one_kernel(q, k, v, log_decay, value_log_decay, bonus, state, reset, *, chunk_size, kernel):
    """All of it in the kernel ``gated_linear_attention``, but for the bonus term."""
    decayed, start_log_mask = _with_resets(log_decay, bonus, reset, heads=v.shape[2])
    run = functools.partial(_whole, kernel, chunk_size, product_precision(q, k), bonus is not None)
    o, state = run(q, k, v, decayed, start_log_mask, state)
    return o + _bonus_term(q, k, v, bonus), state


def _with_resets(log_decay, bonus, reset, *, heads):
    """A reset as what it is to a decay, the logarithm of zero: (log decay, start_log_mask [B, T] as in ``_Inputs``)."""
    if reset is None:
        return log_decay, None
    decay = jnp.zeros((heads, 1)) if log_decay is None else log_decay
    start_log_mask = None if bonus is None else jnp.where(reset, -jnp.inf, 0.0)
    return jnp.where(reset[:, :, None, None], -jnp.inf, decay), start_log_mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _whole(kernel: kernels.Kernel, chunk_size, precision, read_before, q, k, v, log_decay, start_log_mask, state):
    """All of it in one kernel, without the bonus term: outputs, in float32 if that is to be added, and the final state."""
    return _whole_passes(kernel, chunk_size, precision, read_before, q, k, v, log_decay, start_log_mask, state, False)[:2]


def _whole_passes(kernel, chunk_size, precision, read_before, q, k, v, log_decay, start_log_mask, state, keep_starts):
    return kernel.passes.forward(
        q,
        k,
        v,
        log_decay,
        start_log_mask,
        state,
        chunk_size=chunk_size,
        read_before=read_before,
        precision=precision,
        output_dtype=jnp.float32 if read_before else v.dtype,
        keep_starts=keep_starts,
        interpret=kernel.interpret,
    )


def _whole_forward(kernel, chunk_size, precision, read_before, *inputs):
    o, final, starts = _whole_passes(kernel, chunk_size, precision, read_before, *inputs, True)
    return (o, final), (*inputs[:-1], starts)


def _whole_backward(kernel, chunk_size, precision, read_before, residuals, cotangents):
    d_q, d_k, d_v, d_log_decay, d_state = kernel.passes.backward(
        *residuals,
        *cotangents,
        chunk_size=chunk_size,
        read_before=read_before,
        precision=precision,
        interpret=kernel.interpret,
    )
    return d_q, d_k, d_v, d_log_decay, None, d_state


_whole.defvjp(_whole_forward, _whole_backward)


def _grouped(
    q, k, v, log_decay, value_log_decay, bonus, state, reset
) -> tuple[chunk_scan.Prepare, _Inputs, Array, Callable[[Array], Array]]:
    """How to prepare a chunk, heads as groups of q and k, the state likewise, and the backward pass for the state."""
    batch, steps, groups, channels = q.shape
    heads, width = v.shape[2:]
    repeats = heads // groups
    precision = product_precision(q, k)
    log_decay, start_log_mask = _with_resets(log_decay, bonus, reset, heads=heads)

    def group(x, *, side_by_side=False):
        if x is None:
            return None
        split = (1, repeats * x.shape[-1]) if side_by_side else (repeats, x.shape[-1])
        return x.reshape(batch, steps, groups, *split)

    start_log_mask = None if start_log_mask is None else start_log_mask[:, :, None, None, None]
    inputs = _Inputs(q[:, :, :, None], k[:, :, :, None], None, None, group(value_log_decay), start_log_mask)
    grouped_state = state.reshape(batch, groups, repeats, channels, width)

    if _packs_heads(_decays_of_a_head(log_decay, reset), value_log_decay, bonus):
        prepare = functools.partial(_prepare_packed_heads, repeats=repeats, precision=precision)
        inputs = inputs._replace(v=group(v, side_by_side=True), log_decay=group(log_decay, side_by_side=True))
        side_by_side = jnp.moveaxis(grouped_state, 2, 3).reshape(batch, groups, 1, channels, repeats * width)

        def ungroup(final):
            final = final.reshape(batch, groups, channels, repeats, width)
            return jnp.moveaxis(final, 3, 2).reshape(state.shape)

        return prepare, inputs, side_by_side, ungroup
    prepare = functools.partial(_prepare, read_before=bonus is not None, precision=precision)
    inputs = inputs._replace(v=group(v), log_decay=group(log_decay))
    return prepare, inputs, grouped_state, lambda final: final.reshape(state.shape)


def _prepare_packed_heads(inputs: _Inputs, *, repeats: int, precision: lax.Precision) -> Chunk:
    """What chunks do to the state when a head has one decay: the decays go to the value side.

    There, the heads of a group read and write as one product with their common q and k, R V wide, and nothing as large
    as q for every head is ever made. (Decays on q and k took twice the time: B 16, T 256, R 8, K 64, V 32, on a CPU.)
    """
    q, k, v, log_decay = float32(inputs[:4])
    product = functools.partial(jnp.einsum, precision=precision)
    steps, width = v.shape[-2], v.shape[-1] // repeats
    by_head = jnp.swapaxes(log_decay[..., 0, :, :], -1, -2)[..., None]
    sums = local_sums(by_head)
    decay = jnp.exp(pair_log_decay(sums, jnp.zeros_like(by_head[..., 0])))
    scores = _for_each_head(product("...ik,...jk->...ij", q, k)[..., 0, :, :], repeats) * decay
    values = jnp.moveaxis(v.reshape(*v.shape[:-3], steps, repeats, width), -2, -3)
    inside = jnp.moveaxis(product("...ij,...jv->...iv", scores, values), -3, -2)

    # As a product with ones, and so is its gradient: of the sum over a head's channels XLA's CPU compiler makes
    # a call that takes longer than all products here.
    ones = jnp.repeat(jnp.eye(repeats, dtype=jnp.float32), width, axis=1)

    def spread(x):
        return jnp.einsum("...r,rw->...w", x, ones, precision=lax.Precision.HIGHEST)

    def by_step(log_decay):
        return spread(jnp.exp(jnp.swapaxes(log_decay[..., 0], -1, -2)))[..., None, :, :]

    return Chunk(
        read=q,
        write=k,
        value=v * by_step(sums.suffix),
        inside=inside.reshape(v.shape),
        value_read=by_step(sums.prefix),
        value_keep=spread(jnp.exp(sums.total[..., 0]))[..., None, :],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _for_each_head(x: Float[Array, "*b C C"], repeats: int) -> Float[Array, "*b R C C"]:
    """The same matrix for each of R heads. Its gradient adds the heads one by one, several times faster than a sum."""
    return jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], repeats, *x.shape[-2:]))


def _for_each_head_forward(x, repeats):
    return _for_each_head(x, repeats), None


def _for_each_head_backward(repeats, _, cotangent):
    return (sum(cotangent[..., head, :, :] for head in range(repeats)),)


_for_each_head.defvjp(_for_each_head_forward, _for_each_head_backward)


def _prepare(inputs: _Inputs, *, read_before: bool, precision: lax.Precision) -> Chunk:
    """What chunks [..., G, R, C, features] do to the state, without the bonus term."""
    q, k, v, log_decay, value_log_decay, start_log_mask = float32(inputs)
    product = functools.partial(jnp.einsum, precision=precision)
    steps = v.shape[-2]
    if log_decay is None and value_log_decay is None:
        visible = np.tri(steps, k=-1 if read_before else 0, dtype=bool)
        scores = jnp.where(visible, product("...ik,...jk->...ij", q, k), 0.0)
        return Chunk(read=q, write=k, value=v, inside=product("...ij,...jv->...iv", scores, v))

    if log_decay is None:
        log_decay = jnp.zeros_like(v[..., :1])
    before = None
    if read_before:
        before = jnp.zeros_like(log_decay) if start_log_mask is None else jnp.broadcast_to(start_log_mask, log_decay.shape)
    sums = local_sums(log_decay, before)
    diagonal = jnp.broadcast_to(0.0 if read_before else jnp.sum(q * k, axis=-1), v.shape[:-1])
    chunk = Chunk(read=q * jnp.exp(sums.prefix), write=k * jnp.exp(sums.suffix), value=v, inside=v, keep=jnp.exp(sums.total))
    if value_log_decay is not None:
        value_sums = local_sums(value_log_decay, jnp.zeros_like(value_log_decay) if read_before else None)
        return chunk._replace(
            value=v * jnp.exp(value_sums.suffix),
            inside=_two_sided_inside(q, k, v, sums, value_sums, diagonal, precision),
            value_read=jnp.exp(value_sums.prefix),
            value_keep=jnp.exp(value_sums.total),
        )
    if log_decay.shape[-1] == 1:
        own = jnp.full(log_decay.shape[:-1], -jnp.inf if read_before else 0.0, jnp.float32)
        scores = product("...ik,...jk->...ij", q, k) * jnp.exp(pair_log_decay(sums, own))
    else:
        scores = pair_scores(q, k, sums, diagonal, precision)
    return chunk._replace(inside=product("...ij,...jv->...iv", scores, v))


def _two_sided_inside(q, k, v, sums, value_sums, diagonal, precision):
    """With decays on both sides no one matrix of scores serves all value channels, but within a level one does."""
    product = functools.partial(jnp.einsum, precision=precision)
    outputs = (diagonal[..., None] * v)[..., :, None, :]
    for (upper, lower), (value_upper, value_lower) in zip(sums.levels, value_sums.levels, strict=True):
        block = value_upper.shape[-2]
        q_upper = upper_half(q, block) * jnp.exp(upper)
        k_lower = lower_half(k, block) * jnp.exp(lower)
        v_lower = lower_half(v, block) * jnp.exp(value_lower)
        scores = product("...ik,...jk->...ij", q_upper, k_lower)
        gained = product("...ij,...jv->...iv", scores, v_lower) * jnp.exp(value_upper)
        outputs = jnp.concatenate([outputs[..., 0::2, :, :], outputs[..., 1::2, :, :] + gained], axis=-2)
    return outputs[..., 0, :, :]


def _bonus_term(q, k, v, bonus):
    """(q_t . diag(bonus) k_t) v_t, or 0 without a bonus."""
    if bonus is None:
        return 0.0
    q, k, v, bonus = float32((q, k, v, bonus))
    repeats = v.shape[2] // q.shape[2]
    weight = jnp.repeat(q * k, repeats, axis=2) * bonus
    return jnp.sum(weight, axis=-1, keepdims=True) * v


_FORMS = {
    "recurrent": _recurrent,
    "associative": _associative,
    "parallel": functools.partial(_contained, _parallel),
    "chunked": functools.partial(_contained, _chunked),
}
