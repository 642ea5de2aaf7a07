"""What a report says where there is little to say it of: one mixer, one seed, no document, no run that ended, and forty mixers."""

import copy
import math
import re
from pathlib import Path

import pytest

from seqmodels import mixers
from seqmodels.comparison import plan, report, results
from seqmodels.comparison.report import columns, content, figures

OLD_RESULTS = Path(__file__).resolve().parents[1] / "old_results"
MARGIN = 0.1  # nats between neighbours


@pytest.fixture(scope="module")
def published() -> dict:
    return results.read(OLD_RESULTS / "tinystories_small.json")


def made_up(published: dict, labels: list[str], *, seeds: int = 2, significant: bool = False, control: bool = True) -> dict:
    """Results of these mixers, the first the best, each 0.1 nats worse than the one before; and of the control, the worst."""
    found = copy.deepcopy(published)
    pattern = next(iter(found["mixers"].values()))
    rows = {label: copy.deepcopy(pattern) for label in [*labels, *(["no_mixer"] if control else [])]}
    for index, row in enumerate(rows.values()):
        for estimate in row["quality"].values():
            if isinstance(estimate, dict):
                estimate |= {"mean": 1.0 + MARGIN * index}
                estimate |= (
                    {"low": None, "high": None} if seeds == 1 else {"low": 0.9 + MARGIN * index, "high": 1.1 + MARGIN * index}
                )
        row["gain"] = {"bits_per_byte": MARGIN * (len(labels) - index)}
    if control:
        rows["no_mixer"] |= {"is_control": True, "gain": None, "sizes": pattern["sizes"] | {"pattern": "mlp"}}
    order = list(rows)
    pairs = [
        {
            "better": order[i], "worse": order[j], "difference": MARGIN * (i - j), "significant": significant,
            "significant_pooled": significant if seeds > 1 else False,
            "over_documents": {"mean": MARGIN * (i - j), "low": -0.2, "high": -0.05, "p_value": 0.001, "corrected_p_value": 0.01},
            "over_seeds": {"mean": MARGIN * (i - j), "low": -0.2, "high": 0.2, "p_value": 0.5, "corrected_p_value": 1.0}
            if seeds > 1 else None,
            "over_seeds_pooled": None,
        }
        for i in range(len(order)) for j in range(i + 1, len(order))
    ]  # fmt: skip
    found["comparison"] |= {"seeds": seeds}
    return found | {"mixers": rows, "pairs": pairs, "control": "no_mixer" if control else None, "warnings": []}


def without_figures(row: dict, **others) -> None:
    row |= {"quality": None, "gain": None, "diverged": [], "runs": []} | others


def check(found: dict) -> str:
    """The headline; nothing of a report has an empty figure, and the table has no empty column."""
    lead, table = content.headline(found), content.terminal(found).splitlines()
    texts = [lead, *content.paragraph_on_pairs(found), *(text for text in content.methods(found) if isinstance(text, str))]
    texts += [content.describe_pair(pair) for pair in found["pairs"]]
    for text in texts:
        assert not re.search(r"None|nan|\binf\b|  | ,| \.(?!\d)|: [.,;\[]|: $|\[,", text), text
    assert len(table) == 1 + len(found["mixers"]) and max(map(len, table)) <= 160
    for column in columns.shown_columns(found, columns.QUALITY):
        assert any(column.text(row) for row in found["mixers"].values())
    return lead


@pytest.mark.tools
def test_no_document_was_scored(published, tmp_path):
    """Means over nothing are null; figures and pages are made of the rest."""
    found = made_up(published, ["gla", "mamba"])
    for row in found["mixers"].values():
        for estimate in row["quality"].values():
            if isinstance(estimate, dict):
                estimate |= {"mean": None, "low": None, "high": None}
        row["quality"]["by_position"] = []
        row["gain"] = row["gain"] and {"bits_per_byte": None}
    for pair in found["pairs"]:
        pair |= {"difference": None, "significant": False}
    assert check(found) == (
        "No mixer has figures. Too few documents, none of those that are reported on was scored: gla, mamba, no_mixer."
    )
    heads = content.terminal(found).splitlines()[0].split()
    assert heads == ["mixer", "learning", "rate", "diverged"]
    assert not any(any(cells) for _, *cells in content.pair_matrix(found)[1])
    assert not any(figures.CHARTS[name].panels(found) for name in ("pareto", "by_position", "recall"))
    report.write(found, tmp_path, is_final=False)
    assert {path.name for path in tmp_path.iterdir()} <= set(plan.OWN_NAMES)
    assert "tells them apart" in (tmp_path / "report.html").read_text() and (tmp_path / "figures").is_dir()


