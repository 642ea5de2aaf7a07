"""Carrying out a plan: child processes, several at a time if asked, one progress line, and a state that is all on disk.

What is due is read off the folders: a run is over when it has an outcome.json, its quality is known when it has scores.npz, a
candidate's cost when it has cost.json. So a comparison that was killed at any moment goes on by starting it again, and nothing
that is there is done twice. Of runs that are over the files of RECORDS are enough, on another machine too.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from seqmodels import packages, screen
from seqmodels.comparison import scores
from seqmodels.comparison.plan import EXTENSION, Candidate, Plan, RunPlan
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import columns, escape, say
from seqmodels.formats import json_text
from seqmodels.training import loop, run_folder

OUTCOME, COST, START = run_folder.OUTCOME_NAME, "cost.json", "start.json"
FINISHED, DIVERGED = "finished", "diverged"
RECORDS = (
    "config.json",
    "metrics.jsonl",
    OUTCOME,
    scores.FILE_NAME,
    COST,
    START,
)  # what later commands read of runs that are over
POLL_SECONDS = 0.3
LINE_SECONDS = 20.0  # between two lines of progress where there is no terminal
REWRITE_SECONDS = 1.0  # on a terminal
# Several processes on one accelerator: none may take all of its memory at once.
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

# On Linux a child whose parent dies is told to stop, and saves; the signal outlives exec. It gets the parent's number, to notice a
# death before that was arranged.
_LAUNCHER: Final = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(143)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def outcome(run: RunPlan) -> dict | None:
    """What became of a run: `status` (finished or diverged), `step`, `seconds`; None while it is not over."""
    found = _read(run.folder / OUTCOME, "status", "step", "seconds")
    whole = (
        found is not None
        and found["status"] in (FINISHED, DIVERGED)
        and all(type(found[name]) in (int, float) and found[name] >= 0 for name in ("step", "seconds"))
    )
    return found if whole and isinstance(found.get("summary"), dict | None) else None


def cost(candidate: Candidate, asked: dict) -> dict | None:
    """The measured cost of a candidate, if it was measured as `asked`."""
    found = _read(candidate.folder / COST, "asked")
    return found if found is not None and found["asked"] == asked else None


def _compilation_cache(runs: Sequence[RunPlan]) -> str:
    """The flag of a child that opens the folders of runs: the comparison's config says it, not theirs."""
    return f"--compilation_cache_dir={runs[0].config.train.compilation_cache_dir}"


def start(candidate: Candidate) -> dict | None:
    """How the candidate's untrained model starts, as `comparison.audit` measured it: `figures` and `summary`, of what was `asked`."""
    return _read(candidate.folder / START, "asked", "figures", "summary")


def write_json(path: Path, values) -> None:
    """Whole or not at all."""
    atomic.write_whole(path, lambda file: file.write((json.dumps(values, indent=1) + "\n").encode()))


def _read(path: Path, *names: str) -> dict | None:
    """The object in a file, which has at least these names; None where there is none, or something else."""
    try:
        found = json_text.read(path)
    except (FileNotFoundError, json_text.Malformed):
        return None
    return found if isinstance(found, dict) and all(name in found for name in names) else None


@dataclasses.dataclass(frozen=True)
class Job:
    """A child process that is due."""

    name: str
    folder: Path  # its log goes there, and no two jobs share one
    argv: tuple[str, ...]  # after the interpreter
    log: str
    run: RunPlan | None  # of train.py
    alone: bool  # it measures time
    is_done: Callable[[], bool]  # its result is on disk


@dataclasses.dataclass
class _Child:
    job: Job
    process: subprocess.Popen
    begun: float
    first_step: int  # done before, of a run that goes on


