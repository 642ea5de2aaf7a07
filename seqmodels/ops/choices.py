"""Which form of each op a traced function took: what ``implementation=None`` and ``chunk_size=None`` came to.

    with ops.record_choices() as choices:
        train_step(state, batch)          # the call that traces it
    choices                               # {"gated_linear_attention: chunked (chunk 32)": None}

Forms are chosen while a function is traced. A call of a function that is compiled already traces nothing, and so
records nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator

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


def note(op: str, implementation: str, chunk_size: int | None = None) -> None:
    """Called by an op when it has resolved how it will be computed; ``chunk_size`` where there are chunks."""
    chunk = "" if chunk_size is None else f" (chunk {chunk_size})"
    for choices in _recorded.get():
        choices[f"{op}: {implementation}{chunk}"] = None
