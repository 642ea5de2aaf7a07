"""Every mixer in the folder keeps the contract, in every implementation that it has, and docs/equivalence.md says so."""

import functools

import jax
import pytest

from tests.contract import laws, page
from tests.contract.cases import all_cases

AGAIN = "run tools/pages/equivalence.py"
published = functools.cache(page.read)


def is_slow(case) -> bool:
    """The kernels' interpreter takes several times as long as the other forms: the rest of them are `make test-all`'s."""
    refused = isinstance(published()[page.key(case)], str) if page.key(case) in published() else False
    return case.implementation == "pallas" and not refused and case.name not in page.KERNELS_IN_EVERY_RUN


# One group per variant: under `pytest --dist loadgroup` its cases share compiled programs in one process.
PARAMETERS = [
    pytest.param(
        case,
        law,
        id=f"{case.name}-{case.implementation}-{law.name}",
        marks=[pytest.mark.xdist_group(case.name)] + [pytest.mark.slow] * is_slow(case),
    )
    for case in all_cases()
    for law in laws.LAWS
]
latest = {"group": None}


@pytest.fixture(autouse=True)
def forget_the_last_mixer(request):
    """Compiled programs of one variant are of no use to the next; kept, they fill gigabytes."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.name != latest["group"]:
        latest["group"] = case.name
        laws.built.cache_clear()
        jax.clear_caches()


@pytest.mark.parametrize(("case", "law"), PARAMETERS)
def test_law(case, law):
    """What an implementation cannot do it refuses, in words and in every law; what it can do, it does lawfully."""
    row = published()[page.key(case)]
    reason = laws.refusal(case)
    if reason is not None:
        assert case.implementation not in ("recurrent", None)
        with pytest.raises(NotImplementedError):
            law.measure(case)
        assert row == " ".join(reason.split()), f"docs/equivalence.md says otherwise: {AGAIN}"
        return
    worst = law.measure(case)
    assert worst <= law.bound, f"{law.statement} Worst error {worst:.2e}, allowed {law.bound:.0e}."
    assert not isinstance(row, str), f"docs/equivalence.md says there is no such form: {AGAIN}"
    figure = row[laws.LAWS.index(law)]
    assert page.is_current(figure, worst), f"docs/equivalence.md says {figure:.1e}, measured {worst:.1e}: {AGAIN}"


@pytest.mark.xdist_group("groups")
def test_a_group_runs_in_one_process(request):
    """pytest-xdist has marked this test as one of a group; without, every process would compile every variant."""
    options = request.config.option
    if "loadgroup" in options and options.loadgroup:
        assert request.node.nodeid.endswith("@groups")


def test_the_page_has_every_case_and_nothing_else():
    assert set(published()) == {page.key(case) for case in all_cases()}, AGAIN


def test_a_page_reads_back_as_written(tmp_path, monkeypatch):
    rows = {page.key(case): (0.0, 1.25e-7) + (3e-3,) * (len(laws.LAWS) - 2) for case in all_cases()}
    rows[page.key(all_cases()[0])] = "there is none: it would divide"
    monkeypatch.setattr(page, "PATH", tmp_path / "docs" / "page.md")
    page.write(rows)
    read = page.read()
    assert read[page.key(all_cases()[0])] == "there is none: it would divide"
    assert read[page.key(all_cases()[1])][:3] == (0.0, 1.2e-7, 3e-3)
    assert read.keys() == rows.keys()
    assert page.is_current(1.2e-7, 1.25e-7) and not page.is_current(1e-4, 1e-6) and not page.is_current(1e-6, 1e-4)
