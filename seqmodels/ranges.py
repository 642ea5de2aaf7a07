"""Which values a field of a config may have, declared beside its default and checked when the config is made.

    @dataclasses.dataclass(frozen=True)
    class Config(Checked, where="model.mixers.gla"):
        num_heads: Size = 4
        num_kv_heads: Annotated[Size | None, Divides("num_heads")] = None
        norm_eps: Positive = 1e-5
        gate: Annotated[str, OneOf(("polar", "cartesian"))] = "polar"

Without a declaration a float is finite, an int fits in 32 bits, and a string has no NUL character. The model computes
in float32, so a float must lie in its range after rounding to float32 as well: 1e-60 is not positive there.
"""

import ctypes
import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from seqmodels.errors import UserError
from seqmodels.escape import html_table

INT32_MAX = 2**31 - 1
FLOAT32_TINY = 2.0**-126  # the smallest normal number
SHOWN_CHARACTERS = 80  # of a value in a message


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on one value; ``other`` may name a field of the same dataclass instead of giving a number."""

    bound: Any

    def holds(self, value: Any, bound: Any) -> bool:
        raise NotImplementedError

    def words(self, bound: str) -> str:
        """What follows the value in a message; ``bound`` is the number, or ``name=number``."""
        raise NotImplementedError


class AtLeast(Rule):
    def holds(self, value, bound):
        return value >= bound

    def words(self, bound):
        return f"must be at least {bound}"


class AtMost(Rule):
    def holds(self, value, bound):
        return value <= bound

    def words(self, bound):
        return f"must be at most {bound}"


class Above(Rule):
    def holds(self, value, bound):
        # Numbers below the smallest normal one are zero on most devices.
        return value > bound and (isinstance(value, int) or value - bound >= FLOAT32_TINY)

    def words(self, bound):
        return "must be positive" if bound == "0" else f"must be above {bound}"


class Below(Rule):
    def holds(self, value, bound):
        return value < bound

    def words(self, bound):
        return "must be negative" if bound == "0" else f"must be below {bound}"


class MultipleOf(Rule):
    def holds(self, value, bound):
        return value % bound == 0

    def words(self, bound):
        return "must be even" if bound == "2" else f"must be a multiple of {bound}"


class Divides(Rule):
    def holds(self, value, bound):
        return bound % value == 0

    def words(self, bound):
        return f"must divide {bound}"


class OneOf(Rule):
    def __init__(self, choices):
        """``choices``: a tuple, or a table whose keys they are."""
        super().__init__(tuple(choices))

    def holds(self, value, bound):
        return value in bound

    def words(self, bound):
        return f"is not one of {', '.join(map(str, self.bound))}"


class NotEmpty(Rule):
    def __init__(self):
        super().__init__(0)

    def holds(self, value, bound):
        return len(value) > bound

    def words(self, bound):
        return "must not be empty"


class AtMostValues(Rule):
    """Of a tuple: so many at most."""

    def holds(self, value, bound):
        return len(value) <= bound

    def words(self, bound):
        return f"has more than {bound} values"


class Distinct(Rule):
    def __init__(self):
        super().__init__(0)

    def holds(self, value, bound):
        return len(set(value)) == len(value)

    def words(self, bound):
        return "names a value twice"


Count = Annotated[int, AtLeast(1)]
"""How many; at least one."""
CountOrZero = Annotated[int, AtLeast(0)]
Jobs = Annotated[int, AtLeast(1), AtMost(1024)]
"""Processes side by side on one machine."""
Processes = Annotated[int, AtLeast(1), AtMost(2**16)]
"""Of one run, on as many machines."""
Size = Annotated[int, AtLeast(1), AtMost(2**20)]
"""A dimension of an array that holds parameters or state."""
Taps = Annotated[int, AtLeast(1), AtMost(4096)]
"""Steps that a short convolution sees; some forms take one pass for each."""
TapsOrZero = Annotated[int, AtLeast(0), AtMost(4096)]
StateSize = Annotated[int, AtLeast(1), AtMost(1024)]
"""Of a state matrix that is decomposed when the model is made, in time that grows with its cube."""
Positive = Annotated[float, Above(0)]
NonNegative = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, AtLeast(0), AtMost(1)]
Probability = Annotated[float, Above(0), AtMost(1)]
Epsilon = Annotated[float, Above(0), AtMost(1)]
"""What is added to a denominator."""
Expansion = Annotated[float, Above(0), AtMost(1024)]
"""A width as a multiple of another."""
Seed = Annotated[int, AtLeast(0), AtMost(2**32 - 1)]
"""``jax.random.key`` takes 32 bits: a larger seed would be another one's equal."""


