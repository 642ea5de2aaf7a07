"""evaluate against a naive float64 computation; bits per byte; the counted state."""

import math

import jax
import numpy as np
import pytest

from seqmodels.evaluation import plots
from seqmodels.evaluation.perplexity import by_context_length, evaluate, perplexity

SEQ_LEN = 8


class FakeValidation:
    """A stream of losses-to-be, in windows; the last one is padded with weight 0."""

    def __init__(self, losses, bytes_per_target):
        self.losses, self.bytes_per_target = losses, bytes_per_target

    def batches(self, batch_size, seq_len, max_tokens=None):
        count = len(self.losses) if max_tokens is None else min(max_tokens, len(self.losses))
        for start in range(0, count, batch_size * seq_len):
            taken = slice(start, min(start + batch_size * seq_len, count))
            batch = {name: np.zeros(batch_size * seq_len) for name in ("inputs", "weights", "bytes")}
            batch["inputs"][: taken.stop - start] = self.losses[taken]
            batch["weights"][: taken.stop - start] = 1
            batch["bytes"][: taken.stop - start] = self.bytes_per_target[taken]
            batch["bytes"][taken.stop - start :] = 1000  # padding is not text
            yield {name: array.reshape(batch_size, seq_len) for name, array in batch.items()}


@jax.jit
def read_losses(scale, batch):
    weighted = scale * batch["inputs"] * batch["weights"]
    return {"loss": weighted.sum(axis=0), "weight": batch["weights"].sum(axis=0)}


@pytest.mark.parametrize("batch_size, max_tokens", [(1, None), (3, None), (3, 50), (64, None), (1, 5)])
def test_sums_are_those_of_a_loop_over_targets(batch_size, max_tokens):
    rng = np.random.default_rng(0)
    losses, byte_counts = rng.gamma(2.0, 2.0, 117).astype(np.float32), rng.integers(0, 9, 117)
    got = evaluate(
        read_losses, 1.0, FakeValidation(losses, byte_counts),
        batch_size=batch_size, seq_len=SEQ_LEN, max_tokens=max_tokens,
    )  # fmt: skip
    losses, byte_counts = losses[:max_tokens].astype(np.float64), byte_counts[:max_tokens]
    assert got.tokens == len(losses)
    assert got.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert got.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / byte_counts.sum(), rel=1e-6)
    for position in range(SEQ_LEN):
        here = losses[position::SEQ_LEN]
        if len(here):
            assert got.loss_by_position[position] == pytest.approx(here.mean(), rel=1e-6)
        else:
            assert np.isnan(got.loss_by_position[position])


def test_progress_counts_every_target_once():
    seen = []
    validation = FakeValidation(np.ones(100), np.ones(100))
    evaluate(read_losses, 1.0, validation, batch_size=2, seq_len=SEQ_LEN, progress=seen.append)
    assert seen == [16, 32, 48, 64, 80, 96, 100]


def test_put_sees_no_bytes():
    def put(batch):
        assert "bytes" not in batch
        return jax.tree.map(lambda array: 2 * array, batch)  # doubles losses and weights

    validation = FakeValidation(np.ones(16), np.ones(16))
    got = evaluate(read_losses, 1.0, validation, batch_size=1, seq_len=SEQ_LEN, put=put)
    assert got.loss == 2.0 and got.tokens == 32


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no target"):
        evaluate(read_losses, 1.0, FakeValidation(np.ones(0), np.ones(0)), batch_size=1, seq_len=SEQ_LEN)


def test_perplexity_of_a_huge_or_missing_loss():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_ranges_of_context_are_powers_of_two():
    losses = np.array([9.0, 7.0, 5.0, 3.0, 2.0, np.nan, 1.0])
    assert by_context_length(losses) == {(1, 1): 9.0, (2, 2): 7.0, (3, 4): 4.0, (5, 7): 1.5}
    assert by_context_length(np.array([4.0, np.nan])) == {(1, 1): 4.0}


def test_a_sparkline_falls_with_the_loss():
    assert plots.sparkline(np.array([7.0, 5.0, np.nan, 0.0])) == "█▆▁"
    assert plots.sparkline(np.linspace(1, 0, 1000), width=8) == "█▇▆▅▄▃▂▁"
    assert plots.sparkline(np.ones(3)) == "▁▁▁"
