"""The registry of sequence mixers is this folder: ``<name>.py`` holds ``Config`` and ``Mixer``.

Adding an architecture is adding one file. The file holds a header docstring (equation, paper, state
size, numerical trap), a frozen dataclass ``Config`` whose every field has a default, and
``Mixer(config, d_model, *, rngs)`` with ``init_state`` and ``__call__`` (DESIGN in the README). It may name the layers
that make one repeat of a model in its paper as ``PATTERN``, if those are not itself and an MLP.
"""

import importlib
import pkgutil
from types import ModuleType

from seqmodels import suggest
from seqmodels.errors import UserError
from seqmodels.ranges import shown


def names() -> tuple[str, ...]:
    """The mixers in this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    """The module of one mixer, with its ``Config`` and ``Mixer``. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"there is no mixer {shown(name)}; {suggest.hint(name, names())}known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def pattern(name: str) -> str:
    """The layers that stand where a Transformer has attention and MLP, as the mixer's paper has them: its ``PATTERN``.

    Raises UserError for an unknown name.
    """
    return getattr(load(name), "PATTERN", f"{name} mlp")
