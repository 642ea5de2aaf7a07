"""The verdicts on what the literature says follow from the comparisons, and docs/tasks.md has them."""

import pytest

from tools.pages import known_truths


def test_the_table_is_current():
    assert known_truths.PAGE.read_text(encoding="utf-8") == known_truths.page(), "run python -m tools.pages.known_truths"


@pytest.mark.parametrize("truth", [*known_truths.RECALL, *known_truths.PARITY], ids=lambda truth: truth.statement)
def test_what_is_stated_can_fail(truth):
    """No statement holds of models that all know everything, or that all guess."""
    verdicts = {level: truth.holds(*[level] * len(truth.of)) for level in (1.0, 0.01)}
    assert not all(verdicts.values())


def test_a_verdict_is_of_the_means_over_seeds_by_size():
    found = {
        "mixers": {
            "lstm": {"quality": {"by_segment": [["length 40", 40, 1.0], ["length 80", 80, 0.995]]}},
            "attention": {"quality": {"by_segment": [["length 40", 40, 0.8], ["length 80", 80, 0.6]]}},
            "mamba": {"quality": {"by_segment": [["length 40", 40, 0.7], ["length 80", 80, 0.6]]}},
            "not yet": {"quality": None},
        }
    }
    measured = known_truths.accuracies(found)
    assert measured["lstm", 80] == 0.995 and len(measured) == 6
    rows = known_truths.verdicts(known_truths.PARITY, measured, "tokens")
    assert [row[-1] for row in rows] == ["yes", "no", "yes", "yes"]
    assert rows[1][2] == "attention 0.800 of 40 tokens"
    recall = known_truths.accuracies({"mixers": {"gla": {"quality": {"by_segment": [["length 64, 16 pairs", 64, 0.5]]}}}})
    assert recall == {("gla", 16): 0.5}
