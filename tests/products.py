"""Parametrisations of a test by two factors: their product in `make test-all`, a part of it in `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def product(first: str, firsts: Iterable[Any], second: str, seconds: Iterable[Any], *, always: tuple = (), indirect: tuple = ()):
    """`pytest.mark.parametrize` by every pair; pairs that are not in the part below have the marker `slow`.

    In the part is every pair with one of ``always`` (the form that is the default), and of the other values of ``first`` the
    diagonal: each of them meets a value of ``second``, and each value of ``second`` meets one of them.

    Args:
      first, second: the names of arguments. ``second`` may name several, separated by commas: its values are tuples.
      always: values of ``first``.
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
            parameters.append(pytest.param(*values, id=test, marks=[] if is_on_diagonal else [pytest.mark.slow]))
    names = [first, *(name.strip() for name in second.split(","))]
    return pytest.mark.parametrize(names, parameters, indirect=list(indirect))
