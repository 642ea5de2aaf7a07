"""Says in one line what to do where a command is run by a Python that lacks the packages."""

import importlib.util
import sys
from pathlib import Path

# What requirements.txt installs, by the names that are imported.
MODULES = (
    "jax", "flax", "optax", "ml_collections", "orbax", "datasets", "tensorboardX", "tokenizers", "jaxtyping", "matplotlib",
    "rich", "scipy", "yaml",
)  # fmt: skip
CLONE = Path(__file__).resolve().parent.parent


def check_packages() -> None:
    """Ends the process with a line on stderr and exit code 1 if a package is missing. Imports none of them."""
    lacking = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not lacking:
        return
    activate = CLONE / ".venv" / "bin" / "activate"
    if activate.exists():
        cure = f"activate the environment that has them (. {activate})"
    else:
        cure = f"install them (pip install -r {CLONE / 'requirements.txt'})"
    sys.exit(f"error: {sys.executable} has no {', '.join(lacking)}: {cure}")
