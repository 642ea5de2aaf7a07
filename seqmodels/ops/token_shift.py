"""Token shift: every step sees the step before it, as RWKV's projections do."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqmodels.ops import sequence_parallel
from seqmodels.ops.arguments import check_arguments, shapes_of
from seqmodels.ops.placement import per_shard


def _sequence_parallel(op, x, *, state=None, reset=None):
    last = x[:, -1].astype(jnp.float32)
    before = sequence_parallel.from_previous_device(last)
    if state is not None:
        before = sequence_parallel.on_first_device(state.astype(jnp.float32), before)
    shifted, after = op(x, state=before, reset=reset)
    return shifted, sequence_parallel.from_last_device(after)


@per_shard({"x": "b t", "state": "b", "reset": "b t"}, results=("b t", "b"), sequence_parallel=_sequence_parallel)
def token_shift(
    x: Float[Array, "B T D"],
    *,
    state: Float[Array, "B D"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """shifted_t = x_{t-1}, and zero where a document starts.

    A selection, where a convolution with the taps (1, 0) would multiply x_t by zero and so let a NaN in x_t into
    shifted_t (arXiv 2404.05892, section 4, writes x_{t-1}).

    Args:
      state: the input before the first step; ``None`` means zero, a sequence that starts here.
      reset: a new document starts at step t: ``shifted`` is zero there, whatever came before.

    Returns:
      ``(shifted, state)``: ``shifted`` in the dtype of ``x``; the last input as float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check_shapes(x, state, reset)
    previous = jnp.zeros_like(x[:, 0]) if state is None else state.astype(x.dtype)
    shifted = jnp.concatenate([previous[:, None], x[:, :-1]], axis=1)
    if reset is not None:
        shifted = jnp.where(reset[:, :, None], jnp.zeros((), x.dtype), shifted)
    return shifted, x[:, -1].astype(jnp.float32)


def _check_shapes(x, state, reset):
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [B, T, D] with at least one step; got {list(x.shape)}")
    batch, steps, channels = x.shape
    check_arguments({"state": (state, (batch, channels)), "reset": (reset, (batch, steps))}, shapes_of(x=x))
