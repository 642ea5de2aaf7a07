"""README, docs/results.md and docs/mixers.md are what tools.pages.mixers writes from the results and the mixers' headers."""

import json

import pytest

from seqmodels import mixers
from seqmodels.comparison.report import content, html
from tools.pages import comparisons, meshes, starts
from tools.pages import mixers as page


def test_the_tables_are_current():
    for path, text in page.pages(json.loads(page.COMPARISON.read_text())).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m tools.pages.mixers"


def test_a_mixer_that_was_not_run_is_an_empty_row():
    results = json.loads(page.COMPARISON.read_text())
    missing = {"quality": None, "cost": None, "counted": 10.0}
    lines = page.comparison_table({"base": results["base"], "mixers": results["mixers"] | {"gla": missing}}).splitlines()
    assert "| `gla` |  |  |  |  |  | 10 |  |  |" in lines and all(cell.strip() for cell in lines[2].split("|")[1:8])


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_equations_and_facts(name):
    title, equations, facts = page.header(name)
    assert title and equations and len(facts) >= 3


def test_the_page_of_the_starts_is_current():
    results = json.loads(starts.RESULTS.read_text())
    assert starts.PAGE.read_text(encoding="utf-8") == starts.page(results), "run python -m tools.pages.starts"


def test_the_index_of_comparisons_is_current():
    known = comparisons.published()
    page_now = comparisons.PAGE.read_text(encoding="utf-8")
    assert comparisons.with_table(comparisons.PAGE, comparisons.BEGIN, comparisons.index(known)) == page_now, (
        "run python -m tools.pages.comparisons"
    )
    for name, found in known.items():
        folder = comparisons.FOLDER / name
        assert content.headline(found) in (folder / "report.md").read_text(encoding="utf-8").replace("\\", "")
        assert all((folder / each).is_file() for each in ("report.html", "table.tex", "figures/curves.pdf"))
        report = (folder / "report.html").read_text(encoding="utf-8")
        assert html._style() in report and html.SCRIPT in report, f"run python -m tools.pages.comparisons {name}"


def test_the_page_of_the_meshes_is_current():
    results = json.loads(meshes.RESULTS.read_text(encoding="utf-8"))
    assert meshes.PAGE.read_text(encoding="utf-8") == meshes.page(results), "run python -m tools.pages.meshes"


@pytest.mark.parametrize("figure", meshes.LAWS)
def test_the_page_of_the_meshes_names_what_breaks_a_law(figure):
    rows = {(row["mixer"], row["mesh"]): row for row in json.loads(meshes.RESULTS.read_text(encoding="utf-8"))["rows"]}
    assert f"None is above {meshes.LAWS[figure]}." in meshes.most(rows, figure)
    name = {"FLOPs": "flops", "temporaries": "temporary_bytes"}[figure]
    rows["gla", "fsdp"] = rows["gla", "fsdp"] | {name: 2 * rows["gla", "data"][name]}
    said = meshes.most(rows, figure)
    assert said.startswith(f"The most {figure} are 2.00 times") and f"Above {meshes.LAWS[figure]}: `gla` on `fsdp`;" in said
