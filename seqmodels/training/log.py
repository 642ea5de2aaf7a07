"""The outputs of a run: metrics.jsonl, samples.txt, TensorBoard events, and a terminal with the time left.

metrics.jsonl has one row per step and split, whatever happened to the process in between: rows are written
before the checkpoint of their step, and those beyond the checkpoint that a run resumes from are dropped.

A checkpoint says how many bytes of metrics.jsonl and samples.txt belong to its steps, and their digest. A file that does not
begin with them was damaged or shortened meanwhile: that is said, and what was found is kept beside it.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from seqmodels.data import atomic
from seqmodels.formats import metrics_rows
from seqmodels.formats.limits import open_file
from seqmodels.processes import Group
from seqmodels.training import loggers
from seqmodels.training.terminal import Terminal

# Dense bfloat16 FLOP/s of one jax device, from the vendors' data sheets; the first name contained in
# `device_kind` counts. A TPU v2 or v3 chip is two devices.
PEAK_FLOPS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v6": 918e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


class Log:
    """Writes what a run reports, from the step it resumes at.

    Args:
        workdir: the run folder.
        step: rows, samples and events of later steps are dropped: they will be written again.
        total_steps: where the run ends.
        tokens_per_step: B * T.
        flops_per_second: the rate that counts as a utilisation of 1 (`peak_flops_per_second`), or None.
        flops_per_token: of one training step; None where flops_per_second is.
        seconds: training time before this process.
        written: what `Log.written` said when the checkpoint of `step` was saved; None: it does not say.
        group: the processes of the run, of which the first writes and prints; None: this one does.
        names: of the loggers beside metrics.jsonl (`loggers.KINDS`).
        hyperparameters: that loggers show, by dotted names.
    """

    def __init__(
        self, workdir: Path, *, step: int, total_steps: int, tokens_per_step: int, flops_per_token: float | None,
        flops_per_second: float | None, seconds: float = 0.0, written: Mapping | None = None, group: Group | None = None,
        names: Sequence[str] = ("tensorboard",), hyperparameters: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.folder = workdir
        self._writes = group is None or group.is_first
        self._terminal = Terminal(step, total_steps) if self._writes else NoOutput()
        expected = {} if written is None else written
        if self._writes:
            self._metrics = MetricsFile(
                workdir / "metrics.jsonl", last_step=step, expected=expected.get("metrics.jsonl"), report=self.line
            )
            self._samples = SamplesFile(
                workdir / "samples.txt", last_step=step, expected=expected.get("samples.txt"), report=self.line
            )
            self._loggers = loggers.Loggers(names, workdir, last_step=step, hyperparameters=hyperparameters or {})
        else:
            self._metrics, self._samples, self._loggers = MetricsInMemory(), SamplesInMemory(), NoOutput()
        if group is not None:  # what is due at this step and done, all processes know
            rows, sampled = group.from_first(lambda: ([row for row in self.rows if row["step"] == step], self.has_sample(step)))
            if not self._writes:
                self._metrics.rows.extend(rows)
                self._samples.steps.extend([step] * sampled)
        self.stopwatch = Stopwatch(seconds)
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._flops_per_second = flops_per_second

    @property
    def rows(self) -> Sequence[Mapping]:
        """The rows of metrics.jsonl so far."""
        return self._metrics.rows

    def evaluation(self, step: int) -> Mapping | None:
        """The validation row of a step, if it is written."""
        rows = (row for row in reversed(self.rows) if row["step"] == step and row["split"] == "validation")
        return next(rows, None)

    def has_sample(self, step: int) -> bool:
        """Whether the sample of a step is written."""
        return step in self._samples.steps

    def line(self, text: str) -> None:
        """Print one line above the progress bar."""
        self._terminal.line(text)

    def doing(self, what: str, *more: str) -> contextlib.AbstractContextManager[None]:
        """Inside, the terminal says what is done other than steps (`Terminal.doing`)."""
        return self._terminal.doing(what, *more)

    def progress(self, step: int) -> None:
        """Move the bar."""
        self._terminal.progress(step)

    def train(
        self, step: int, *, loss: float, scores: Mapping, gradient_norm: float, learning_rate: float, **counts: int
    ) -> None:
        """The row of one training step: its own loss and scores (perplexity, ...), and the speed since the row before."""
        tokens_per_second = self.stopwatch.steps_per_second() * self._tokens_per_step
        mfu = None
        if self._flops_per_second is not None:
            mfu = tokens_per_second * self._flops_per_token / self._flops_per_second
        row = self._row(step, "train", loss, scores, tokens_per_second)
        self._write({**row, "gradient_norm": gradient_norm, "learning_rate": learning_rate, "mfu": mfu, **counts})

    def validation(self, step: int, *, loss: float, scores: Mapping, tokens_per_second: float) -> None:
        """The row of one evaluation; its tokens_per_second are those of the forward pass."""
        self._write(self._row(step, "validation", loss, scores, tokens_per_second))

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote."""
        self._samples.append(step, text)
        self._loggers.text(step, "sample", text)
        self.line(f"--- the model writes, at step {step}:\n{text.rstrip()}\n---")

    def final(self, metrics: Mapping[str, float]) -> None:
        """What the run came to, beside its hyperparameters."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._loggers.final({name: value for name, value in numbers.items() if math.isfinite(value)})

    def sync(self) -> None:
        """Put the rows and samples written so far on the disk; called before the checkpoint of a step."""
        self._metrics.sync()
        self._samples.sync()

    def written(self) -> dict[str, dict]:
        """How many bytes of each file there are, and their digest: JSON values for the record of a checkpoint."""
        return {"metrics.jsonl": self._metrics.content.summary(), "samples.txt": self._samples.content.summary()}

    def close(self) -> None:
        """End the bar and close the files."""
        self._terminal.close()
        self._metrics.close()
        self._loggers.close()

    def _row(self, step, split, loss, scores, tokens_per_second) -> dict:
        return {
            "step": step,
            "split": split,
            "loss": loss,
            **scores,
            "tokens_per_second": tokens_per_second,
            "tokens": step * self._tokens_per_step,
            "seconds": self.stopwatch.seconds,
        }

    def _write(self, row: dict) -> None:
        self._metrics.append(row)
        self._loggers.scalars(row["step"], {
            f"{row['split']}/{name}": value
            for name, value in row.items()
            if isinstance(value, float) and math.isfinite(value)
        })  # fmt: skip
        self._terminal.row(row)


class ContentDigest:
    """How many bytes were written to a file, and their digest, kept while it grows."""

    def __init__(self, data: bytes = b""):
        self._bytes, self._digest = len(data), hashlib.blake2b(data, digest_size=16)

    def append(self, data: bytes) -> None:
        """Further bytes at the end."""
        self._bytes += len(data)
        self._digest.update(data)

    def summary(self) -> dict:
        """JSON values, for `begins`."""
        return {"bytes": self._bytes, "digest": self._digest.hexdigest()}


def begins_with(data: bytes, summary: Mapping) -> bool:
    """Whether a file's bytes begin with those of a summary."""
    return len(data) >= summary["bytes"] and ContentDigest(data[: summary["bytes"]]).summary() == summary