def test_one_seed(published):
    found = made_up(published, ["gla", "mamba"], seeds=1)
    assert check(found) == (
        "One seed cannot show a difference between mixers. Lowest of 2: gla, 1.0000 bits per byte. "
        "Over no_mixer (the same model of MLPs alone) mixers gain 0.1000 (mamba) to 0.2000 (gla) bits per byte."
    )
    assert "We report one seed" in "".join(map(str, content.methods(found)))


@pytest.mark.parametrize(("short_conv", "said"), [("own", None), ("none", "are left out"), ("all", "allenzhu2025canon")])
def test_other_short_convolutions_are_said(published, short_conv, said):
    found = made_up(published, ["gla", "mamba"])
    found["base"]["model"]["short_conv"] = short_conv
    parts = [text for part in content.methods(found) for text in (part if isinstance(part, tuple) else (part,))]
    assert any("convolution" in text for text in parts) == (said is not None)
    assert said is None or any(said in text for text in parts)
    assert ("allenzhu2025canon" in content.cited(found)) == (short_conv == "all")


@pytest.mark.parametrize(
    ("seeds", "claim"), [(1, "One seed cannot show that gain."), (2, "The tests show that gain for 0 of 1.")]
)
def test_one_candidate(published, seeds, claim):
    found = made_up(published, ["gla"], seeds=seeds)
    gain = "Over no_mixer (the same model of MLPs alone) gla gains 0.1000 bits per byte."
    assert check(found) == f"gla has 1.0000 bits per byte. {gain} {claim}"
    alone = made_up(published, ["gla"], seeds=seeds, control=False)
    assert alone["pairs"] == [] and check(alone) == "gla has 1.0000 bits per byte."
    assert content.pair_matrix(alone)[1] == [] and len(content.paragraph_on_pairs(alone)) == 1


def test_every_run_diverged(published):
    """At every rate, or at the best one with every seed; what is not over yet is not said to have diverged."""
    found = made_up(published, ["gla", "mamba", "retnet"])
    diverged = [{"rate": rate, "loss": None, "diverged_at": [3]} for rate in found["comparison"]["learning_rates"]]
    for row in found["mixers"].values():
        without_figures(row, best_rate=None, rates=diverged)
    found["pairs"] = []
    assert check(found) == "No mixer has figures. Diverged at every learning rate: gla, mamba, retnet, no_mixer."
    assert [line.split() for line in content.terminal(found).splitlines()] == [
        ["mixer", "diverged"], *([label, "all"] for label in found["mixers"])
    ]  # fmt: skip
    without_figures(found["mixers"]["mamba"], best_rate=1e-3, diverged=[{"seed": 0, "step": 3}, {"seed": 1, "step": 4}])
    without_figures(found["mixers"]["retnet"], best_rate=None, rates=diverged[:-1])
    assert check(found) == (
        "No mixer has figures. Diverged at every learning rate: gla, no_mixer. Diverged with every seed at its best learning rate: "
        "mamba. No figures yet: retnet."
    )


def test_a_diverged_mixer_beside_others(published):
    found = made_up(published, ["gla", "mamba", "retnet"])
    without_figures(found["mixers"]["retnet"], best_rate=None, rates=[])
    found["pairs"] = [pair for pair in found["pairs"] if "retnet" not in (pair["better"], pair["worse"])]
    lead = check(found)
    assert "Lowest mean of 2: gla" in lead and lead.endswith("for 0 of 2. No figures yet: retnet.")


def test_forty_candidates(published):
    names = mixers.names()
    labels = [f"{names[index % len(names)]}_{index}" for index in range(40)]
    lead = check(made_up(published, labels, significant=True))
    assert f"The tests show {math.comb(40, 2)} of {math.comb(40, 2)} pairs of mixers to differ." in lead
    assert f"Worse than it by both tests below: {', '.join(labels[1:13])} and 27 more." in lead
    assert "The tests show that gain for 40 of 40." in lead and len(lead) < 900
    lead = check(made_up(published, labels))
    assert "2 seeds do not show a difference between any two of these mixers." in lead and "Worse than it" not in lead