class Checked:
    """A dataclass whose fields are checked whenever one is made, by hand too; numbers become Python's of the declared type.

    ``where``, a keyword of the class statement, is what messages put in front of a field's name. What joins several
    fields in another way than the rules do is checked by a subclass's ``__post_init__``, after this one.
    """

    where: ClassVar[str] = ""

    def __init_subclass__(cls, where: str | None = None, **options):
        super().__init_subclass__(**options)
        if where is not None:
            cls.where = where
        if "__repr__" not in vars(cls):  # or the dataclass makes one that says everything
            cls.__repr__ = Checked.__repr__

    def __post_init__(self):
        check(self, self.where)
        for name, hint in declared(type(self)).items():
            object.__setattr__(self, name, _as_declared(hint, getattr(self, name)))

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__qualname__}({', '.join(changed)})"

    def _repr_html_(self) -> str:
        return html_table(self.where or type(self).__name__, dict(_flat(self)))


def _flat(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its value, groups of fields and options by dotted names."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], tuple) and dataclasses.is_dataclass(value[0][-1]):
            for name, options in value:  # of layers, or of a task
                yield from _flat(options, f"{prefix}{field.name}.{name}.")
        else:
            yield prefix + field.name, value


def check(values: Any, where: str) -> None:
    """Raises UserError for the first field of a dataclass whose value is not in its declared range."""
    for name, hint in declared(type(values)).items():
        value = getattr(values, name)
        why = problem(hint, value, lambda other: getattr(values, other))
        if why is not None:
            optional = value is not None and is_optional(hint)
            raise UserError(f"{_dotted(where, name)}={short_repr(value)} {why}{' (or None)' if optional else ''}")


@functools.cache
def declared(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name, with their rules."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})


def problem(hint: Any, value: Any, field: Callable[[str], Any]) -> str | None:
    """What is wrong with a value of a declared type, as the end of a sentence that begins with it; None: nothing.

    Args:
      hint: a type, ``Annotated`` or not.
      field: gives the value of another field, by name, for the rules that name one.
    """
    kind, rules, optional = unpack_type(hint)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        strict = [rule for rule in rules if isinstance(rule, (Above, Below)) and not isinstance(rule.bound, str)]
        return _number_problem(value, rules, field) or _number_problem(_float32(value), strict, field)
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return _number_problem(int(value), rules, field)
    if typing.get_origin(kind) is tuple and isinstance(value, tuple):
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) != len(value):
            return f"must have {len(items)} entries, not {len(value)}"
        for item, each in zip(items, value, strict=True):
            if (why := problem(item, each, field)) is not None:
                return f"must hold values each of which {why}"
        return _broken(value, rules, field)
    if kind is str and isinstance(value, str):
        return "must not contain a NUL character" if "\0" in value else _broken(value, rules, field)
    if kind in (int, float, str) or kind is bool and not isinstance(value, bool):
        return f"must be {kind.__name__}, not {type(value).__name__}"
    if typing.get_origin(kind) is tuple:
        return f"must be tuple, not {type(value).__name__}"
    return _broken(value, rules, field)


def unpack_type(hint: Any) -> tuple[Any, tuple[Rule, ...], bool]:
    """``(type, rules, optional)`` of a declaration like ``Annotated[Size | None, Divides("num_heads")]``."""
    rules: tuple[Rule, ...] = ()
    optional = False
    while True:
        origin = typing.get_origin(hint)
        if origin is Annotated:
            rules = tuple(rule for rule in hint.__metadata__ if isinstance(rule, Rule)) + rules
            hint = hint.__origin__
        elif origin in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint):
            optional = True
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        else:
            return hint, rules, optional


