"""The registry of checkpoint kinds is this folder: ``<model_type>.py`` holds ``KIND``, a table (``interop/table.py``).

Adding a kind is adding one file, a golden checkpoint to ``tests/goldens/hf`` and its name to ``tests/interop/test_import_hf.py``.
"""

import importlib
import pkgutil

from seqmodels.errors import UserError
from seqmodels.interop.table import Kind

# Kinds that one might look for, and what is missing here.
MISSING = {"recurrent_gemma": "its RG-LRU layers have no mixer here"}


def names() -> tuple[str, ...]:
    """The kinds in this folder, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(model_type: str) -> Kind:
    """The table of one kind. Raises UserError for a kind that is not here."""
    if model_type not in names():
        why = f" ({MISSING[model_type]})" if model_type in MISSING else ""
        raise UserError(f"config.json has model_type={model_type!r}, which cannot be imported{why}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{model_type}").KIND