class Executor:
    """Does what is due until nothing is.

    Args:
        plan: the comparison.
        jobs: how many processes at a time.
        train: what stands after `python` to train a run (without its folder's flag).
        worker: the script that scores runs and measures costs.
        vocab_size: tokens of the tokenizer.
        frequent_pairs: a file of the pairs of tokens that do not count as repeated (`recall.frequent_pairs`); None: of a task.
        on_news: called whenever the quality or the cost of a candidate has become known.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        jobs: int,
        train: Callable[[RunPlan], Sequence[str]],
        worker: str,
        vocab_size: int,
        frequent_pairs: Path | None = None,
        on_news: Callable[[], None],
    ):
        self.plan, self.jobs, self.vocab_size = plan, jobs, vocab_size
        self._frequent_pairs = frequent_pairs
        self._train, self._worker, self._on_news = functools.cache(train), worker, on_news
        self._children: list[_Child] = []
        self._known = ResultsCache(plan)
        self._scored: set[str] = set()  # whose quality is known
        self._complete: set[str] = set()  # and whose cost
        self._display = Display(sys.stderr)
        self._seconds: dict[str, list[float]] = {"score": [], "cost": []}
        self._step_seconds: dict[str, float] = {}

    def run(self) -> None:
        """Until everything is on disk.

        Raises:
            UserError: a child failed of something else than divergence; what is done stays done.
            Stopped: a signal; the children have saved.
        """
        with loop.Signals() as signals:
            try:
                while True:
                    signals.check()
                    self._reap_finished()
                    if self._has_room():
                        due = self._due()
                        if not due and not self._children:
                            break
                        if self._start(due):
                            continue
                    self._display.update(self._estimate_line)
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_children()
                self._display.close()

    # -- what is due

    def _due(self) -> list[Job]:
        """In order of the candidates; those that run already, here or elsewhere, among them."""
        by_candidate = {candidate.label: self._due_of(candidate) for candidate in self.plan.candidates}
        complete = {label for label, jobs in by_candidate.items() if not jobs}
        scored = {label for label, jobs in by_candidate.items() if all(job.alone for job in jobs)}
        if complete - self._complete:
            self._display.line(f"complete: {', '.join(label for label in by_candidate if label in complete)}")
        if complete - self._complete or scored - self._scored:
            self._complete, self._scored = complete, scored
            self._display.close()  # the report is written, which takes seconds and is said
            self._on_news()
        found = [job for jobs in by_candidate.values() for job in jobs]
        # With one process at a time a candidate is completed before the next begins; with several, what must run alone is last.
        return found if self.jobs == 1 else sorted(found, key=lambda job: job.alone)

    def _due_of(self, candidate: Candidate) -> list[Job]:
        runs = self._known.rate_runs(candidate)  # more of them once the best of these is at an end of the grid
        if jobs := self._runs_and_scores(candidate, runs):
            return jobs
        best = self._known.best_rate(candidate)
        rates = self._known.rates(candidate) if self.plan.compare.check_rates else []
        for rate in [] if best is None else [best, *(rate for rate in rates if rate != best)]:
            if jobs := self._runs_and_scores(candidate, self.plan.seed_runs(candidate, rate)):
                return jobs
        asked = asked_cost(self.plan, candidate, self.vocab_size)
        if self._known.cost(candidate, asked) is not None:
            return []
        argv = (
            self._worker, f"--cost={runs[0].folder}", f"--out={candidate.folder / COST}", f"--asked={json.dumps(asked)}",
            _compilation_cache(runs),
        )  # fmt: skip
        return [
            Job(
                f"cost of {candidate.label}", candidate.folder, argv, "cost.log", None, alone=True,
                is_done=lambda: self._known.cost(candidate, asked) is not None,
            )
        ]  # fmt: skip

    def _runs_and_scores(self, candidate: Candidate, runs: list[RunPlan]) -> list[Job]:
        missing = [run for run in runs if self._known.outcome(run) is None]
        if missing:
            return [
                Job(
                    str(run), run.folder, (*self._train(run), f"--workdir={run.folder}"), "train.log", run, alone=False,
                    is_done=lambda run=run: self._known.outcome(run) is not None,
                )
                for run in missing
            ]  # fmt: skip
        unscored = [run for run in runs if self._known.outcome(run)["status"] == FINISHED and self._known.scores(run) is None]
        if not unscored:
            return []
        argv = (
            self._worker,
            f"--validation_tokens={self.plan.compare.validation_tokens}",
            *([] if self._frequent_pairs is None else [f"--frequent_pairs={self._frequent_pairs}"]),
            *(f"--score={run.folder}" for run in unscored),
            _compilation_cache(unscored),
        )
        return [
            Job(
                f"scores of {candidate.label}", candidate.folder, argv, "score.log", None, alone=False,
                is_done=lambda: all(self._known.scores(run) is not None for run in unscored),
            )
        ]  # fmt: skip

    # -- children

    def _has_room(self) -> bool:
        return len(self._children) < self.jobs and not any(child.job.alone for child in self._children)

    def _start(self, due: list[Job]) -> bool:
        """Start the next job, if there is one that can be."""
        running = {child.job.name for child in self._children}
        for job in due:
            if job.name in running or (job.alone and self._children):
                continue
            if job.run is not None and run_folder.is_locked(job.folder):
                continue  # a run that an earlier comparison began and that still stops, or goes on, by itself
            self._children.append(self._launch(job))
            return True
        return False

    def _launch(self, job: Job) -> _Child:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / job.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _LAUNCHER, str(os.getpid()), *job.argv],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,  # Ctrl-C reaches only this process, which passes on one signal
                env=os.environ if self.jobs == 1 else {**SHARED_DEVICE, **os.environ},
            )  # fmt: skip
        if job.run is not None:
            self._display.line(f"{job.name}: {packages.shell_command(job.argv)}", whole=True)
        return _Child(job, process, time.monotonic(), _last_step(job.folder) if job.run is not None else 0)

    def _reap_finished(self) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._children.remove(child)
            out, _ = child.process.communicate()
            seconds = time.monotonic() - child.begun
            if child.job.run is not None:
                self._finish_run(child, out, seconds)
            elif child.process.returncode != 0 or not child.job.is_done():
                raise self._failed(child)
            else:
                self._seconds["cost" if child.job.alone else "score"].append(seconds)

    def _finish_run(self, child: _Child, out: str, seconds: float) -> None:
        run, last = child.job.run, _last_json(out)
        if child.process.returncode == 0 and last is not None:
            finite = last["validation_loss"] is not None and np.isfinite(last["validation_loss"])
            result = {"status": FINISHED if finite else DIVERGED, "step": last["step"], "summary": last}
        elif last is not None and "diverged" in last:
            result = {"status": DIVERGED, "step": last["step"]}
        else:
            raise self._failed(child)
        command = packages.shell_command(child.job.argv)
        write_json(run.folder / OUTCOME, result | {"seconds": seconds, "command": command})
        if result["step"] > child.first_step:
            self._step_seconds[run.label] = seconds / (result["step"] - child.first_step)
        self._display.line(_result_line(run, result, seconds))

    def _failed(self, child: _Child) -> UserError:
        log = child.job.folder / child.job.log
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last_line = f" ({lines[-1].strip()})" if lines else ""
        return UserError(
            f"{child.job.name} ended with status {child.process.returncode}{last_line}; its output is in {log}. The same command "
            "goes on from here"
        )

    def _stop_children(self) -> None:
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        for child in self._children:
            child.process.communicate()
        self._children.clear()

    # -- progress

    def _estimate_line(self) -> str:
        """Runs done, what goes on, and how long the rest may take."""
        done = self._known.number_of_outcomes()
        total = max(done, len(self._all_runs()))
        parts = [f"{done}/{total} runs"]
        left = self._seconds_left()
        if left is not None:  # ahead of names, whose ends a narrow terminal cuts off
            parts.append(f"about {_minutes(left)} to go")
        for child in self._children:
            step = f" step {_last_step(child.job.folder)}/{child.job.run.steps}" if child.job.run is not None else ""
            parts.append(child.job.name + step)
        if not self._children:
            parts.append("waiting for a run that goes on by itself")
        return f"[{', '.join(parts)}]"

    def _all_runs(self) -> list[RunPlan]:
        return [run for candidate in self.plan.candidates for run in self._known.all_runs(candidate)]

    def step_seconds(self) -> dict[str, float]:
        """Seconds of a step by candidate, start and compilation shared out: of the runs done now, or else of those done before."""
        found = {}
        for run in self._all_runs():
            over = self._known.outcome(run)
            if over is not None and over["step"]:
                found[run.label] = over["seconds"] / over["step"]
        return found | self._step_seconds

    def announcement(self) -> list[str]:
        """What will be done: runs, tokens, time, as far as that is known."""
        compare, runs = self.plan.compare, self._all_runs()
        of = self.plan.base["data"]
        per_step = of["batch_size"] * of["seq_len"]
        search = [run for candidate in self.plan.candidates for run in self._known.rate_runs(candidate)]
        steps, search_steps = (sum(run.steps for run in each) for each in (runs, search))
        over = [run for run in runs if self._known.outcome(run) is not None]
        lines = [
            f"{len(runs)} runs, {steps:,} steps, {steps * per_step:,} tokens; {len(over)} runs are done",
        ]
        if len(compare.learning_rates) > 1:
            lines.append(
                f"of these the learning rates take {len(search)} runs and {search_steps:,} steps ({search_steps / steps:.0%}): "
                f"{len(compare.learning_rates)} rates x {compare.rate_seeds} seed(s), and up to {compare.rate_extensions} rates "
                "more for a mixer whose best is at an end"
            )
        left = self._seconds_left()
        if len(over) == len(runs):
            lines.append("time: everything is trained")
        elif left is None:
            lines.append("time: known when the first run has ended")
        else:
            lines.append(f"time: about {_minutes(left)} at the speed of the runs that are done")
        return lines

    def _seconds_left(self) -> float | None:
        """What the steps that are left take at the speed of those that were done; None before any was."""
        speeds = self.step_seconds()
        for child in self._children:
            if child.job.run is not None and (steps := _last_step(child.job.folder) - child.first_step) > 0:
                speeds[child.job.run.label] = (time.monotonic() - child.begun) / steps
        if not speeds:
            return None
        typical = sum(speeds.values()) / len(speeds)
        seconds = 0.0
        for candidate in self.plan.candidates:
            speed = speeds[candidate.label] if candidate.label in speeds else typical
            if candidate.label in self._complete:
                continue
            runs = self._known.all_runs(candidate)
            steps = sum(run.steps - _last_step(run.folder) for run in runs if self._known.outcome(run) is None)
            seconds += speed * steps / self.jobs
            seconds += sum(sum(taken) / len(taken) for taken in self._seconds.values() if taken)
        return seconds


class ResultsCache:
    """What is on disk, each file read once: what is there does not change."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._found: dict[Path, object] = {}
        self._choosing_scores: dict[Path, tuple[float, float]] = {}

    def outcome(self, run: RunPlan) -> dict | None:
        """See `outcome`."""
        return self._once(run.folder / OUTCOME, lambda: outcome(run))

    def scores(self, run: RunPlan) -> scores.Scores | None:
        """Those of a run that has finished and is scored."""
        tokens = self.plan.compare.validation_tokens
        return self._once(run.folder / scores.FILE_NAME, lambda: scores.load(run.folder, tokens))

    def cost(self, candidate: Candidate, asked: dict) -> dict | None:
        """See `cost`."""
        return self._once(candidate.folder / COST, lambda: cost(candidate, asked))

    def start(self, candidate: Candidate) -> dict | None:
        """See `start`."""
        return self._once(candidate.folder / START, lambda: start(candidate))

    def number_of_outcomes(self) -> int:
        """Of runs that are over."""
        return sum(path.name == OUTCOME for path in self._found)

    def rate_runs(self, candidate: Candidate) -> list[RunPlan]:
        """Those that choose the learning rate: of the grid, and of the rates beyond its ends that results so far ask for."""
        return self.plan.rate_runs(candidate, self._searched_rates(candidate))

    def all_runs(self, candidate: Candidate) -> list[RunPlan]:
        """Every run that is due by what is known, done or not."""
        return self.plan.all_runs(candidate, self._searched_rates(candidate), self.best_rate(candidate))

    def rates(self, candidate: Candidate) -> dict[float, tuple[float, float]]:
        """For each learning rate the mean over its seeds on the documents that choose, the lower the better.

        Of `Scores.measure` and, to break ties, of the loss; infinity where one diverged.
        """
        return self._means(self.rate_runs(candidate))

    def best_rate(self, candidate: Candidate) -> float | None:
        """The learning rate of the lowest mean (see `rates`); None if it is not known yet, or all have diverged."""
        runs = self.rate_runs(candidate)
        return self._best(self._means(runs)) if self._are_over(runs) else None

    def _searched_rates(self, candidate: Candidate) -> list[float]:
        """The grid, and beyond the end at which the best lies twice (half) that rate, again until the best lies inside.

        Below the lowest, too, where all have diverged. A grid of one rate is taken as given, and so is one in which a task's
        best rate leaves no label wrong.
        """
        rates = self.plan.rates()
        for _ in range(self.plan.compare.rate_extensions if len(rates) > 1 else 0):
            runs = self.plan.rate_runs(candidate, rates)
            if not self._are_over(runs):
                break
            means = self._means(runs)
            best = self._best(means)
            if best is not None and self._is_perfect(runs, means[best]):
                break
            if best in (None, rates[0]):
                rates = [rates[0] / EXTENSION, *rates]
            elif best == rates[-1]:
                rates = [*rates, rates[-1] * EXTENSION]
            else:
                break
        return rates

    def _is_perfect(self, runs: Sequence[RunPlan], mean: tuple[float, float]) -> bool:
        measured = next((scored.measure for run in runs if (scored := self.scores(run)) is not None), "loss")
        return measured == "errors" and mean[0] == 0.0

    def _are_over(self, runs: Sequence[RunPlan]) -> bool:
        over = [self.outcome(run) for run in runs]
        return all(
            each is not None and (each["status"] != FINISHED or self.scores(run) is not None) for run, each in zip(runs, over)
        )

    def _means(self, runs: Sequence[RunPlan]) -> dict[float, tuple[float, float]]:
        found: dict[float, list[tuple[float, float]]] = {}
        for run in runs:
            found.setdefault(run.learning_rate, []).append(self._choosing(run) or (float("inf"), float("inf")))
        means = {rate: np.mean(seeds, axis=0) for rate, seeds in found.items()}
        return {rate: tuple(np.where(np.isfinite(mean).all(), mean, np.inf).tolist()) for rate, mean in means.items()}

    def _choosing(self, run: RunPlan) -> tuple[float, float] | None:
        """The scores of a run on the documents that choose; kept, as the line of progress reads them every second."""
        if run.folder not in self._choosing_scores and (scored := self.scores(run)) is not None:
            self._choosing_scores[run.folder] = tuple(scored.mean(name, ~scored.reported) for name in (scored.measure, "loss"))
        return self._choosing_scores.get(run.folder)

    def _best(self, means: dict[float, tuple[float, float]]) -> float | None:
        rate = min(means, key=means.__getitem__)
        return rate if np.isfinite(means[rate]).all() else None

    def _once(self, path: Path, read: Callable[[], object]):
        if path not in self._found:
            value = read()
            if value is None:
                return None
            self._found[path] = value
        return self._found[path]


