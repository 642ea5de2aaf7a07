"""Synthetic tasks: what a mixer can remember, copy and keep track of, by name.

A task is a frozen dataclass of options (``config.data.tasks.<name>``) that draws labelled examples; ``seqmodels.data.tasks.batches``
makes batches of them.
"""

from typing import Final

from seqmodels import suggest
from seqmodels.data.tasks.copying import Compression, Memorization, SelectiveCopying
from seqmodels.data.tasks.recall import MQAR, FuzzyRecall, InContextRecall, Induction, NoisyRecall
from seqmodels.data.tasks.state_tracking import GroupWord, ListOps, ModularArithmetic, Parity
from seqmodels.data.tasks.task import Segment, Task
from seqmodels.errors import UserError
from seqmodels.ranges import short_repr

TASKS: Final[dict[str, type[Task]]] = {
    task.name: task
    for task in (
        MQAR, Induction, InContextRecall, FuzzyRecall, NoisyRecall,
        SelectiveCopying, Compression, Memorization,
        Parity, GroupWord, ModularArithmetic, ListOps,
    )
}  # fmt: skip

__all__ = ["TASKS", "Segment", "Task", "load"]


def load(name: str) -> type[Task]:
    """A task by its name. Raises UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"there is no task {short_repr(name)}; {suggest.hint(name, TASKS)}known: {', '.join(TASKS)}")
    return TASKS[name]
