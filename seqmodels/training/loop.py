"""A run from its first step to its last, or from where it was stopped.

The order of things is the guarantee. A step's rows and samples are written before its checkpoint; a
checkpoint is whole or absent; batches, dropout and samples are functions of the seed and the step. So a run
killed at any moment and started again ends with the parameters, bit for bit, and the rows of one left alone.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import math
import os
import shlex
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
import numpy as np

from seqmodels import config as config_lib
from seqmodels import data, object_store, processes, screen
from seqmodels.config import RunConfig
from seqmodels.data import atomic
from seqmodels.decoding import generate
from seqmodels.decoding.sampling import Sampler, Sampling
from seqmodels.errors import UserError
from seqmodels.escape import columns, escape, say
from seqmodels.evaluation import perplexity
from seqmodels.screen import phase
from seqmodels.training import (
    checkpoint,
    compile_times,
    divergence,
    history,
    loggers,
    optimizer,
    remote_folder,
    run_folder,
    sharding,
)  # fmt: skip
from seqmodels.training.divergence import Diverged
from seqmodels.training.log import Log, peak_flops_per_second
from seqmodels.training.profile import Profiler
from seqmodels.training.signals import Signals, Stopped
from seqmodels.training.state import Trainer

# A run may go on with other values of these. They change what is reported or where it runs, not the
# parameters (a mesh of another size sums in another order, and changes them by rounding).
RESUMABLE_FIELDS = (
    "train.log_every_steps", "train.eval_every_steps", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.sample_every_steps", "train.sample_prompt",
    "train.loggers", "train.profile_steps",
    "train.skip_nonfinite", "train.compilation_cache_dir", "data.cache_dir", "data.streaming",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence",
)  # fmt: skip
# And of these, if the learning rates of the steps already done stay what they were.
HORIZON_FIELDS = ("train.steps", "optim.decay_steps")

SAMPLE_TOKENS = 120

# What may stand beside the loss in a row of metrics.jsonl: of text, or of a synthetic task.
SCORES = ("perplexity", "bits_per_byte", "accuracy", "accuracy_by_segment")


# So many steps skipped one after the other (train.skip_nonfinite), and nothing is learnt any more.
MOST_SKIPPED_IN_A_ROW = 100


def train(config: RunConfig, workdir: str | os.PathLike, *, resume_learning_rate: float | None = None) -> dict:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        workdir: a folder, or gs://BUCKET/PATH or s3://BUCKET/PATH (`remote_folder`).
        resume_learning_rate: peak that the schedule has from the newest checkpoint on, lower than before; the run folder
            keeps it (optim.rate_changes), and a later start without it goes on so.

    Returns:
        The summary: step, validation_loss (nats per token, on train.eval_tokens), perplexity and bits_per_byte
        or, on a synthetic task, accuracy and accuracy_by_segment, tokens_per_second (median of the training rows),
        parameters, state_bytes (one sequence of data.seq_len), and more. Of a run that has finished before, at once.

    Raises:
        UserError: the folder holds a run of another config, the data or a checkpoint cannot be used, the disk is full.
        Diverged: a number is not finite (a UserError too); `<workdir>/divergence` then holds what shows where.
        Stopped: SIGTERM or Ctrl-C; what was trained is saved.
    """
    url = os.fspath(workdir) if object_store.is_url(workdir) else None
    workdir = Path(workdir) if url is None else remote_folder.local_folder(url, config.data.cache_dir)
    loggers.check(config.train.logger_names)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(processes.Group())
        signals = stack.enter_context(Signals(group))
        place = "--workdir" if url is None else "data.cache_dir"
        if url is not None:
            stack.enter_context(remote_folder.named(workdir, url))
        stack.enter_context(atomic.disk_errors_as_user_errors(place, workdir))

        # The folder: ours alone, and of this config. The first process decides for all.
        given = workdir
        workdir = stack.enter_context(_only_group_in(workdir, group, place=place, each_its_own=url is not None))
        is_shared = all(group.gather(workdir == given))
        group.from_first(lambda: run_folder.check_folders(workdir))

        def refresh() -> None:
            """Where this process does not see the first one's folder: get the checkpoints that it has put into the store."""
            group.barrier()
            if workdir != given:
                remote_folder.fetch_checkpoints(url, workdir)

        with signals.interrupting():
            mirror = stack.enter_context(remote_folder.mirrored(url, workdir, group))
            refresh()
        config = _agreed_config(config, workdir, group)

        # What can be wrong is found before the data are read, which takes long.
        with phase("building the model"):
            if not checkpoint.steps(workdir / "checkpoints"):
                run_folder.check_initial_params(config)
            data_vocab_size = run_folder.expected_vocab_size(config)
            trainer = Trainer(config, data_vocab_size)
            trainer.check_memory()

        # The data. What the first process has put into data.cache_dir the others find there.
        begun_with = group.from_first(lambda: data.read_record(workdir))
        with signals.interrupting(), group.first_goes_ahead():
            dataset = data.prepare(config.data, seed=config.seed, begun_with=begun_with)
        if dataset.vocab_size != data_vocab_size:
            trainer = Trainer(config, dataset.vocab_size)

        # The state, restored or new. The folder is written only now that all a person named has proved good.
        start = _start(config, dataset, trainer, workdir, group)
        if start.record:  # of a run that goes on
            dataset = dataset.with_order(start.record.get("order"))
        if resume_learning_rate is not None:
            config = _with_lower_rate(config, resume_learning_rate, start.step)
            trainer = Trainer(config, dataset.vocab_size)
        if group.is_first:
            config_lib.save(config, workdir / "config.json")

        # The run.
        lowered = _report_startup(config, dataset, trainer, start.step, workdir, group)
        log = _open_log(config, trainer, start, workdir, group)
        stack.callback(log.close)
        if mirror is not None:
            mirror.publish()
        writer = checkpoint.Writer(
            workdir / "checkpoints", keep=config.train.keep_checkpoints, published=mirror and mirror.publish,
            by_first=not is_shared,
        )  # fmt: skip
        stack.push(functools.partial(_close, writer, group))
        if trainer.mesh.size > 1:
            log.line(sharding.describe(trainer.abstract_state()["params"], trainer.mesh))
        if start.step:
            log.line(f"resuming {workdir} after step {start.step} of {config.train.steps}")
        run = _Run(config, dataset, trainer, log, writer, signals, start, lowered)
        if (problem := run.profiler.problem(start.step, config.train.steps)) is not None:
            log.line(problem)
        signals.running()
        stack.callback(run.profiler.close)
        try:
            run.run()
        except Diverged as diverged:
            del run.state  # the device may not hold it twice
            divergence.record(
                workdir, config, dataset, trainer, diverged, initial=start.initial,
                report=log.line, writer=writer, refresh=refresh, signals=signals, group=group,
            )  # fmt: skip
            raise
        writer.wait()
        if start.step < config.train.steps:
            log.final({name: value for name, value in log.evaluation(config.train.steps).items() if name != "step"})
        return group.from_first(lambda: _summary(config, dataset, trainer, log, run.skipped))


