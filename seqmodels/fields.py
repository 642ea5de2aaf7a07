"""Groups of fields: from a config or JSON to a frozen dataclass, with names and types checked; and what is said of a field."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from seqmodels import suggest
from seqmodels.errors import UserError
from seqmodels.ranges import short_repr


def build(cls: type, values: Any, path: str) -> Any:
    """A frozen dataclass out of a group of fields, called ``path`` in errors.

    Raises:
      UserError: an unknown or missing field, or a wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must be a group of fields, not {short_repr(values)}")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = suggest.nearest(name, known)
            hint = f"did you mean {path}.{near}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{path}.{name} is not a field; {hint}")
    missing = [name for name in known if name not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; start from configs/base.py")
    return cls(**{name: _convert(hints[name], values[name], f"{path}.{name}") for name in known})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={short_repr(value)} must be a tuple, not {type(value).__name__}")
        return _as_tuples(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}={short_repr(value)} must be finite") from None
    if type(value) is not hint:
        raise UserError(f"{path}={short_repr(value)} must be {hint.__name__}, not {type(value).__name__}")
    return value


def _as_tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def source(group: type, name: str) -> tuple[str, str]:
    """How a field's default is written, and what is said of the field behind it in its line, or in the lines above it.

    Of an inherited field, and of one whose default alone is new, what the base says counts.

    Raises:
      ValueError: it has no default, or nothing is said of it.
    """
    for declaring in group.__mro__:
        above = []
        if name not in inspect.get_annotations(declaring):
            continue
        for line in inspect.getsource(declaring).splitlines():
            line = line.strip()
            if line.startswith("#"):
                above.append(line.removeprefix("#").strip())
                continue
            found = re.fullmatch(rf"{name}: [^#]*? = (?P<default>.*?)(  # (?P<comment>.*))?", line)
            if found and (found["comment"] or above):
                return found["default"], found["comment"] or " ".join(above)
            above = []
    raise ValueError(f"{group.__name__}.{name} has no comment, or no default")
