"""Validation perplexity, bits per byte and loss by position; bytes of the state that decoding carries.

With l_i the loss of target i in nats, over all N targets with a weight and the n bytes of text they account for:

    loss = sum_i l_i / N        perplexity = exp(loss)        bits per byte = sum_i l_i / (ln 2 * n)

Loss and perplexity are per token, so they compare only under one tokenizer; bits per byte compare across
tokenizers. An end-of-text target costs nats but is no byte of text: a story's end counts towards its bytes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seqmodels import model

Batch = Mapping[str, np.ndarray]
Params = Any  # the pure dict of arrays that setup.init() and a checkpoint hold


class ValidationSet(Protocol):
    """A held-out token stream that deals itself out in windows (seqmodels.data)."""

    def batches(self, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scored on a validation set."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # bits per byte of the text the targets account for; nan where that is no text
    loss_by_position: Float[np.ndarray, "T"]  # nats per token at each window position; nan where nothing counted
    tokens: int  # targets that counted
    tokens_per_second: float  # forward pass only, the first batch (which compiles) left out if there are more


def evaluate(
    eval_step: Callable[[Params, Any], Mapping[str, Float[Array, "T"]]],
    params: Params,
    validation: ValidationSet,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    put: Callable[[Batch], Any] = lambda batch: batch,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score `params` on every window of `validation`, or on its first `max_tokens` targets.

    Args:
        eval_step: maps (params, batch) to `loss` (nats) and `weight`, each [T] and summed over the batch.
        put: moves a host batch to the devices, sharded as `eval_step` wants it.
        progress: called after each batch with the number of targets scored so far.

    Sums over batches are float64, so that the result does not depend on how many batches there are. One batch
    is always in flight while the next is read.

    Raises:
        ValueError: the validation set holds not a single target.
    """
    loss_sum = np.zeros(seq_len, np.float64)
    weight_sum = np.zeros(seq_len, np.float64)
    num_bytes = 0.0
    in_flight = None
    start = clock_start = time.perf_counter()
    tokens_before_clock = 0.0

    def collect(sums):
        nonlocal loss_sum, weight_sum
        loss_sum += np.asarray(sums["loss"], np.float64)
        weight_sum += np.asarray(sums["weight"], np.float64)
        if progress is not None:
            progress(int(weight_sum.sum()))

    for index, batch in enumerate(validation.batches(batch_size, seq_len, max_tokens)):
        num_bytes += float(batch["bytes"][batch["weights"] > 0].sum(dtype=np.float64))
        sums = eval_step(params, put({name: array for name, array in batch.items() if name != "bytes"}))
        if index == 0:
            collect(sums)
            clock_start, tokens_before_clock = time.perf_counter(), weight_sum.sum()
            continue
        if in_flight is not None:
            collect(in_flight)
        in_flight = sums
    if in_flight is None:
        clock_start, tokens_before_clock = start, 0.0
    else:
        collect(in_flight)

    tokens = weight_sum.sum()
    if tokens == 0:
        raise ValueError("the validation set holds no target to score")
    seconds = time.perf_counter() - clock_start
    nats = loss_sum.sum()
    counted = weight_sum > 0
    loss_by_position = np.full(seq_len, np.nan)
    loss_by_position[counted] = loss_sum[counted] / weight_sum[counted]
    return Evaluation(
        loss=float(nats / tokens),
        perplexity=perplexity(float(nats / tokens)),
        bits_per_byte=float(nats / math.log(2) / num_bytes) if num_bytes else math.nan,
        loss_by_position=loss_by_position,
        tokens=int(tokens),
        tokens_per_second=float((tokens - tokens_before_clock) / seconds),
    )


def by_context_length(loss_by_position: Float[np.ndarray, "T"]) -> dict[tuple[int, int], float]:
    """Mean loss after 1, 2, 3..4, 5..8, ... tokens of context: the curve in a few numbers.

    Keys are the first and the last number of tokens of a range; ranges in which nothing counted are left out.
    """
    means = {}
    first, last = 1, 1
    while first <= len(loss_by_position):
        last = min(last, len(loss_by_position))
        losses = loss_by_position[first - 1 : last]
        if np.isfinite(losses).any():
            means[first, last] = float(np.nanmean(losses))
        first, last = last + 1, 2 * last
    return means


def perplexity(loss: float) -> float:
    """exp(loss), infinite where float64 has no such number."""
    return math.exp(loss) if loss < 709 else loss if math.isnan(loss) else math.inf


def state_bytes(graphdef: nnx.GraphDef, params: Params, max_len: int) -> int:
    """Bytes of the state that one sequence carries, at a capacity of `max_len` tokens.

    Counted over the shapes and dtypes of the model's own `init_state` (batch 1), never written by hand. Nothing
    is allocated; `params` may be arrays or `jax.ShapeDtypeStruct`s. A KV cache has the compute dtype of the
    model's config.
    """
    state = jax.eval_shape(lambda p: model.merge(graphdef, p).init_state(1, max_len), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
