"""No odd value of any field gets past the config: it is refused in one line, or is one that the field may have."""

import math

import pytest

from configs import base
from seqmodels import config as config_lib
from seqmodels import ranges
from tests import odd_values

FIELDS = tuple(odd_values.fields())


def is_sound(case, value) -> bool:
    """Whether a value that was accepted is one that arithmetic in float32 and int32 can have."""
    kind, _, optional = ranges.unpack_type(case.hint)
    if value is None:
        return optional
    if kind is float:
        return math.isfinite(value) and abs(value) < 3.5e38
    if kind is int:
        return type(value) is int and abs(value) <= (2**32 - 1 if case.field == "seed" else 2**31 - 1)
    if kind is str:
        return type(value) is str and "\0" not in value
    return kind is not bool or type(value) is bool


GROUPS = ("", *odd_values.groups())


@pytest.mark.parametrize("group", GROUPS)
def test_odd_values(group):
    for field in FIELDS:
        if field.rpartition(".")[0] == group and field != "data.task":  # that one is read by from_config_dict
            check(field)


def check(field):
    refused = 0
    prefix, _, name = field.rpartition(".")
    if prefix:
        legal = getattr(odd_values.groups()[prefix], name)
        assert odd_values.made_alone(odd_values.Case(field, legal, odd_values.fields()[field])) == (legal,)
    for case in odd_values.cases(field):
        made = odd_values.made_alone(case)
        if made is None:
            refused += 1
        else:
            assert is_sound(case, made[0]), str(case)
    assert refused > 5


def test_the_sweep_covers_every_field_of_the_base_config():
    listed = config_lib.flatten(base.get_config().to_dict())
    assert set(listed) == set(FIELDS)


@pytest.mark.parametrize("field", ["seed", "optim.eps", "model.d_model", "model.mixers.gla.num_heads", "data.tasks.mqar.pairs"])
def test_the_whole_config_refuses_what_its_part_does(field):
    for case in list(odd_values.cases(field))[::7]:
        assert (odd_values.made(case) is None) >= (odd_values.made_alone(case) is None), str(case)


@pytest.mark.tools
def test_two_steps():
    cases = {str(case): case for case in odd_values.cases("optim.learning_rate")}
    assert odd_values.two_steps(cases["optim.learning_rate=nan"]) == "refused"
    assert odd_values.two_steps(cases["optim.learning_rate=1e+38"]) == "diverged"
    assert odd_values.two_steps(cases["optim.learning_rate=0.001"]) == "trained"