def asked_cost(plan: Plan, candidate: Candidate, vocab_size: int) -> dict:
    """How a candidate's cost is to be measured; a measurement of something else does not count."""
    return {
        "sizes": dataclasses.asdict(candidate.matched.sizes),
        "contexts": list(plan.compare.contexts),
        "decode_tokens": plan.compare.decode_tokens,
        "vocab_size": vocab_size,
    }


class Display:
    """One line that is rewritten on a terminal that can; elsewhere a line now and then."""

    def __init__(self, stream: TextIO):
        self._stream, self._is_terminal = stream, screen.is_rewritable(stream)
        self._seconds = REWRITE_SECONDS if self._is_terminal else LINE_SECONDS
        self._next = time.monotonic() + self._seconds

    def update(self, text: Callable[[], str]) -> None:
        """The state of things, asked for when it is due: finding out reads files, which the runs' cores should not be kept from."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._seconds
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{escape(text(), 'line')[: (columns(self._stream) or 80) - 1]}")
            self._stream.flush()
        else:
            say(text(), self._stream)

    def line(self, text: str, *, whole: bool = False) -> None:
        """Something that stays; ``whole`` as in `say`."""
        self._stream.write("\r\x1b[K" if self._is_terminal else "")
        say(text, self._stream, whole=whole)

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _last_step(folder: Path) -> int:
    """The last step a run has written a row of; 0 for none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            steps = re.findall(rb'"step": (\d+), ', file.read())
    except FileNotFoundError:
        return 0
    return int(steps[-1]) if steps else 0


def _last_json(text: str) -> dict | None:
    for line in reversed(text.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            return found if isinstance(found, dict) else None
    return None


def _result_line(run: RunPlan, result: dict, seconds: float) -> str:
    """The outcome of a run, in a line."""
    if "summary" not in result or result["status"] == DIVERGED:
        return f"{run}: diverged at step {result['step']}, a result"
    summary = result["summary"]
    names = (("validation_loss", "validation loss"), ("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"))
    figures = [f"{title} {summary[name]:.4f}" for name, title in names if summary.get(name) is not None]
    return f"{run}: {', '.join(figures)} after {result['step']} steps, {_minutes(seconds)}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
