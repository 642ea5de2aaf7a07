"""Is a difference real? Intervals over seeds, and two paired tests: over seeds and over documents.

The two answer different questions. Over seeds: would the model come out better if both were trained again? Over documents:
would it on another text of the kind? A claim needs both.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # p-values below it, after the correction for several tests
RESAMPLES = 4000  # of the bootstrap: p-values down to 5e-4
SMALLEST_P_VALUE = 0.01  # that the bootstrap must be able to find, after the correction for several tests
BLOCK = 4_000_000  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its interval; without one (`low` and `high` None) where there is a single value."""

    mean: float
    low: float | None
    high: float | None
    values: int  # how many the mean is of


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the first less the second: an estimate, and the probability of one so far from 0 if there were none."""

    mean: float
    low: float | None
    high: float | None
    p_value: float | None


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean, and Student's interval for it: mean +- t s / sqrt(n), t of n - 1 degrees of freedom.

    Raises:
        ValueError: no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no value")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, 1)
    reach = _t_quantile(confidence, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - reach, mean + reach, n)


def paired_over_seeds(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Student's paired test: `first[i]` and `second[i]` are of the same seed, and so of the same order of the data."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    estimate = mean_interval(differences, confidence)
    if estimate.low is None:
        return Difference(estimate.mean, None, None, None)
    n = len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    if error == 0.0:
        p_value = 1.0 if estimate.mean == 0.0 else 0.0
    else:
        p_value = 2.0 * float(special.stdtr(n - 1, -abs(estimate.mean) / error))
    return Difference(estimate.mean, estimate.low, estimate.high, p_value)


def pooled_over_seeds(
    values: Float[np.ndarray, "models seeds"], confidence: float = CONFIDENCE
) -> Callable[[int, int], Difference] | None:
    """Differences of two models' means by the residuals of all models, where the noise between seeds is alike for all.

    Of the additive model value[m, s] = mean[m] + seed[s] + noise, the noise's variance has (models - 1) (seeds - 1) degrees of
    freedom, where a pair alone has seeds - 1: a two-way analysis of variance without replication (Tukey 1949).

    Returns:
        (first, second) -> the difference of those two rows. None of a single seed or a single model.
    """
    models, seeds = values.shape
    degrees = (models - 1) * (seeds - 1)
    if degrees == 0:
        return None
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    error = math.sqrt(float(np.sum(residuals**2)) / degrees * 2.0 / seeds)
    reach = _t_quantile(confidence, degrees) * error

    def difference(first: int, second: int) -> Difference:
        mean = float(values[first].mean() - values[second].mean())
        if error == 0.0:
            return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
        return Difference(mean, mean - reach, mean + reach, 2.0 * float(special.stdtr(degrees, -abs(mean) / error)))

    return difference


def resamples_for(tests: int) -> int:
    """How many resamples so many tests need, or no difference could be significant after `holm` made its p-value larger."""
    return max(RESAMPLES, math.ceil(2 * tests / SMALLEST_P_VALUE))


def resampled_means(
    losses: Float[np.ndarray, "models documents"],
    tokens: Float[np.ndarray, " documents"],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "models resamples"]:
    """Mean losses on texts of as many documents, drawn from these with replacement, the same ones for every model.

    Args:
        losses: of each document, summed over its tokens (nats).
        tokens: how many those are; a mean is sum(loss) / sum(tokens) of the documents drawn.
        seed: of the drawing.
    """
    models, count = losses.shape
    rng = np.random.default_rng(seed)
    means = np.empty((models, resamples))
    per_block = max(1, BLOCK // max(1, count))
    for begin in range(0, resamples, per_block):
        block = slice(begin, min(begin + per_block, resamples))
        picks = rng.integers(count, size=(block.stop - block.start, count))
        sizes = np.asarray(tokens, np.float64)[picks].sum(axis=1)
        for model in range(models):
            means[model, block] = np.asarray(losses[model], np.float64)[picks].sum(axis=1) / sizes
    return means


def paired_over_documents(
    mean: float,
    first: Float[np.ndarray, " resamples"],
    second: Float[np.ndarray, " resamples"],
    confidence: float = CONFIDENCE,
) -> Difference:
    """The paired bootstrap (Koehn 2004): `first` and `second` are `resampled_means` of the same drawing.

    Args:
        mean: the difference on the text itself.

    The p-value is two-sided and never 0: (1 + how many resampled differences lie beyond 0) / (1 + resamples), doubled.
    """
    drawn = first - second
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return Difference(mean, float(low), float(high), min(1.0, 2.0 * (1 + beyond) / (1 + len(drawn))))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, made larger so that all of them together are as rarely wrong as one (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return [float(value) for value in corrected]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, and the probability of one so far from 0 if the two had nothing to do with each other."""

    rho: float
    p_value: float
    values: int


def spearman(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Of ranks, ties sharing their mean; the p-value by Student's t of n - 2 degrees of freedom, rough below ten pairs.

    None of fewer than four pairs, or where all values of one side are alike.
    """
    n = len(first)
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if n < 4 or any(np.ptp(each) == 0 for each in ranks):
        return None
    rho = float(np.corrcoef(*ranks)[0, 1])
    rho = max(-1.0, min(1.0, rho))
    t = math.inf if abs(rho) == 1.0 else abs(rho) * math.sqrt((n - 2) / (1.0 - rho * rho))
    return Correlation(rho, float(2.0 * special.stdtr(n - 2, -t)), n)


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def least_ratio(seeds: int, tests: int, significant: float = SIGNIFICANT) -> float | None:
    """How many of its own standard deviations over the seeds a difference must have for `paired_over_seeds` to show it.

    After `holm` for the first of so many tests. None of one seed, which shows nothing.
    """
    if seeds < 2:
        return None
    return float(special.stdtrit(seeds - 1, 1.0 - significant / max(1, tests) / 2.0)) / math.sqrt(seeds)


def _t_quantile(confidence: float, degrees: int) -> float:
    return float(special.stdtrit(degrees, 0.5 + confidence / 2.0))
