"""A declared range holds whoever makes the config, and its message is one short line."""

import dataclasses
import json
from typing import Annotated

import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.ranges import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Checked,
    Count,
    Distinct,
    Divides,
    Fraction,
    MultipleOf,
    NotEmpty,
    OneOf,
    Positive,
    Seed,
    parser,
    short_repr,
)


@dataclasses.dataclass(frozen=True)
class Options(Checked, where="group"):
    heads: Count = 4
    kv_heads: Annotated[Count | None, Divides("heads")] = None
    groups: Annotated[int, MultipleOf("heads")] = 4
    rate: Positive = 1.0
    beta: Annotated[float, AtLeast(0), Below(1)] = 0.9
    share: Fraction = 0.5
    low: float = 0.0
    high: Annotated[float | None, Above("low")] = None
    plain: int = 0
    seed: Seed = 0
    kind: Annotated[str, OneOf(("a", "b"))] = "a"
    path: str = ""
    flag: bool = False
    rates: Annotated[tuple[Positive, ...], NotEmpty(), Distinct()] = (1.0,)
    sizes: tuple[tuple[Count, Annotated[int, AtMost(3)]], ...] = ()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("heads", 0, "group.heads=0 must be at least 1"),
        ("heads", 2**31, "must be at most 2147483647"),
        ("heads", True, "must be int, not bool"),
        ("heads", 1.0, "must be int, not float"),
        ("heads", None, "must be int, not NoneType"),
        ("kv_heads", 3, "must divide heads=4 (or None)"),
        ("kv_heads", 0, "must be at least 1 (or None)"),
        ("groups", 6, "must be a multiple of heads=4"),
        ("rate", 0.0, "must be positive"),
        ("rate", 1e-60, "must be positive"),
        ("rate", 1e39, "must be finite"),
        ("rate", float("nan"), "must be finite"),
        ("beta", 1.0, "must be below 1"),
        ("beta", 1.0 - 1e-12, "must be below 1"),
        ("share", 1.5, "must be at most 1"),
        ("low", float("-inf"), "must be finite"),
        ("high", 0.0, "must be above low=0.0 (or None)"),
        ("plain", -(2**31), "must be at least -2147483647"),
        ("seed", 2**32, "must be at most 4294967295"),
        ("kind", "c", "is not one of a, b"),
        ("path", "a\0b", "must not contain a NUL"),
        ("flag", 1, "must be bool, not int"),
        ("rates", (), "must not be empty"),
        ("rates", (1.0, 1.0), "names a value twice"),
        ("rates", (1.0, float("inf")), "must hold values each of which must be finite"),
        ("sizes", ((1, 2), (1, 4)), "must be at most 3"),
        ("sizes", ((1,),), "must have 2 entries, not 1"),
        ("sizes", [(1, 2)], "must be tuple, not list"),
    ],
)
def test_a_value_out_of_range(field, value, message):
    with pytest.raises(UserError) as error:
        Options(**{field: value})
    assert message in str(error.value) and str(error.value).startswith(f"group.{field}=")


def test_legal_values_are_taken_as_they_are():
    made = Options(kv_heads=2, groups=8, rate=1, high=1e-3, seed=2**32 - 1, rates=(1, 2.0), sizes=((1, 2),))
    assert (made.rate, made.seed, hash(made)) == (1, 2**32 - 1, hash(dataclasses.replace(made)))


def test_numbers_become_pythons_of_the_declared_type():
    """Which JSON can write, and JAX can take: of a float the whole number 2**40, too."""
    numbers = dict(
        heads=np.int64(8),
        rate=np.float32(0.5),
        low=2**40,
        share=np.float64(0.5),
        rates=(np.float32(1), 2),
        sizes=((np.int32(1), 2),),
    )
    made = Options(**numbers, groups=8)
    assert type(made.rate) is type(made.low) is type(made.share) is float and type(made.heads) is int
    assert (
        json.loads(json.dumps(dataclasses.asdict(made)))["sizes"] == [[1, 2]]
        and [type(rate) for rate in made.rates] == [float] * 2
    )


@pytest.mark.parametrize("value", ["x" * 10**6, (1,) * 10**5, 10**5000, "a\nb\x1b[31m"], ids=range(4))
def test_a_message_is_one_short_line(value):
    assert len(short_repr(value)) <= 80 and short_repr(value).isprintable()


def test_flags_have_the_same_ranges():
    assert parser(Count, "max_tokens")("3") == 3
    for text, message in (("0", "--max_tokens=0 must be at least 1"), ("x", "--max_tokens='x' must be int")):
        with pytest.raises(UserError, match=message):
            parser(Count, "max_tokens")(text)
