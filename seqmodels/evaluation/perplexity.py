"""Validation perplexity, bits per byte and loss by position; bytes of the state that decoding carries.

With l_i the loss of target i in nats, over all N targets with a weight and the n bytes of text they account for:

    loss = sum_i l_i / N        perplexity = exp(loss)        bits per byte = sum_i l_i / (ln 2 * n)

Loss and perplexity are per token, so they compare only under one tokenizer; bits per byte compare across
tokenizers. An end-of-text target costs nats but is no byte of text: a story's end counts towards its bytes.

The labels of a synthetic task are no text: there the accuracy is what says something (seqmodels.evaluation.accuracy).
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
Params = Any  # the pure dict of arrays that trainer.init() and a checkpoint hold


class ValidationSet(Protocol):
    """A held-out token stream, read in windows (seqmodels.data)."""

    def batches(self, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scored on a validation set."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # bits per byte of the text the targets account for; nan where that is no text
    loss_by_position: Float[np.ndarray, " T"]  # nats per token at each window position; nan where nothing counted
    tokens: int  # targets that counted
    tokens_per_second: float  # read by the forward pass, the first batch (which compiles) left out if there are more
    accuracy: float | None = None  # top-1 accuracy; None for text
    accuracy_by_position: Float[np.ndarray, " T"] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """What stands beside the loss in results."""
        return {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def evaluate(
    eval_step: Callable[[Params, Any], Mapping[str, Float[Array, " T"]]],
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
        eval_step: maps (params, batch) to `loss` (nats), `weight` and, where targets are labels, `correct`, each [T] and
            summed over the batch.
        put: moves a host batch to the devices, sharded as `eval_step` wants it.
        progress: called after each batch with the number of targets scored so far.

    Sums over batches are float64, so that the result does not depend on how many batches there are. One batch
    is always in flight while the next is read.

    Raises:
        ValueError: the validation set holds not a single target.
    """

    def score(batch):
        return eval_step(params, put({name: array for name, array in batch.items() if name != "bytes"}))

    totals, clock = _Totals(), _Clock()
    for batch, sums in _one_behind(score, validation.batches(batch_size, seq_len, max_tokens)):
        totals.add(batch, sums)
        clock.has_read(batch["inputs"].size)
        if progress is not None:
            progress(int(totals.sums["weight"].sum()))
    return totals.evaluation(seq_len, clock)


def _one_behind(score: Callable[[Batch], Any], batches: Iterator[Batch]) -> Iterator[tuple[Batch, Any]]:
    """Each batch with its sums, which are waited for only when those of the next have been asked for."""
    before = None
    for batch in batches:
        asked_for = batch, score(batch)
        if before is not None:
            yield before
        before = asked_for
    if before is not None:
        yield before


class _Clock:
    """Tokens read, and when."""

    def __init__(self):
        self._times, self._tokens = [time.perf_counter()], [0]

    def has_read(self, tokens: int) -> None:
        self._times.append(time.perf_counter())
        self._tokens.append(self._tokens[-1] + tokens)

    def tokens_per_second(self) -> float:
        """Of all batches but the first, unless there is only one."""
        first = 1 if len(self._times) > 2 else 0
        return (self._tokens[-1] - self._tokens[first]) / (self._times[-1] - self._times[first])


class _Totals:
    """Sums over batches: of what ``eval_step`` gives, by position, and of the bytes of text, all float64."""

    def __init__(self):
        self.sums: dict[str, np.ndarray] = {}
        self._num_bytes = 0.0

    def add(self, batch: Batch, sums: Mapping[str, Float[Array, " T"]]) -> None:
        for name, by_position in sums.items():
            self.sums[name] = np.asarray(by_position, np.float64) + (self.sums[name] if name in self.sums else 0.0)
        if "bytes" in batch:
            self._num_bytes += float(batch["bytes"][batch["weights"] > 0].sum(dtype=np.float64))

    def evaluation(self, seq_len: int, clock: _Clock) -> Evaluation:
        """What the sums come to.

        Raises:
            ValueError: not a single target counted.
        """
        if not self.sums or not self.sums["weight"].any():
            raise ValueError("the validation set holds no target to score")
        tokens, nats = self.sums["weight"].sum(), self.sums["loss"].sum()
        labelled = "correct" in self.sums
        return Evaluation(
            loss=float(nats / tokens),
            perplexity=perplexity(float(nats / tokens)),
            bits_per_byte=float(nats / math.log(2) / self._num_bytes) if self._num_bytes else math.nan,
            loss_by_position=self._mean_by_position("loss", seq_len),
            tokens=int(tokens),
            tokens_per_second=clock.tokens_per_second(),
            accuracy=float(self.sums["correct"].sum() / tokens) if labelled else None,
            accuracy_by_position=self._mean_by_position("correct", seq_len) if labelled else None,
        )

    def _mean_by_position(self, name: str, seq_len: int) -> Float[np.ndarray, " T"]:
        means, weight = np.full(seq_len, np.nan), self.sums["weight"]
        means[weight > 0] = self.sums[name][weight > 0] / weight[weight > 0]
        return means


def by_context_length(loss_by_position: Float[np.ndarray, " T"]) -> dict[tuple[int, int], float]:
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


def text_scores(loss: float, bytes_per_token: float) -> dict[str, float]:
    """The scores of a loss in nats per token, on text with so many bytes per token."""
    return {"perplexity": perplexity(loss), "bits_per_byte": loss / math.log(2) / bytes_per_token}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where float64 has no such number."""
    return math.exp(loss) if loss < 709 else loss if math.isnan(loss) else math.inf


def state_bytes(graphdef: nnx.GraphDef, params: Params, max_len: int) -> int:
    """Bytes of the state that one sequence carries, at a capacity of `max_len` tokens.

    Counted over the shapes and dtypes of the model's own `init_state` (batch 1), not declared by the mixer. Nothing
    is allocated; `params` may be arrays or `jax.ShapeDtypeStruct`s. A KV cache has the compute dtype of the
    model's config.
    """
    state = jax.eval_shape(lambda p: model.merge(graphdef, p).init_state(1, max_len), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
