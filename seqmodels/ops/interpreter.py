"""Whether Pallas kernels run in their interpreter: the way to drive them without their hardware."""

import contextlib
import contextvars
from collections.abc import Iterator

_interpreting = contextvars.ContextVar("seqmodels_ops_interpreting", default=False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Inside this context Pallas kernels run in their interpreter (read when a function is traced)."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether the caller is inside ``interpret()``."""
    return _interpreting.get()
