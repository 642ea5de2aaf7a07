"""A profile of some steps, as train.profile_steps asks for it."""

from collections.abc import Callable
from pathlib import Path

import jax


class Profiler:
    """Writes ``plugins/profile`` below a folder, which XProf and TensorBoard open.

    Args:
        steps: the first one, counted from 0, and the one after the last; None: there is no profile.
        folder: where it goes.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._runs = steps, folder, False

    def problem(self, first: int, end: int) -> str | None:
        """What a person should know of the profile before a run's steps from ``first`` to ``end`` (not among them); None: nothing."""
        if self._steps is None or first == end:
            return None
        asked = "train.profile_steps={}:{}".format(*self._steps)
        if self._steps[0] >= end:
            return f"{asked}: no profile will be written, as the last step is {end - 1}, counted from 0"
        if self._steps[0] < first:
            return f"{asked}: no profile will be written, as the run goes on from step {first}, counted from 0"
        if self._steps[1] > end:
            return f"{asked}: the profile ends with the run, after step {end - 1}"
        return None

    def before(self, step: int) -> None:
        """A step is about to be started."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, steps_done: int, wait: Callable[[], None]) -> None:
        """So many steps have been started; ``wait`` returns when they are done."""
        if self._runs and steps_done >= self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """End a profile that is being made."""
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