class _Start(NamedTuple):
    """Where a run begins, or goes on."""

    step: int
    state: dict
    seconds: float  # trained so far
    record: dict  # that was saved with the state; empty for a new run
    initial: tuple[int, str] | None = None  # of another run's parameters that it began with: their step and fingerprint


def _start(config: RunConfig, dataset, trainer: Trainer, workdir: Path, group: processes.Group) -> _Start:
    """The newest checkpoint's state, or the first one, for which the folder gets what belongs to the data.

    Raises:
        UserError: a checkpoint cannot be read, or was trained on other data.
    """
    restored = checkpoint.restore(
        workdir / "checkpoints", trainer.abstract_state(), report=say, set_aside=True, group=group,
        check=functools.partial(_check_record, config, dataset, workdir),
    )  # fmt: skip
    if restored is None:
        return _begin(config, dataset, trainer, workdir, group)
    if group.is_first:
        for line in dataset.mend(workdir):
            say(line)
    return _Start(restored.step, restored.state, restored.record["seconds"], restored.record)


def _check_record(config: RunConfig, dataset, workdir: Path, record: Mapping) -> None:
    """Raises UserError where the data or the model are not those of a checkpoint with this record, ValueError where training wrote no
    such record; ahead of the parameters, whose shapes follow the tokenizer."""
    if "data" not in record or "seconds" not in record:
        raise ValueError("its record is damaged: not one that training writes")
    begun, cure = f"what the run in {workdir} was begun with", "bring that back, or choose another --workdir"
    other = config_lib.other_options(record.get("model"), config)
    if other:
        raise UserError(
            f"the model of {workdir / 'config.json'} is not {begun} ({', '.join(other[:5])}): it was replaced; {cure}"
        )
    tokenizer = record.get("tokenizer")
    if config.data.tokenizer not in ("bpe", "bytes") and tokenizer not in (None, tokenizer_digest(dataset)):
        raise UserError(f"data.tokenizer={config.data.tokenizer} is not {begun}; {cure}")
    changed = {
        name for name, digest in dataset.digests.items() if data.is_another((record.get("digests") or {}).get(name), digest)
    }
    if record["data"] != dataset.fingerprint or "train" in changed:
        older = dataset.tokenizer is not None and not (workdir / data.RECORD_NAME).exists()
        also = " (or is text without <|endoftext|>, of which older runs held out other parts)" if older else ""
        raise UserError(f"{dataset.name} is not {begun}{also}; {cure}")
    if changed:
        of = f"data.validation_source={config.data.validation_source}" if config.data.validation_source else dataset.name
        raise UserError(f"the validation text of {of} is not {begun}, and losses would not compare; {cure}")


