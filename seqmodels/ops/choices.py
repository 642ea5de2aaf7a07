"""The forms an op may be asked for, and which one a traced function took: what ``implementation=None`` came to.

    with ops.record_choices() as choices:
        train_step(state, batch)          # the call that traces it
    choices                               # {"gated_linear_attention: chunked (chunk 64)": None}

Forms are chosen while a function is traced. A call of a function that is compiled already traces nothing, and so
records nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Annotated

from seqmodels import xla_cpu
from seqmodels.ops import target
from seqmodels.ranges import OneOf

IMPLEMENTATIONS = ("recurrent", "associative", "parallel", "chunked", "pallas")
Implementation = Annotated[str, OneOf(IMPLEMENTATIONS)]
"""The type of a config's field that names one."""

_recorded = contextvars.ContextVar("seqmodels_ops_choices", default=())


@contextlib.contextmanager
def record_choices() -> Iterator[dict[str, None]]:
    """The choices made inside, as lines for a person, each once, in the order in which they were made."""
    choices = {}
    token = _recorded.set((*_recorded.get(), choices))
    try:
        yield choices
    finally:
        _recorded.reset(token)


def check(implementation: str | None, chunk_size: int | None = None) -> None:
    """What an op was asked for; None is the op's own choice.

    Raises:
      ValueError: an unknown implementation, or a chunk size below 1.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")


def note(op: str, implementation: str, chunk_size: int | None = None) -> None:
    """Called by an op when it has resolved how it will be computed; ``chunk_size`` where there are chunks."""
    if target.device() == "cpu":
        xla_cpu.warn_of_wrong_fusions()
    chunk = "" if chunk_size is None else f" (chunk {chunk_size})"
    for choices in _recorded.get():
        choices[f"{op}: {implementation}{chunk}"] = None
