"""Intervals and tests against values worked out elsewhere."""

import numpy as np
import pytest

from seqmodels.comparison import recall, statistics


def test_students_interval():
    """t(0.975, 2) = 4.302652729911275 (tables; R's qt), s = 1 for 1, 2, 3."""
    found = statistics.mean_interval([1.0, 2.0, 3.0])
    reach = 4.302652729911275 / 3**0.5
    assert (found.mean, found.values) == (2.0, 3)
    assert found.low == pytest.approx(2.0 - reach, rel=1e-9) and found.high == pytest.approx(2.0 + reach, rel=1e-9)
    assert statistics.mean_interval([5.0]) == statistics.Estimate(5.0, None, None, 1)
    with pytest.raises(ValueError):
        statistics.mean_interval([])


def test_paired_over_seeds_is_students_sleep_data():
    """Student's own example (1908), the extra sleep of ten patients under two drugs: t = 4.0621, p = 0.002833 (R's t.test)."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = statistics.paired_over_seeds(second, first)
    assert found.mean == pytest.approx(1.58)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))


def test_paired_over_seeds_at_the_ends():
    assert statistics.paired_over_seeds([1.0], [2.0]) == statistics.Difference(-1.0, None, None, None)
    assert statistics.paired_over_seeds([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert statistics.paired_over_seeds([1.0, 2.0], [0.0, 1.0]).p_value == 0.0
    with pytest.raises(ValueError):
        statistics.paired_over_seeds([1.0, 2.0], [1.0])


def test_the_bootstrap_has_the_spread_of_the_central_limit():
    """Of a mean of n independent differences the resampled spread is s / sqrt(n)."""
    rng = np.random.default_rng(0)
    n, tokens = 400, np.full(400, 10.0)
    common = rng.normal(30.0, 5.0, n)  # documents are hard or easy for both: pairing takes that away
    losses = np.stack([common, common + rng.normal(0.4, 2.0, n)])
    gaps = (losses[0] - losses[1]) / 10.0
    drawn = statistics.resampled_means(losses, tokens, seed=0)
    found = statistics.paired_over_documents(gaps.mean(), drawn[0], drawn[1])
    error = gaps.std(ddof=1) / n**0.5
    assert (drawn[0] - drawn[1]).std() == pytest.approx(error, rel=0.05)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.mean < 0 and found.p_value < 0.01
    assert statistics.resampled_means(losses, tokens, seed=0)[1] == pytest.approx(drawn[1], abs=0)


def test_the_bootstrap_weighs_documents_by_their_tokens():
    losses, tokens = np.array([[10.0, 400.0]]), np.array([10.0, 100.0])
    drawn = statistics.resampled_means(losses, tokens, seed=0)
    assert set(np.round(drawn[0], 9)) == {1.0, 4.0, round(410 / 110, 9)}


def test_equal_models_do_not_differ():
    losses = np.random.default_rng(0).normal(30.0, 5.0, (1, 50)).repeat(2, axis=0)
    drawn = statistics.resampled_means(losses, np.ones(50), seed=0, resamples=500)
    assert statistics.paired_over_documents(0.0, drawn[0], drawn[1]).p_value == 1.0


@pytest.mark.parametrize("tests", [1, 3, 171])
def test_a_plain_difference_is_found_among_many(tests):
    """However many differences are tested, one that every resample shows stays significant after the correction."""
    resamples = statistics.resamples_for(tests)
    found = statistics.paired_over_documents(-1.0, np.zeros(resamples), np.ones(resamples))
    assert statistics.holm([found.p_value] + [1.0] * (tests - 1))[0] <= statistics.SMALLEST_P_VALUE


def test_the_bootstrap_is_rarely_wrong_about_nothing():
    """Of 200 pairs without a difference about a twentieth have p < 0.05 (binomial: 2 to 20 with probability 0.998)."""
    rng = np.random.default_rng(1)
    wrong = 0
    for trial in range(200):
        losses, tokens = rng.normal(0.0, 1.0, (2, 60)), np.ones(60)
        drawn = statistics.resampled_means(losses, tokens, seed=trial, resamples=400)
        wrong += statistics.paired_over_documents(0.0, drawn[0], drawn[1]).p_value < 0.05
    assert 2 <= wrong <= 20


def test_holm():
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == [] and statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_hits_are_pairs_that_stood_earlier_in_the_group():
    """Text a b c a b | a b, the bar parting groups: only the second "a b" of the first group is a hit."""
    a, b, c, end = range(4)
    inputs = np.array([end, a, b, c, a, end, a])
    targets = np.array([a, b, c, a, b, a, b])
    groups = np.array([0, 0, 0, 0, 0, 7, 7])
    assert recall.is_repeated_bigram(inputs, targets, groups).tolist() == [False, False, False, False, True, False, False]


def test_hits_against_the_definition():
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(5, size=(2, 300))
    groups = np.sort(rng.integers(40, size=300))
    seen, expected = set(), []
    for triple in zip(groups, inputs, targets):
        expected.append(triple in seen)
        seen.add(triple)
    assert recall.is_repeated_bigram(inputs, targets, groups).tolist() == expected and 20 < sum(expected) < 280


def test_frequent_pairs_are_no_hits(monkeypatch):
    """Of "a b" and "b c", both repeated, the one that is frequent elsewhere is left out, whatever else is frequent there."""
    a, b, c, end = range(4)
    inputs = np.array([end, a, b, a, b, b])
    targets = np.array([a, b, c, b, c, c])
    groups = np.zeros(6, int)
    elsewhere = np.array([[a, b], [9, 7], [0, 9]])
    assert recall.is_repeated_bigram(inputs, targets, groups).tolist() == [False, False, False, True, True, True]
    assert recall.is_repeated_bigram(inputs, targets, groups, elsewhere).tolist() == [False, False, False, False, True, True]
    monkeypatch.setattr(recall, "FREQUENT", 0.3)
    text = np.array([a, b] * 5 + [c, end, c], np.uint16)  # 12 pairs: a b 5 times, b a 4 times
    assert recall.frequent_pairs(text).tolist() == [[a, b], [b, a]]
    monkeypatch.setattr(recall, "BLOCK", 4)
    monkeypatch.setattr(recall, "SAMPLE", 8)  # two blocks: a b a b, b c end c
    monkeypatch.setattr(recall, "FREQUENT", 0.1)
    assert recall.frequent_pairs(text).tolist() == [[a, b]]


def test_spearman():
    """scipy.stats.spearmanr([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]): 0.8208, p 0.0886; nothing is said of three, or of equals."""
    found = statistics.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])
    assert (found.rho, found.p_value) == (pytest.approx(0.8207826817), pytest.approx(0.0885870053))
    assert statistics.spearman([1, 2, 3, 4], [8, 6, 4, 2]) == statistics.Correlation(-1.0, 0.0, 4)
    assert statistics.spearman([1, 2, 3], [1, 2, 3]) is None and statistics.spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_what_a_difference_needs_to_be_shown_over_seeds():
    """At the ratio itself the corrected p-value of Student's paired test is 0.05."""
    assert statistics.least_ratio(1, 3) is None
    assert statistics.least_ratio(2, 1) == pytest.approx(12.706204736432095 / 2**0.5)
    for seeds, tests in ((2, 171), (5, 10)):
        ratio = statistics.least_ratio(seeds, tests)
        noise = np.arange(seeds) - (seeds - 1) / 2
        differences = ratio + noise / np.std(noise, ddof=1)
        assert statistics.paired_over_seeds(differences, np.zeros(seeds)).p_value * tests == pytest.approx(0.05)


def test_pooled_over_seeds():
    """Of two models it is Student's paired test; of three, the two-way analysis of variance worked out by hand."""
    first, second = [1.0, 1.4, 1.1], [2.0, 2.1, 2.3]
    pair = statistics.pooled_over_seeds(np.array([first, second]))(0, 1)
    alone = statistics.paired_over_seeds(first, second)
    assert (pair.mean, pair.p_value, pair.low) == tuple(map(pytest.approx, (alone.mean, alone.p_value, alone.low)))
    # rows 1 3, 2 2, 6 8: residuals -+1/3, +-2/3, -+1/3, their squares' sum 4/3 over 2 degrees of freedom
    found = statistics.pooled_over_seeds(np.array([[1.0, 3.0], [2.0, 2.0], [6.0, 8.0]]))(0, 2)
    t = 5.0 / (2 / 3) ** 0.5
    assert found.mean == -5.0 and found.p_value == pytest.approx(1.0 - t / (2.0 + t * t) ** 0.5)  # Student's t of 2 degrees
    assert statistics.pooled_over_seeds(np.array([[1.0], [2.0]])) is None
