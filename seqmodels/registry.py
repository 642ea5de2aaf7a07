"""A package whose modules are found by their file names."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType

from seqmodels import suggest
from seqmodels.errors import UserError
from seqmodels.ranges import short_repr


def of_package(package: str, path: Iterable[str], what: str) -> tuple[Callable[[], tuple[str, ...]], Callable[[str], ModuleType]]:
    """``names() -> the modules in a package, sorted`` and ``load(name) -> the module``, which raises UserError for an unknown name.

    Args:
      package: its ``__name__``.
      path: its ``__path__``.
      what: one of its modules, for the error: "mixer".
    """

    def names() -> tuple[str, ...]:
        return tuple(sorted(module.name for module in pkgutil.iter_modules(path)))

    def load(name: str) -> ModuleType:
        if name not in names():
            raise unknown(what, name, names())
        return importlib.import_module(f"{package}.{name}")

    return names, load


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """There is no such module; the nearest is named."""
    return UserError(f"there is no {what} {short_repr(name)}; {suggest.hint(name, known)}known: {', '.join(known)}")