def _read(path: Path, expected: Mapping | None, last_step: int, report: Callable[[str], None]) -> tuple[bytes, str]:
    """The bytes of a file, none where there is no file, and their text.

    A file that does not begin as the checkpoint of `last_step` expects it is reported, and a copy of it is kept.
    """
    try:
        with open_file(atomic.own_file(path)) as file:
            data = file.read()
    except FileNotFoundError:
        data = b""
    if expected is not None and not begins_with(data, expected):
        _report_damage(path, data, expected, last_step, report)
    return data, data.decode("utf-8", errors="replace")


def _report_damage(path: Path, data: bytes, expected: Mapping, last_step: int, report: Callable[[str], None]) -> None:
    lost = (
        f"{len(data)} of at least {expected['bytes']} bytes are left" if len(data) < expected["bytes"] else "bytes were changed"
    )
    kept = ""
    if data:
        number = next(n for n in range(1, sys.maxsize) if not os.path.lexists(path.with_name(f"{path.name}.damaged{n}")))
        copy = path.with_name(f"{path.name}.damaged{number}")
        copy.write_bytes(data)
        kept = f"; as it was found it is kept in {copy.name}"
    report(f"{path} is not what was written up to step {last_step}: {lost}; the run goes on with what can be read{kept}")


class MetricsFile:
    """metrics.jsonl: read, repaired and cut back on opening; then one whole line per row.

    Args:
        path: the file; need not exist.
        last_step: rows of later steps are dropped, and so is a line that a killed process left unfinished.
        expected: the `ContentDigest.summary` of what is there at least; None: that is not known.
        report: called with a line about a file that is not so.
    """

    def __init__(
        self,
        path: Path,
        *,
        last_step: int,
        expected: Mapping | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        _, text = _read(path, expected, last_step, report)
        rows = [row for row in map(metrics_rows.row, text.splitlines()) if row and row["step"] <= last_step]
        self.rows = list({(row["step"], row["split"]): row for row in rows}.values())
        repaired = "".join(map(_line, self.rows))
        if repaired != text:
            atomic.write_text(path, repaired)
        self.content = ContentDigest(repaired.encode())
        self._file = open(path, "a", encoding="utf-8")

    def append(self, row: Mapping) -> None:
        """Write a row; values that are not finite become null."""
        row = {name: value if _is_json(value) else None for name, value in row.items()}
        line = _line(row)
        self._file.write(line)
        self._file.flush()
        self.content.append(line.encode())
        self.rows.append(row)

    def sync(self) -> None:
        """Put the rows on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SamplesFile:
    """samples.txt: what the model wrote at which steps, cut back to `last_step` on opening."""

    HEADING = re.compile(r"^=== step (\d+)$", re.MULTILINE)

    def __init__(
        self,
        path: Path,
        *,
        last_step: int,
        expected: Mapping | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        self._path = path
        data, text = _read(path, expected, last_step, report)
        headings = list(self.HEADING.finditer(text))
        self.steps = [int(heading[1]) for heading in headings if int(heading[1]) <= last_step]
        later = [heading.start() for heading in headings if int(heading[1]) > last_step]
        if later:
            text = text[: min(later)]
        if text.encode() != data:
            atomic.write_text(path, text)
        self.content = ContentDigest(text.encode())

    def append(self, step: int, text: str) -> None:
        """Write the sample of one step; a line of it that looks like a heading gets a space in front."""
        text = self.HEADING.sub(r" \g<0>", text)
        data = f"=== step {step}\n{text.rstrip()}\n\n".encode()
        with open(self._path, "ab") as file:
            file.write(data)
        self.content.append(data)
        self.steps.append(step)

    def sync(self) -> None:
        """Put the samples on the disk."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())


class MetricsInMemory:
    """`MetricsFile` in a process that writes none."""

    def __init__(self):
        self.rows: list[Mapping] = []
        self.content = ContentDigest()

    def append(self, row: Mapping) -> None:
        """Keep a row."""
        self.rows.append(row)

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class SamplesInMemory:
    """`SamplesFile` in a process that writes none."""

    def __init__(self):
        self.steps: list[int] = []
        self.content = ContentDigest()

    def append(self, step: int, text: str) -> None:
        """Note that the step has its sample."""
        self.steps.append(step)

    def sync(self) -> None:
        """Nothing."""


class NoOutput:
    """`Terminal` and `Loggers` in a process that shows nothing: every method does nothing."""

    def doing(self, what: str, *more: str) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Stopwatch:
    """Training time: the steps alone, without the first one of a process, which is slower, and without pauses."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self._lap_steps, self._lap_seconds = 0, 0.0
        self._first_step_seconds = None
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """A pause (compiling, an evaluation, a sample) is over."""
        self._mark = time.perf_counter()

    def step(self) -> None:
        """A step is done."""
        elapsed, self._mark = time.perf_counter() - self._mark, time.perf_counter()
        if self._first_step_seconds is None:
            self._first_step_seconds = elapsed
            return
        self.seconds += elapsed
        self._lap_seconds += elapsed
        self._lap_steps += 1

    def steps_per_second(self) -> float:
        """Speed since the last call; that of the first step if no other has been done since."""
        if not self._lap_steps:
            return 1.0 / self._first_step_seconds
        rate = self._lap_steps / self._lap_seconds
        self._lap_steps, self._lap_seconds = 0, 0.0
        return rate


def peak_flops_per_second(devices: Sequence[jax.Device]) -> float | None:
    """The FLOP/s that model FLOP utilisation is measured against, over all devices; None where unknown.

    For accelerators the dense bfloat16 peak of the data sheet, whatever the run computes in (as in Chowdhery
    et al. 2022, appendix B). A CPU has no such figure worth having.
    """
    kind = devices[0].device_kind
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name.lower() in kind.lower()), None)
    return None if peak is None else peak * len(devices)


def _line(row: Mapping) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _is_json(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
