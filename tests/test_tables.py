"""README's table and docs/mixers.md are what scripts/write_tables.py writes from the results and the mixers' headers."""

import importlib.util
import json
from pathlib import Path

import pytest

from seqmodels import mixers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def write_tables():
    specification = importlib.util.spec_from_file_location("write_tables", ROOT / "scripts" / "write_tables.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_tables_are_current(write_tables):
    sources = (json.loads(path.read_text()) for path in (write_tables.RESULTS, write_tables.COMPARISON))
    for path, text in write_tables.pages(*sources).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run scripts/write_tables.py"


def test_a_row_that_was_not_run_is_empty(write_tables):
    rows = json.loads(write_tables.RESULTS.read_text())["rows"]
    row = {key: value for key, value in rows["gla"].items() if not key.startswith(("train_tokens_per", "decode"))}
    table = write_tables.results_table({"rows": {"gla": row}})
    assert table.splitlines()[-1].endswith("|  |  |  |")
    assert "not measured" in write_tables.mixers_page({"rows": {}})
    missing = {"quality": None, "cost": None, "counted": 10.0}
    results = json.loads(write_tables.COMPARISON.read_text())
    lines = write_tables.comparison_table({"base": results["base"], "mixers": results["mixers"] | {"gla": missing}}).splitlines()
    assert "| `gla` |  |  |  |  |  | 10 |  |  |" in lines and all(cell.strip() for cell in lines[2].split("|")[1:8])


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_equations_and_facts(write_tables, name):
    title, equations, facts = write_tables.header(name)
    assert title and equations and len(facts) >= 3
