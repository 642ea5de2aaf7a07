"""Short causal depthwise convolution with a carried tail: what Mamba, Griffin, DeltaNet and xLSTM put before their recurrence."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from seqmodels.ops import sequence_parallel, time_invariant
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.placement import per_shard

_WIDE = 8  # taps; above, one pass over the sequence for each takes longer than an FFT or a loop


def _sequence_parallel(op, x, weight, bias=None, *, state=None, reset=None):
    """The last W - 1 inputs come from the device before; from several, where each has fewer steps."""
    (batch, steps, channels), tail = x.shape, weight.shape[0] - 1
    _, own = op(x, weight, bias, reset=reset)
    first = jnp.zeros((batch, tail, channels), jnp.float32) if state is None else state.astype(jnp.float32)
    if steps >= tail:
        before = sequence_parallel.on_first_device(first, sequence_parallel.from_previous_device(own))
    else:
        cut = sequence_parallel.has_reset(reset, batch)

        def moved_up(_, state):
            return jnp.pad(state[:, steps:], ((0, 0), (0, steps), (0, 0)))

        before = sequence_parallel.state_before(first, *sequence_parallel.affine(cut, None, own, moved_up))
    y, after = op(x, weight, bias, state=before, reset=reset)
    return y, sequence_parallel.from_last_device(after)


@per_shard(
    {"x": "b t h", "weight": "_ h", "bias": "h", "state": "b _ h", "reset": "b t"},
    results=("b t h", "b _ h"),
    sequence_parallel=_sequence_parallel,
)
def causal_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    state: Float[Array, "B tail D"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B tail D"]]:
    """y_t = bias + sum over j < W of weight[W - 1 - j] * x_{t - j}, per channel; no activation.

    Kernels of more than 8 taps are convolved by FFT (without ``reset``; its rounding, 1e-7 of the largest output, then reaches
    earlier steps, and so does a NaN) or age by age (with it).

    Computed in float32, whatever the inputs' dtype. Inputs of an earlier document are selected away, not multiplied by zero.

    Args:
      weight: oldest input first: ``weight[-1]`` multiplies the current step (torch's Conv1d keeps the transpose, [D, 1, W]).
      state: the W - 1 inputs before the first step, oldest first; ``None`` means zeros, a sequence that starts here.
      reset: a new document starts at step t: everything before t counts as zero, in ``y`` and in the returned state.

    Returns:
      ``(y, state)``: ``y`` in the dtype of ``x``; the last W - 1 raw inputs as float32 [B, W - 1, D].

    Raises:
      ValueError: shapes that do not fit.
    """
    _check_shapes(x, weight, bias, state, reset)
    batch, steps, channels = x.shape
    tail = weight.shape[0] - 1
    if state is None:
        state = jnp.zeros((batch, tail, channels), jnp.float32)
    inputs = jnp.concatenate([state.astype(jnp.float32), x.astype(jnp.float32)], axis=1)
    taps = jnp.asarray(weight, jnp.float32)

    if reset is None:
        starts, new_state = None, inputs[:, steps:]
    else:
        starts = jnp.pad(reset, ((0, 0), (tail, 0)))
        # An input is left behind once a document starts after it, which for the last ones is at one of the last steps.
        last = starts[:, steps:].astype(jnp.int32)
        starts_after = lax.cumsum(last, axis=1, reverse=True) - last
        new_state = jnp.where(starts_after[:, :, None] > 0, 0.0, inputs[:, steps:])

    if weight.shape[0] > _WIDE and steps > 1:
        y = time_invariant.convolve(inputs, taps[::-1].T, starts)[:, tail:]
    else:
        y = _tap_by_tap(inputs, taps, starts, steps)
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype), new_state


def _tap_by_tap(inputs, taps, starts, steps):
    """The outputs [B, T, D] of ``inputs`` [B, W - 1 + T, D], the current step's tap first."""
    tail = taps.shape[0] - 1
    y = inputs[:, tail:] * taps[tail]
    cut = jnp.zeros((inputs.shape[0], steps), bool)
    for age in range(1, tail + 1):
        past = inputs[:, tail - age : tail - age + steps]
        if starts is not None:
            # The input of step t - age is gone once a document has started at any of t - age + 1 .. t.
            cut |= starts[:, tail - age + 1 : tail - age + 1 + steps]
            past = jnp.where(cut[:, :, None], 0.0, past)
        y += past * taps[tail - age]
    return y


def _check_shapes(x, weight, bias, state, reset):
    shapes = shapes_of(x=x, weight=weight)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] < 1:
        raise ValueError(f"x must be [B, T, D] and weight [W, D]; got {shapes}")
    batch, steps, channels = x.shape
    expected = {
        "bias": (bias, (channels,)),
        "state": (state, (batch, weight.shape[0] - 1, channels)),
        "reset": (reset, (batch, steps)),
    }
    check_arguments(expected, shapes)
