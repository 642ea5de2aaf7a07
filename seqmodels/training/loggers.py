"""Where a run's figures go beside metrics.jsonl, by train.loggers: TensorBoard, Weights & Biases."""

import importlib.util
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmodels.data import atomic, well_formed
from seqmodels.errors import UserError


class Loggers:
    """Several loggers as one.

    Args:
        names: of ``KINDS``.
        workdir: the run folder.
        last_step: that the run goes on from; what was logged of later steps will be logged again.
        hyperparameters: the config, by dotted names.
    """

    def __init__(self, names: Sequence[str], workdir: Path, *, last_step: int, hyperparameters: Mapping[str, Any]):
        shown = {name: well_formed(value) if isinstance(value, str) else value for name, value in hyperparameters.items()}
        self._all = [KINDS[name](workdir, last_step=last_step, hyperparameters=shown) for name in names]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each of several curves."""
        for each in self._all:
            each.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """A text of one step."""
        for each in self._all:
            each.text(step, name, well_formed(text))

    def final(self, metrics: Mapping[str, float]) -> None:
        """What the run came to."""
        for each in self._all:
            each.final(metrics)

    def close(self) -> None:
        """Nothing more will come."""
        for each in self._all:
            each.close()


class TensorBoard:
    """``tensorboard/``: an event file, by tensorboardX's records but without its SummaryWriter.

    That one writes from a thread of its own: a kill loses what waits there, and a full disk stops the thread
    and then the run. Here a call returns when its event is written. Points after `last_step`, from before a
    resume, are hidden by TensorBoard.
    """

    def __init__(self, workdir: Path, *, last_step: int, hyperparameters: Mapping[str, Any]):
        # Half a second that `import seqmodels` need not pay.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._summary = Event, summary
        directory = workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._hyperparameters, self._last_step = hyperparameters, last_step
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{os.getpid()}")
        self._write(last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each of several curves."""
        self._last_step = step
        points = [self._summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step, summary=self._summary.Summary(value=points))

    def text(self, step: int, name: str, text: str) -> None:
        """A text of one step."""
        self._write(step, summary=self._summary.text(name, text))

    def final(self, metrics: Mapping[str, float]) -> None:
        """A row of the HPARAMS page: the hyperparameters, and what the run came to under ``final/``."""
        metrics = {f"final/{name}": value for name, value in metrics.items()}
        shown = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in self._hyperparameters.items()
        }
        for summary in self._summary.hparams(shown, metrics):
            self._write(self._last_step, summary=summary)
        self.scalars(self._last_step, metrics)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


class WandB:
    """``wandb/``: a run of Weights & Biases, of the project ``seqmodels`` or $WANDB_PROJECT.

    The package's own settings hold: WANDB_MODE=offline keeps everything in the folder, for ``wandb sync`` later. A run that is
    resumed goes on with the same run there; what was logged of later steps stays as it is.
    """

    def __init__(self, workdir: Path, *, last_step: int, hyperparameters: Mapping[str, Any]):
        import wandb  # an optional package, which takes seconds to import

        path = atomic.own_file(workdir / "wandb_id")
        if not path.exists():
            atomic.write_text(path, uuid.uuid4().hex[:8])
        project = {} if os.environ.get("WANDB_PROJECT") else {"project": "seqmodels"}
        self._wandb, self._last_step = wandb, last_step
        self._run = wandb.init(
            **project, name=well_formed(workdir.name), dir=str(workdir), id=path.read_text().strip(), resume="allow",
            config={name: list(value) if isinstance(value, tuple) else value for name, value in hyperparameters.items()},
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point in each of several curves."""
        self._last_step = step
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text of one step, in a table of one row."""
        self._run.log({name: self._wandb.Table(columns=["step", "text"], data=[[step, text]])}, step=step)

    def final(self, metrics: Mapping[str, float]) -> None:
        """The run's summary."""
        self._run.summary.update({f"final/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": WandB}
PACKAGES = {"wandb": "wandb"}  # that requirements.txt leaves out, by the loggers that need them


def check(names: Sequence[str]) -> None:
    """Raises UserError if a logger needs a package that is not installed."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"train.loggers names {name}, which is not installed: pip install {PACKAGES[name]}, or leave it out")
