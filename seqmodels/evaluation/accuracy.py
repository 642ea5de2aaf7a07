"""What a model scores on a synthetic task: the loss and the accuracy of its labels, segment by segment.

The accuracy of all is the mean over the segments, each counting once whatever it holds, as in the benchmarks that the
tasks are from; so is the loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from seqmodels.data import HeldOut
from seqmodels.evaluation import perplexity
from seqmodels.evaluation.perplexity import Batch, Evaluation, Params


@dataclasses.dataclass(frozen=True)
class LabelEvaluation:
    """What a model scored on each segment of a test."""

    segments: Mapping[str, Evaluation]

    @property
    def loss(self) -> float:
        """Nats per label."""
        return float(np.mean([segment.loss for segment in self.segments.values()]))

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy over the labels."""
        return float(np.mean([segment.accuracy for segment in self.segments.values()]))

    @property
    def scores(self) -> dict[str, Any]:
        """What stands beside the loss in results."""
        by_segment = {name: segment.accuracy for name, segment in self.segments.items()}
        return {"accuracy": self.accuracy, "accuracy_by_segment": by_segment}

    @property
    def tokens(self) -> int:
        """Labels that counted."""
        return sum(segment.tokens for segment in self.segments.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens read by the forward pass, the mean over the segments."""
        return float(np.mean([segment.tokens_per_second for segment in self.segments.values()]))


def evaluate(
    eval_step: Callable[[Params, Any], Mapping[str, Any]],
    params: Params,
    test: HeldOut,
    *,
    batch_size_for: Callable[[int], int],
    max_tokens: int | None = None,
    put: Callable[[Batch], Any] = lambda batch: batch,
    progress: Callable[[int], None] | None = None,
) -> LabelEvaluation:
    """Score `params` on every segment of `test`.

    Args:
        eval_step, put: as in `perplexity.evaluate`; the step returns `correct` too.
        batch_size_for: length -> rows of a batch.
        max_tokens: read about so many tokens at most, as many of each segment, but a batch of each at least.
        progress: called after each segment with the tokens of those done.
    """
    done, segments = 0, {}
    for name, held_out in test.segments.items():
        length = held_out.segment.length
        segments[name] = perplexity.evaluate(
            eval_step, params, held_out, batch_size=batch_size_for(length), seq_len=length, put=put,
            max_tokens=None if max_tokens is None else max_tokens // len(test.segments),
        )  # fmt: skip
        done += len(held_out)
        if progress is not None:
            progress(done)
    return LabelEvaluation(segments)