def tokenizer_digest(dataset) -> str | None:
    """A short name for the tokenizer of the data; None where they have none."""
    return None if dataset.tokenizer is None else data.tokenizer_digest(dataset.tokenizer)


def _begin(config: RunConfig, dataset, trainer: Trainer, workdir: Path, group: processes.Group) -> _Start:
    with phase("drawing the first parameters"):
        state = trainer.init()
    initial = None
    if config.train.init_from is not None:
        abstract_params = trainer.abstract_state()["params"]
        found = run_folder.initial_params(config, dataset.tokenizer, abstract_params, say, group=group)
        state["params"], initial = found.state["params"], (found.step, found.fingerprint)
    if group.is_first:
        dataset.save(workdir)
    return _Start(0, state, 0.0, {}, initial)


def _report_startup(
    config: RunConfig, dataset, trainer: Trainer, step: int, workdir: Path, group: processes.Group
) -> jax.stages.Lowered | None:
    """The lines that a run begins with, and their record in the folder; returns the training step, to be compiled.

    Nothing and None where nothing is left to train.
    """
    if step >= config.train.steps:
        return None
    with phase("tracing the training step"):
        lowered, forms = trainer.lower(functools.partial(dataset.train_batch, step))
    if group.is_first:
        about = history.entry(config, dataset, trainer, step, forms)
        history.append(about, workdir)
        for line in history.lines(about, workdir, config.train.steps, columns(sys.stderr)):
            say(line)
        if config.optim.warmup_steps > config.train.steps:
            say(
                f"optim.warmup_steps={config.optim.warmup_steps} is more than train.steps={config.train.steps}: the learning rate "
                f"ends at {config.train.steps / config.optim.warmup_steps:.2g} of its peak"
            )
    return lowered


def _open_log(config: RunConfig, trainer: Trainer, start: _Start, workdir: Path, group: processes.Group) -> Log:
    peak = peak_flops_per_second(trainer.mesh.devices.flatten())
    return Log(
        workdir, step=start.step, total_steps=config.train.steps,
        tokens_per_step=config.data.batch_size * config.data.seq_len,
        flops_per_token=None if peak is None else trainer.flops_per_token, flops_per_second=peak, seconds=start.seconds,
        written=start.record.get("log"), group=group,
        names=config.train.logger_names, hyperparameters=config_lib.flatten(config_lib.to_dict(config)),
    )  # fmt: skip


CLOSE_SECONDS = 10.0


def _close(writer: checkpoint.Writer, group: processes.Group, kind, error: BaseException | None, traceback) -> None:
    """Close the writer; of several processes one that failed waits no longer than this for the others' parts of a checkpoint."""
    if group.count == 1 or error is None or isinstance(error, Stopped):
        writer.close()
        return
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)


def _summary(config: RunConfig, dataset, trainer: Trainer, log: Log, skipped: int) -> dict:
    """What `train` returns of a run that has ended."""
    evaluation = log.evaluation(config.train.steps)
    speeds = [row["tokens_per_second"] for row in log.rows if row["split"] == "train"]
    return {
        "step": config.train.steps,
        "validation_loss": evaluation["loss"],
        **{name: evaluation[name] for name in SCORES if name in evaluation},
        "tokens_per_second": statistics.median_high(speeds) if speeds else None,
        "parameters": trainer.num_parameters,
        "state_bytes": perplexity.state_bytes(trainer.graphdef, trainer.abstract_state()["params"], config.data.seq_len),
        "state_max_len": config.data.seq_len,
        **({"task": config.data.task} if dataset.tokenizer is None else {"tokenizer": dataset.tokenizer.name}),
        "train_tokens": evaluation["tokens"],
        "train_seconds": evaluation["seconds"],
        **({"skipped_steps": skipped} if config.train.skip_nonfinite else {}),
    }


