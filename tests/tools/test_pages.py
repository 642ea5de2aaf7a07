"""README's table and docs/mixers.md are what tools.pages.mixers writes from the results and the mixers' headers."""

import json

import pytest

from seqmodels import mixers
from tools.pages import mixers as page


def test_the_tables_are_current():
    sources = (json.loads(path.read_text()) for path in (page.RESULTS, page.COMPARISON))
    for path, text in page.pages(*sources).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m tools.pages.mixers"


def test_a_row_that_was_not_run_is_empty():
    rows = json.loads(page.RESULTS.read_text())["rows"]
    row = {key: value for key, value in rows["gla"].items() if not key.startswith(("train_tokens_per", "decode"))}
    table = page.results_table({"rows": {"gla": row}})
    assert table.splitlines()[-1].endswith("|  |  |  |")
    assert "not measured" in page.mixers_page({"rows": {}})
    missing = {"quality": None, "cost": None, "counted": 10.0}
    results = json.loads(page.COMPARISON.read_text())
    lines = page.comparison_table({"base": results["base"], "mixers": results["mixers"] | {"gla": missing}}).splitlines()
    assert "| `gla` |  |  |  |  |  | 10 |  |  |" in lines and all(cell.strip() for cell in lines[2].split("|")[1:8])


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_equations_and_facts(name):
    title, equations, facts = page.header(name)
    assert title and equations and len(facts) >= 3