def is_optional(hint: Any) -> bool:
    """Whether None is a value of a declared type."""
    return unpack_type(hint)[2]


def rules_of(hint: Any) -> Iterator[Rule]:
    """All rules of a declared type, those of a tuple's entries included."""
    kind, rules, _ = unpack_type(hint)
    yield from rules
    if typing.get_origin(kind) is tuple:
        for item in typing.get_args(kind):
            if item is not Ellipsis:
                yield from rules_of(item)


def describe_type(hint: Any) -> str:
    """A declared type and its range for a person: ``"int, at least 1 and at most 1048576, or None"``."""
    kind, rules, optional = unpack_type(hint)
    if typing.get_origin(kind) is tuple:
        *items, last = typing.get_args(kind)
        name = f"tuple of {describe_type(items[0])}" if last is Ellipsis else f"({', '.join(map(describe_type, (*items, last)))})"
    else:
        name = kind.__name__
    words = [rule.words(str(rule.bound)).removeprefix("must be ").removeprefix("must ").removeprefix("is not ") for rule in rules]
    return f"{', '.join([name, ' and '.join(words)] if words else [name])}{', or None' if optional else ''}"


def parser(hint: Any, name: str) -> Callable[[str], Any]:
    """Reads a command line's value of a declared type; for ``argparse``'s ``type``.

    Raises (the function returned):
      UserError: it is not a number, or not in the range.
    """
    kind = unpack_type(hint)[0]

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"--{name}={short_repr(text)} must be {kind.__name__}") from None
        why = problem(hint, value, _no_field)
        if why is not None:
            raise UserError(f"--{name}={short_repr(value)} {why}")
        return value

    return parse


def short_repr(value: Any) -> str:
    """``repr`` of a value for a message of one line: printable, and cut in the middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write more than 4,300 digits
        return "a number of more than 4,300 digits"
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[: SHOWN_CHARACTERS - 20]}...{text[-15:]}"


def _number_problem(value: float, rules: Sequence[Rule], field: Callable[[str], Any]) -> str | None:
    if isinstance(value, float):
        if not math.isfinite(value):
            return "must be finite, in float32 too"
    elif abs(value) > INT32_MAX and not any(isinstance(rule, AtMost) for rule in rules):
        return f"must be at {'most' if value > 0 else 'least'} {INT32_MAX if value > 0 else -INT32_MAX}"
    return _broken(value, rules, field)


def _as_declared(hint: Any, value: Any) -> Any:
    """A value that is in its range: a whole number where a float is declared, or numpy's, as the number that JSON and JAX take."""
    kind = unpack_type(hint)[0]
    if kind in (int, float) and value is not None:
        return kind(value)
    if typing.get_origin(kind) is tuple and value is not None:
        items = typing.get_args(kind)
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return tuple(_as_declared(item, each) for item, each in zip(items, value, strict=True))
    return value


def _broken(value: Any, rules: Sequence[Rule], field: Callable[[str], Any]) -> str | None:
    for rule in rules:
        bound, words = rule.bound, str(rule.bound)
        if isinstance(bound, str):
            bound, words = field(bound), f"{bound}={field(bound)!r}"
            if bound is None:
                continue
        if not rule.holds(value, bound):
            return rule.words(words)
    return None


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _no_field(name: str) -> Any:
    raise LookupError(name)
