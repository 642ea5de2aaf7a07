"""Every mixer in the folder keeps the contract, in every implementation that it has, and docs/equivalence.md says so.

`make test` holds the recurrent form and the default one of every mixer to every law, and every other form to the recurrent one
in values and gradients at one length. With the options of tests/contract/variants.py it traces the default form, which
`make test-tools` holds to every law. `make test-all` adds every law at every length for every form, also with these options.
"""

import dataclasses
import functools
import itertools

import jax
import pytest

from seqmodels import mixers
from tests.contract import laws, page
from tests.contract.cases import all_cases

AGAIN = "run tools/pages/equivalence.py"
MAIN_FORMS = ("recurrent", None)
published = functools.cache(page.read)
BY_VARIANT = {name: tuple(cases) for name, cases in itertools.groupby(all_cases(), lambda case: case.name)}


def is_refused(case) -> bool:
    """As the page has it, which `test_refusals` checks."""
    return page.key(case) in published() and isinstance(published()[page.key(case)], str)


def has_options(case) -> bool:
    return not case.name.endswith("-default")


def is_under_every_law(case) -> bool:
    """In `make test`; with options, in `make test-tools`."""
    return case.implementation is None or case.implementation == "recurrent" and not has_options(case)


def is_called_by_other_tests(case) -> bool:
    """In `make test`, where a call that is refused fails."""
    return not (is_refused(case) or has_options(case) or case.implementation == "pallas")


def parameter(case, *values, name: str, marks=()):
    """One group per variant: under `pytest --dist loadgroup` its cases share compiled programs in one process."""
    test = f"{case.name}-{case.implementation or 'default'}-{name}".removesuffix("-")
    return pytest.param(case, *values, id=test, marks=[pytest.mark.xdist_group(case.name), *marks])


def parameters():
    """Of `test_law`: every case that is not refused, under every law."""
    for case in all_cases():
        if is_refused(case):
            continue
        for law in laws.LAWS:
            if is_under_every_law(case):
                marks = [pytest.mark.tools] if has_options(case) else []
                yield parameter(dataclasses.replace(case, gradient_lengths=(laws.LONGEST,)), law, name=law.name, marks=marks)
                if law.measure is laws.gradients:
                    yield parameter(case, law, name="gradients_at_every_length", marks=[pytest.mark.slow])
            else:
                yield parameter(case, law, name=law.name, marks=[pytest.mark.slow])


def other_forms():
    """Of `test_equals_the_recurrent_form`: what `make test` has under no law. The kernels' interpreter is slow."""
    for case in all_cases():
        if not (is_refused(case) or has_options(case) or is_under_every_law(case)):
            if case.implementation == "pallas" and case.name not in page.KERNELS_IN_TEST_TOOLS:
                continue
            marks = [pytest.mark.tools] if case.implementation == "pallas" else []
            one_length = (laws.LONGEST,)
            yield parameter(dataclasses.replace(case, lengths=one_length, gradient_lengths=one_length), name="", marks=marks)


latest = {"group": None}


@pytest.fixture(autouse=True)
def forget_the_last_mixer(request):
    """Compiled programs of one variant are of no use to the next; kept, they fill gigabytes."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.name != latest["group"]:
        latest["group"] = case.name
        laws.built.cache_clear()
        jax.clear_caches()


def check(case, law):
    """The law holds, and the page says how well."""
    row = published()[page.key(case)]
    worst = law.measure(case)
    assert worst <= law.bound, f"{law.statement} Worst error {worst:.2e}, allowed {law.bound:.0e}."
    assert not isinstance(row, str), f"docs/equivalence.md says there is no such form: {AGAIN}"
    figure = row[laws.LAWS.index(law)]
    everywhere = (case.lengths, case.gradient_lengths) == (laws.LENGTHS, laws.GRADIENT_LENGTHS)
    worst = worst if everywhere else max(worst, figure)
    factor = page.UNOPTIMISED_FACTOR if jax.config.values["jax_disable_most_optimizations"] else page.FACTOR
    assert page.is_current(figure, worst, factor), f"docs/equivalence.md says {figure:.1e}, measured {worst:.1e}: {AGAIN}"


@pytest.mark.parametrize(("case", "law"), list(parameters()))
def test_law(case, law):
    check(case, law)


@pytest.mark.parametrize("case", list(other_forms()))
def test_equals_the_recurrent_form(case):
    for law in laws.LAWS:
        if law.measure in (laws.implementations, laws.gradients):
            check(case, law)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BY_VARIANT])
def test_refusals(variant):
    """What an implementation cannot do it refuses, in words, the page's; the recurrent form and the default one refuse nothing."""
    for case in BY_VARIANT[variant]:
        if is_called_by_other_tests(case):
            continue
        reason = laws.refusal(case)
        row = published()[page.key(case)]
        if reason is None:
            assert not isinstance(row, str), f"docs/equivalence.md says there is no {case.implementation} form: {AGAIN}"
        else:
            assert case.implementation not in MAIN_FORMS
            assert row == " ".join(reason.split()), f"docs/equivalence.md says otherwise: {AGAIN}"


@pytest.mark.xdist_group("groups")
def test_a_group_runs_in_one_process(request):
    """pytest-xdist has marked this test as one of a group; without, every process would compile every variant."""
    options = request.config.option
    if "loadgroup" in options and options.loadgroup:
        assert request.node.nodeid.endswith("@groups")


def test_every_law_of_every_mixer_is_in_every_run():
    run = {(page.key(param.values[0]), param.values[1].name) for param in parameters() if is_in_make_test(param)}
    names = [f"{mixer}-default" for mixer in mixers.names()]
    assert run >= {((name, form), law.name) for name in names for form in ("recurrent", "default") for law in laws.LAWS}


def test_every_form_of_every_mixer_is_in_every_run():
    """But for kernels: of these `make test-tools` has one of each kind."""
    run = {page.key(param.values[0]) for param in (*parameters(), *other_forms()) if is_in_make_test(param)}
    assert run >= {page.key(case) for case in all_cases() if is_called_by_other_tests(case)}
    known = [case for case in all_cases() if not (has_options(case) or is_refused(case))]
    assert run >= {page.key(case) for case in known if case.implementation != "pallas"}


def test_every_law_is_for_every_option_too():
    """In `make test-tools`, of the default form."""
    both = {(page.key(param.values[0]), param.values[1].name) for param in parameters() if "slow" not in names_of_marks(param)}
    names = {case.name for case in all_cases() if has_options(case)}
    assert both >= {((name, "default"), law.name) for name in names for law in laws.LAWS}


def names_of_marks(param) -> set[str]:
    return {mark.name for mark in param.marks}


def is_in_make_test(param) -> bool:
    return not names_of_marks(param) & {"slow", "tools"}


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