class _Run:
    """The loop, and what it carries: `state` after `step` steps, and the metrics still on the device."""

    def __init__(self, config, dataset, trainer, log, writer, signals, start: _Start, lowered: jax.stages.Lowered | None):
        self.config, self.dataset, self.trainer = config, dataset, trainer
        self.log, self.writer, self.signals = log, writer, signals
        self.step, self.state = start.step, start.state
        self.lowered = lowered
        self.data_fingerprint = dataset.fingerprint
        self.tokenizer_digest = tokenizer_digest(dataset)
        self.saved_step = start.step
        self.in_flight = None
        self.skipped, self.skipped_in_a_row = start.record["skipped"] if "skipped" in start.record else (0, 0)
        self.profiler = Profiler(config.train.profiled, log.folder / "tensorboard")

    def run(self) -> None:
        try:
            self.run_hooks()  # what a kill left undone, after the checkpoint of its step
            self.compile()
            while self.step < self.config.train.steps:
                self.train_one_step()
                self.signals.check()
                self.run_hooks()
        except Stopped:
            self.read_pending_metrics()
            self.save()
            self.writer.wait()
            raise

    def compile(self) -> None:
        """Make the program that every step runs, if a step is left."""
        lowered, self.lowered = self.lowered, None
        if lowered is None:
            return
        of, kept = compile_times.program(lowered), compile_times.folder()
        expected = compile_times.expected(of, kept)
        with self.log.doing("compiling the training step", *expected), compile_times.measured(of, kept) as took:
            lowered.compile()
        if took.seconds > screen.PATIENCE:
            self.log.line(str(took))
        self.log.stopwatch.resume()

    def train_one_step(self) -> None:
        batch = self.trainer.put_rows(functools.partial(self.dataset.train_batch, self.step))
        self.profiler.before(self.step)
        self.state, metrics = self.trainer.train_step(self.state, batch)
        self.step += 1
        # Only the metrics of the step before are waited for, so that the device always has a step to work on.
        self.read_pending_metrics()
        self.in_flight = self.step, metrics
        self.profiler.after(self.step, self.read_pending_metrics)

    def read_pending_metrics(self) -> None:
        """Read the metrics in flight, and stop if they are not finite: that state must not be saved."""
        if self.in_flight is None:
            return
        step, metrics = self.in_flight
        self.in_flight = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.log.stopwatch.step()
        self.log.progress(step)
        counts = {}
        if "skipped" in metrics:
            skipped = int(metrics.pop("skipped"))
            self.skipped += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            counts = {"skipped_steps": self.skipped}
            if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise self.diverged(step, f"{self.skipped_in_a_row} steps one after the other were skipped")
        elif not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
            raise self.diverged(step, f"the loss is {metrics['loss']:.4g}, the gradient norm {metrics['gradient_norm']:.4g}")
        if step % self.config.train.log_every_steps == 0 or step == self.config.train.steps:
            if "accuracy" in metrics:
                scores = {"accuracy": metrics.pop("accuracy")}
            else:
                scores = perplexity.text_scores(metrics["loss"], self.dataset.train_bytes_per_token)
            self.log.train(step, scores=scores, **metrics, **counts)

    def diverged(self, step: int, what: str, *, evaluating: bool = False) -> Diverged:
        """The error that ends the run."""
        rate = self.config.optim.learning_rate * optimizer.rate_factor(self.config.optim, step)
        return Diverged(step, what, saved_step=self.saved_step, learning_rate=rate, evaluating=evaluating)

    def run_hooks(self) -> None:
        """Evaluate, sample and save, in this order, as far as it is due and not done."""
        every = self.config.train
        evaluation = self.is_due(every.eval_every_steps) and self.log.evaluation(self.step) is None
        sample = self.is_due(every.sample_every_steps) and not self.log.has_sample(self.step)
        save = self.is_due(every.checkpoint_every_steps) and self.step != self.saved_step
        if not (evaluation or sample or save):
            return
        self.read_pending_metrics()
        if evaluation:
            self.evaluate()
        if sample:
            self.sample()
        if save:
            self.save()
        self.log.stopwatch.resume()

    def is_due(self, every_steps: int) -> bool:
        """After every so many steps and after the last one; never, for 0."""
        at_the_end = self.step == self.config.train.steps
        return self.step > 0 and every_steps > 0 and (self.step % every_steps == 0 or at_the_end)

    def evaluate(self) -> None:
        with self.signals.interrupting(), self.log.doing("evaluating"):
            result = self.trainer.evaluate(
                self.state["params"], self.dataset.validation, max_tokens=self.config.train.eval_tokens,
                progress=lambda done: self.signals.check(),
            )  # fmt: skip
        if not math.isfinite(result.loss):
            raise self.diverged(self.step, f"the validation loss is {result.loss:.4g}", evaluating=True)
        self.log.validation(self.step, loss=result.loss, scores=result.scores, tokens_per_second=result.tokens_per_second)

    def sample(self) -> None:
        tokenizer = self.dataset.tokenizer
        wanted = self.config.train.sample_prompt
        prompt = data.prompt_tokens(tokenizer, self.dataset.prompt if wanted is None else wanted)
        key = jax.random.fold_in(jax.random.key(self.config.seed), self.step)
        sampler = Sampler(Sampling(), key, tokenizer.ends, data.token_mask(tokenizer, self.trainer.vocab_size))
        with self.signals.interrupting(), self.log.doing("drawing a sample"):
            [tokens] = generate.generate(self.trainer.graphdef, self.state["params"], [prompt], sampler, max_tokens=SAMPLE_TOKENS)
        text = tokenizer.decode([*prompt, *tokens])
        # A model that has not learnt much writes control characters, which a terminal would obey.
        self.log.sample(self.step, escape(text, "terminal"))

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless it has one."""
        if self.step == self.saved_step:
            return
        self.log.sync()
        record = {
            "seed": self.config.seed,
            "data": self.data_fingerprint,
            "digests": dict(self.dataset.digests),
            "order": self.dataset.order,
            "tokenizer": self.tokenizer_digest,
            "model": config_lib.model_record(self.config),
            "seconds": self.log.stopwatch.seconds,
            "log": self.log.written(),
            **({"skipped": [self.skipped, self.skipped_in_a_row]} if self.config.train.skip_nonfinite else {}),
        }
        evaluation = self.log.evaluation(self.step)
        loss = None if evaluation is None else evaluation["loss"]
        try:
            self.writer.save(self.step, self.state, record, validation_loss=loss)
        except checkpoint.NonFinite as error:
            more = f" and {len(error.names) - 3} more" if len(error.names) > 3 else ""
            what = f"not all numbers are finite in {', '.join(error.names[:3])}{more}"
            raise self.diverged(self.step, what) from None
        self.saved_step = self.step


def _with_lower_rate(config: RunConfig, peak: float, step: int) -> RunConfig:
    """The config with another peak of the learning rate from `step` on.

    Raises:
        UserError: the peak is not lower than it is there.
    """
    now = config.optim.learning_rate * optimizer.rate_factor(config.optim, step)
    if math.isclose(peak, now, rel_tol=1e-6):  # the same command again, after a stop
        return config
    if not 0.0 < peak < now:
        raise UserError(f"--resume_learning_rate={peak:g} must be positive and below {now:g}, the rate after step {step}")
    changes = (*config.optim.rate_changes, (step, peak / now))
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, rate_changes=changes))


def _check_config(config: RunConfig, workdir: Path) -> RunConfig:
    """The config with the changes of rate that the folder has; it is new, or holds a run that may go on with this config.

    Raises:
        UserError: it is neither.
    """
    path, saved_steps = workdir / "config.json", checkpoint.steps(workdir / "checkpoints")
    if not path.exists():
        if saved_steps:
            raise UserError(f"{workdir} has checkpoints but no config.json; choose another --workdir")
        return config
    old = config_lib.load(path)
    if not config.optim.rate_changes:
        optim = dataclasses.replace(config.optim, rate_changes=old.optim.rate_changes)
        config = dataclasses.replace(config, optim=optim)
    changes = {
        name: f"{name} {before!r} -> {after!r}"
        for name, (before, after) in config_lib.differences(old, config).items()
        if name not in RESUMABLE_FIELDS
    }
    if any(name not in HORIZON_FIELDS for name in changes):
        own = config_lib.flatten(config_lib.to_dict(old))
        # What the run has not are options of layers, or of a task, that it has not: the pattern or the task tells of them.
        fixed = [name for name in changes if name not in HORIZON_FIELDS and name in own]
        more = f" and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        flags = shlex.join(f"--config.{name}={own[name]}" for name in fixed)
        go_on = "" if more else f", or go on as it was, with {flags}"  # a default may have changed
        raise UserError(
            f"{workdir} holds a run of another config: {', '.join(changes[name] for name in fixed[:5])}{more}; "
            f"choose another --workdir to begin anew{go_on}"
        )
    if not changes:
        return config
    done = max(saved_steps, default=0)
    if config.train.steps < done:
        raise UserError(f"train.steps={config.train.steps} is less than the {done} steps done in {workdir}")
    steps_done = np.arange(done)
    before = optimizer.learning_rate_schedule(old.optim, old.train.steps)(steps_done)
    after = optimizer.learning_rate_schedule(config.optim, config.train.steps)(steps_done)
    if not np.array_equal(before, after):
        raise UserError(
            f"{' and '.join(changes.values())} would change the learning rates of the {done} steps done in "
            f"{workdir} (optim.schedule={config.optim.schedule}): choose another --workdir, or keep the old "
            f"decay with --config.optim.decay_steps={old.optim.decay_steps or old.train.steps}"
        )
    say(f"{' and '.join(changes.values())}: the run goes on to step {config.train.steps}")
    return config


def _agreed_config(config: RunConfig, workdir: Path, group: processes.Group) -> RunConfig:
    """The config of all processes: that of the first, with what its folder has of it, and this process's own caches.

    Raises:
        UserError: the folder does not allow it, or a process was started with another config.
    """
    agreed, asked = group.from_first(lambda: [config_lib.to_dict(each) for each in (_check_config(config, workdir), config)])
    caches = {"cache_dir": config.data.cache_dir, "compilation_cache_dir": config.train.compilation_cache_dir}
    agreed, asked = (config_lib.with_caches(config_lib.from_config_dict(values), **caches) for values in (agreed, asked))
    other = config_lib.differences(asked, config)
    if other:
        changes = ", ".join(f"{name} {theirs!r} there, {ours!r} here" for name, (theirs, ours) in list(other.items())[:5])
        raise UserError(f"process {group.index} was started with another config than process 0: {changes}")
    return agreed


SHARED_SECONDS = 30.0  # that another machine may take to see a file
APART_SECONDS = 5.0  # where it need not


@contextlib.contextmanager
def _only_group_in(workdir: Path, group: processes.Group, *, place: str, each_its_own: bool) -> Iterator[Path]:
    """`only_process_in` for several processes: the first holds the lock.

    Args:
        each_its_own: a process that does not see the first one's folder has one of its own instead.

    Yields:
        The folder of this process.

    Raises:
        UserError: a process that is not of the group holds it, or one of the group does not see the first one's folder.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> str:
            stack.enter_context(run_folder.created(workdir))
            if (workdir / "results.json").exists() and not (workdir / "config.json").exists():
                raise UserError(f"{workdir} holds a comparison, whose runs lie in folders of their own: choose another --workdir")
            run_folder.check_replaces_nothing(workdir, config_lib.RUN_FILES, marks=["config.json"])
            file = stack.enter_context(only_process_in(workdir))
            token = uuid.uuid4().hex
            file.write(token)
            file.flush()
            return token

        token = group.from_first(lock)
        deadline = time.monotonic() + (APART_SECONDS if each_its_own else SHARED_SECONDS)
        while not group.is_first and not _holds(workdir / run_folder.LOCK_NAME, token):
            if time.monotonic() > deadline and each_its_own:
                # Of its own even where another process of this machine does not see the first one's either.
                workdir = workdir.parent / f"process_{group.index}" / workdir.name
                stack.enter_context(run_folder.created(workdir))
                stack.enter_context(only_process_in(workdir))
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {group.index} does not see {place}={workdir} of process 0: all processes need one folder, on a file "
                    "system that their machines share"
                )
            time.sleep(0.1)
        yield workdir


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


@contextlib.contextmanager
def only_process_in(workdir: Path) -> Iterator[TextIO]:
    """Hold the folder's lock, a file. It ends with the process, however that ends, and no child inherits it.

    Raises:
        UserError: another process holds it.
    """
    with open(workdir / run_folder.LOCK_NAME, "a+", opener=atomic.open_own) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # On a file system without locks other processes are not detected.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"another process is training in {workdir}; use another --workdir") from error
        file.truncate(0)
        yield file
