"""Elementwise linear recurrence, real or complex: every form of it.

    h_t = a_t * h_{t-1} + b_t,   |a_t| <= 1

The state of S4D, S5, LRU, H3, HGRN, RG-LRU and minGRU (and Mamba's, which has an op of its own, ``selective_scan``):
one number per channel, no products between channels.

| implementation | what it is |
|---|---|
| recurrent | the definition, one step after the other |
| associative | ``jax.lax.associative_scan`` (Blelloch, "Prefix sums and their applications", 1990, section 1.4) |
| parallel | raises: the closed form divides by cumulative products of ``a`` |
| chunked | blocks side by side, joined by a scan over the blocks; its own gradient is the same scan backwards |
| pallas | one step after the other in a kernel, for a device that has it, and the gradient of chunked; else raises |

Nothing is divided by a decay and no logarithm is taken, so that every factor is <= 1 whatever the decays are, and a
product that underflows is a state that is truly forgotten. The state and all arithmetic are float32, or complex64 for
complex inputs. Where a document starts, what was carried is selected away with ``where`` before it is multiplied, in
values and in gradients, so that a NaN or an infinity in one document of a row reaches no other.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from seqmodels.ops import kernels, sequence_parallel, target
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.dispatch import KernelForm, dispatch
from seqmodels.ops.placement import per_shard


def _sequence_parallel(op, a, b, *, state=None, reset=None, **options):
    """The decay of all steps is what becomes of ones, which underflows where a state is truly forgotten."""
    _, added = op(a, b, reset=reset, **options)
    zeros = jnp.zeros_like(added)
    _, decay = op(a.astype(added.dtype), jnp.zeros_like(b), state=zeros + 1, reset=reset, **options)
    cut = sequence_parallel.has_reset(reset, a.shape[0])
    first = zeros if state is None else state.astype(added.dtype)
    before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, decay, added, jnp.multiply))
    h, after = op(a, b, state=before, reset=reset, **options)
    return h, sequence_parallel.from_last_device(after)


@per_shard(
    {"a": "b t h", "b": "b t h", "state": "b h", "reset": "b t"},
    results=("b t h", "b h"),
    sequence_parallel=_sequence_parallel,
)
def linear_recurrence(
    a: Inexact[Array, "B T *channels"],
    b: Inexact[Array, "B T *channels"],
    *,
    state: Inexact[Array, " B *channels"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B T *channels"], Inexact[Array, " B *channels"]]:
    """h_t = a_t * h_{t-1} + b_t along axis 1, every channel by itself.

    Args:
      a: decays themselves (not their logarithms), at most 1 in magnitude; real or complex.
      b: what is added; real or complex.
      state: h before the first step; None is zero.
      reset: marks the steps at which a new document starts: h is zero before such a step.
      implementation: a row of the table above; None is recurrent for one step, else pallas where the device has the
        kernel, else chunked.

    Returns:
      ``(h, state)``: every h, in b's dtype, and the last h in float32. If any input is complex, both are complex64.
      Gradients follow JAX's convention: no conjugation of complex cotangents.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: the implementation does not exist, or not for this call; the message says what is missing.
    """
    _check(a, b, state, reset)
    operands = (a, b) if state is None else (a, b, state)
    is_complex = any(jnp.iscomplexobj(x) for x in operands)
    dtype = jnp.complex64 if is_complex else jnp.float32
    initial = jnp.zeros(a.shape[:1] + a.shape[2:], dtype) if state is None else state.astype(dtype)
    form = dispatch(
        "linear_recurrence", _FORMS, implementation, steps=a.shape[1],
        kernel_forms={"linear_recurrence": KernelForm(_in_a_kernel, {"dtype": dtype})},
    )  # fmt: skip
    h, final = form(a.astype(dtype), b.astype(dtype), initial, reset)
    return h.astype(dtype if is_complex else b.dtype), final


def _check(a, b, state, reset):
    if a.ndim < 2 or a.shape != b.shape or a.shape[1] == 0:
        raise ValueError(f"a and b must both be [B, T, ...] with T >= 1; got {shapes_of(a=a, b=b)}")
    expected = {"state": (state, (a.shape[0], *a.shape[2:])), "reset": (reset, a.shape[:2])}
    check_arguments(expected, shapes_of(a=a))


def _drop(x, start: Bool[Array, "..."] | None):
    """Zero where a document starts. ``x`` has the axes of ``start`` first."""
    if start is None:
        return x
    return jnp.where(start.reshape(start.shape + (1,) * (x.ndim - start.ndim)), jnp.zeros((), x.dtype), x)


# ---- the definition


def _forward_step(h, a, b, start):
    """One step of the recurrence: (carry, output)."""
    h = a * _drop(h, start) + b
    return h, h


def _recurrent(a, b, state, reset):
    def step(h, inputs):
        return _forward_step(h, *inputs)

    by_time = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (a, b, reset))
    state, h = lax.scan(step, state, by_time)
    return jnp.moveaxis(h, 0, 1), state


# ---- parallel prefix


def _associative(a, b, state, reset):
    first = None if reset is None else reset[:, 0]
    b = b.at[:, 0].add(a[:, 0] * _drop(state, first))
    if reset is None:
        _, h = lax.associative_scan(_join, (a, b), axis=1)
    else:
        # The mark gets the channels' rank, since associative_scan slices all its operands along one axis.
        start = reset.reshape(reset.shape + (1,) * (a.ndim - 2))
        _, _, h = lax.associative_scan(_join_documents, (start, a, b), axis=1)
    return h, h[:, -1]


def _join(earlier, later):
    a_earlier, b_earlier = earlier
    a_later, b_later = later
    return a_later * a_earlier, a_later * b_earlier + b_later


def _join_documents(earlier, later):
    """As ``_join`` for stretches that may hold the start of a document: both count from the last start on."""
    start_earlier, a_earlier, b_earlier = earlier
    start_later, a_later, b_later = later
    # The earlier stretch is selected away before it is multiplied: a gradient of zero times its NaN would be NaN.
    a = a_later * jnp.where(start_later, jnp.ones((), a_earlier.dtype), a_earlier)
    b = a_later * jnp.where(start_later, jnp.zeros((), b_earlier.dtype), b_earlier) + b_later
    return start_earlier | start_later, a, b


# ---- blocks


def _backward_step(carry, a, d_h, start):
    """One step of the gradient's recurrence, backwards: g_t = d_h_t + a_{t+1} g_{t+1}; the carry is a_t g_t.

    Here the product is selected away, not a factor: ``a`` belongs to the document that starts, the carry to the previous document.
    """
    g = d_h + carry
    return _drop(a * g, start), g


def _num_blocks(steps: int) -> int:
    """How many blocks run side by side.

    On a CPU one, which reads its inputs once: with 2 to 8, a gradient takes 1.05 to 1.4 times as long (B 1 and 4, E 512, T
    1024 to 32768). Any other device wants the fewest steps one after the other, counting those within a block and those
    between blocks.
    """
    return 1 if target.device() == "cpu" else math.isqrt(steps - 1) + 1


def _blocked_scan(step, a, b, carry, reset, *, reverse: bool):
    """All outputs of ``carry, output_t = step(carry, a_t, b_t, reset_t)`` in time (or backwards), and the last carry.

    First, where there are several, every block, from a carry of zero and all at once, finds its decay and its end; a scan over them
    gives each its true first carry; a second pass over the steps gives the outputs. ``step`` is linear: with b = 0 it
    multiplies the carry by the decay. Steps are read where they lie: moving time to the front first doubled the time.
    """
    batch, steps = a.shape[:2]
    length = -(-steps // _num_blocks(steps))
    num_blocks = -(-steps // length)
    padding = num_blocks * length - steps

    def in_blocks(x, fill):
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return x.reshape(batch, num_blocks, length, *x.shape[2:])

    a, b = in_blocks(a, 1), in_blocks(b, 0)  # a padded step keeps any carry as it is
    reset = None if reset is None else in_blocks(reset, False)
    places = jnp.arange(length, dtype=jnp.int32)

    def at(x, place):
        return None if x is None else lax.dynamic_index_in_dim(x, place, axis=2, keepdims=False)

    def summarise(decay_and_end, place):
        decay, end = decay_and_end
        a_t, b_t, start = at(a, place), at(b, place), at(reset, place)
        return (step(decay, a_t, jnp.zeros_like(b_t), start)[0], step(end, a_t, b_t, start)[0]), None

    def join(carry, block):
        decay, end, cut = block
        return decay * _drop(carry, cut) + end, carry

    def fill(carry_and_outputs, place):
        carry, outputs = carry_and_outputs
        carry, output = step(carry, at(a, place), at(b, place), at(reset, place))
        return (carry, lax.dynamic_update_index_in_dim(outputs, output, place, axis=2)), None

    carries = carry[:, None]
    if num_blocks > 1:
        zeros = jnp.zeros(a.shape[:2] + a.shape[3:], a.dtype)
        (decays, ends), _ = lax.scan(summarise, (jnp.ones_like(zeros), zeros), places, reverse=reverse)
        cut = None if reset is None else jnp.any(reset, axis=2)
        blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (decays, ends, cut))
        carries = jnp.moveaxis(lax.scan(join, carry, blocks, reverse=reverse)[1], 0, 1)
    (carries, outputs), _ = lax.scan(fill, (carries, jnp.zeros_like(b)), places, reverse=reverse)
    return outputs.reshape(batch, num_blocks * length, *outputs.shape[3:])[:, :steps], carries[:, 0 if reverse else -1]


# ---- the gradient of blocks and of the kernel


def _scan(kernel: kernels.Kernel | None, a, b, carry, reset, *, reverse: bool):
    """All outputs of ``_forward_step`` in time, or of ``_backward_step`` backwards, and the last carry."""
    if kernel is not None:
        return kernel.passes.scan(a, b, carry, reset, reverse=reverse, interpret=kernel.interpret)
    return _blocked_scan(_backward_step if reverse else _forward_step, a, b, carry, reset, reverse=reverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scanned(kernel, a, b, state, reset):
    return _scan(kernel, a, b, state, reset, reverse=False)


def _scanned_forward(kernel, a, b, state, reset):
    h, final = _scan(kernel, a, b, state, reset, reverse=False)
    return (h, final), (a, h, state, reset)


def _scanned_backward(kernel, residuals, cotangents):
    a, h, state, reset = residuals
    d_h, d_final = cotangents
    g, d_state = _scan(kernel, a, d_h, d_final, reset, reverse=True)
    before = _drop(jnp.concatenate([state[:, None], h[:, :-1]], axis=1), reset)
    return g * before, g, d_state, None


_scanned.defvjp(_scanned_forward, _scanned_backward)


def _in_a_kernel(*arguments, kernel):
    return _scanned(kernel, *arguments)


_FORMS = {
    "recurrent": _recurrent,
    "associative": _associative,
    "parallel": (
        "linear_recurrence has no parallel form: it would divide by cumulative products of a, which underflow;"
        " use associative or chunked"
    ),
    "chunked": functools.partial(_scanned, None),
}
