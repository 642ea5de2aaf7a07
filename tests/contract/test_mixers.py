"""Every mixer in the folder keeps the contract, in every implementation that it has."""

import pytest

from tests.contract import laws
from tests.contract.cases import all_cases

# One group per variant: under `pytest --dist loadgroup` its cases share compiled programs in one process.
PARAMETERS = [
    pytest.param(
        case,
        law,
        id=f"{case.name}-{case.implementation}-{law.name}",
        marks=pytest.mark.xdist_group(case.name),
    )
    for case in all_cases()
    for law in laws.LAWS
]


@pytest.mark.parametrize(("case", "law"), PARAMETERS)
def test_law(case, law):
    """What an implementation cannot do it refuses, in words and in every law; what it can do, it does lawfully."""
    if laws.refusal(case) is not None:
        assert case.implementation not in ("recurrent", None)
        with pytest.raises(NotImplementedError):
            law.measure(case)
        return
    worst = law.measure(case)
    assert worst <= law.bound, f"{law.statement} Worst error {worst:.2e}, allowed {law.bound:.0e}."
