"""Parametrisations of a test, and of two factors: their product in `make test-all`, a part of it in `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_in_tools(values: Iterable[Any], first: tuple) -> list:
    """Parameters: those of ``first`` in `make test`, the others in `make test-tools`."""
    return [value if value in first else pytest.param(value, marks=pytest.mark.tools) for value in values]


def product(
    first: str,
    firsts: Iterable[Any],
    second: str,
    seconds: Iterable[Any],
    *,
    always: tuple = (),
    rare: tuple = (),
    rest_is_rare: bool = False,
    indirect: tuple = (),
):
    """`pytest.mark.parametrize` by every pair; pairs that are not in the part below have the marker `slow`.

    In the part is every pair with one of ``always`` (the form that is the default), and of the other values of ``first`` the
    diagonal: each of them meets a value of ``second``, and each value of ``second`` meets one of them.

    Args:
      first, second: the names of arguments. ``second`` may name several, separated by commas: its values are tuples.
      always: values of ``first``.
      rare: values of ``second`` that meet those of ``always`` in `make test-tools` alone.
      rest_is_rare: whether the diagonal is in `make test-tools` alone.
      indirect: names of arguments that are fixtures.
    """
    seconds = list(seconds)
    others = [value for value in firsts if value not in always]
    parameters = []
    for i, one in enumerate([*always, *others]):
        for j, other in enumerate(seconds):
            is_on_diagonal = (i - len(always) - j) % min(len(others), len(seconds)) == 0 if one in others else True
            values = (one, *other) if "," in second else (one, other)
            test = "-".join(getattr(value, "__name__", str(value)) for value in values)
            is_rare = other in rare if one in always else rest_is_rare
            marks = [pytest.mark.tools] if is_rare else []
            parameters.append(pytest.param(*values, id=test, marks=marks if is_on_diagonal else [pytest.mark.slow]))
    names = [first, *(name.strip() for name in second.split(","))]
    return pytest.mark.parametrize(names, parameters, indirect=list(indirect))
