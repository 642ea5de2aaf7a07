"""What a run that diverged leaves behind, and how to find in it the first number that was not finite.

`<workdir>/divergence` holds the batch at which it happened, the train state before it, the config and the versions:

    about.json    step, what was not finite, versions; whether `state` is the state before the step
    config.json   of the run
    batch.npz     the batch of the step, or of the validation
    state/        a checkpoint of the train state before the step

It may be moved, or sent to somebody, without the rest of the run folder.

The state is made again: training steps are functions of the state and the step's number, so the steps since the newest
checkpoint give, bit for bit, what the run had. If they do not, that is said: then the machine is at fault, or the run was
not deterministic. scripts/replay.py reads the folder.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import config as config_lib
from seqmodels import model, packages, processes
from seqmodels.config import MeshConfig, RunConfig
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.formats import json_text, npz
from seqmodels.ops import IMPLEMENTATIONS
from seqmodels.pattern import parse_pattern
from seqmodels.training import checkpoint, run_folder
from seqmodels.training.first_nonfinite import ABSURD, LOOP, Finding, first_finding
from seqmodels.training.state import Trainer

FOLDER = "divergence"
OUTSIDE_LAYERS = {  # by the named scope
    "embedding": "the embedding", "read_out": "what reads the last layer (the final norm)", "loss": "the head and the loss",
    "optimizer": "the optimizer",
}  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_collections")


class Diverged(UserError):
    """A number was not finite after `step` steps: the loss, the gradient, a parameter or the validation loss."""

    def __init__(self, step: int, what: str, *, saved_step: int, learning_rate: float, evaluating: bool = False):
        kept = f"step {saved_step} is saved" if saved_step else "nothing is saved yet"
        cure = (
            f"go on from there with a lower rate, --resume_learning_rate={learning_rate / 2:.3g}, or begin anew in another "
            "--workdir"
            if saved_step
            else "begin anew in another --workdir, with a lower optim.learning_rate"
        )
        super().__init__(f"step {step}: {what}; stopped ({kept}); {cure}")
        self.step, self.what, self.evaluating = step, what, evaluating


def record(
    workdir: Path, config: RunConfig, dataset, trainer: Trainer, diverged: Diverged, *, initial: tuple[int, str] | None,
    report: Callable[[str], None], writer: checkpoint.Writer, refresh: Callable[[], None], signals, group: processes.Group,
) -> None:  # fmt: skip
    """Write `<workdir>/divergence` for a run that diverged; an older one is replaced.

    Whatever goes wrong is reported, and takes nothing from the error that ended the run.

    Args:
      initial: of a run that began with another's parameters: their step there, and their fingerprint.
      writer: of the run's checkpoints, which are waited for.
      refresh: called then, before they are read.
      signals: a `Signals`; a signal ends the replaying.
      group: the processes of the run: all make the steps again, the first writes.
    """
    folder, step, evaluating = workdir / FOLDER, diverged.step, diverged.evaluating
    try:
        writer.wait()
        refresh()
        if group.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            config_lib.save(config, folder / "config.json")
        about = {
            "step": step, "what": diverged.what, "evaluating": evaluating, "versions": versions(), "state_step": None,
            "data_vocab_size": dataset.vocab_size,
        }  # fmt: skip
        if group.is_first:
            if not evaluating:
                _save_batch(folder, dataset.train_batch(step - 1))
            _save_about(folder, about)
        with signals.interrupting():
            found = _state_before(workdir, config, dataset, trainer, step, evaluating, initial, report, group)
            if found is None:
                report(
                    f"the steps up to {step}, made again from the newest checkpoint, are finite: the run was not "
                    "deterministic, or the machine computed wrongly"
                )
                return
            state, state_step, batch = found
            if group.is_first:
                _save_batch(folder, batch)
            saving = checkpoint.Writer(folder / "state", keep=1, by_first=writer.by_first)
            saving.save(state_step, state, {}, validation_loss=None)
            saving.close()
        if not group.is_first:
            return
        _save_about(folder, about | {"state_step": state_step, "step": state_step if evaluating else state_step + 1})
        command = packages.as_typed(f"python scripts/replay.py --workdir={workdir}")
        report(f"what happened is recorded in {folder}; {command} finds the operation")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        report(f"the divergence could not be recorded in {folder}: {type(error).__name__}: {reason}")
    finally:
        group.barrier()


def versions() -> dict[str, str]:
    """Of Python, the packages that compute, and the device."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def _state_before(
    workdir, config, dataset, trainer, step, evaluating, initial, report, group
) -> tuple[dict, int, Mapping] | None:
    """The state before the step at which a number is not finite, how many steps it has done, and the step's batch."""
    restored = checkpoint.restore(workdir / "checkpoints", trainer.abstract_state(), report=report, group=group)
    done, state = (0, None) if restored is None else (restored.step, restored.state)
    if state is None:
        state = trainer.init()
        if config.train.init_from is not None:
            state["params"] = _first_params(config, dataset, trainer, initial, report, group)
    if done < step:
        report(f"making the {step - done} steps since step {done} again, to record the state before it went wrong")
    for number in range(done, step):
        batch = dataset.train_batch(number)
        before = jax.tree.map(jnp.copy, state)
        state, metrics = trainer.train_step(state, trainer.put(batch))
        if not _is_finite(metrics["loss"], metrics["gradient_norm"]) or _not_finite(state):
            return before, number, batch
        del before
    if evaluating:
        data = config.data
        rows = trainer.batch_size_for(data.seq_len)
        for batch in dataset.validation.batches(rows, data.seq_len, config.train.eval_tokens):
            sums = trainer.eval_step(state["params"], trainer.put(batch))
            if not bool(jnp.isfinite(sums["loss"]).all()):
                return state, step, batch
    return None


def _first_params(config, dataset, trainer, initial, report, group) -> dict:
    """The parameters that a run of ``train.init_from`` began with.

    Raises:
        UserError: they are not there any more.
    """
    if initial is None:
        raise UserError(f"no checkpoint of the run is there, and its first parameters were those of {config.train.init_from}")
    step, fingerprint = initial
    found = run_folder.initial_params(
        config, dataset.tokenizer, trainer.abstract_state()["params"], report, step=step, group=group
    )
    if found.fingerprint != fingerprint:
        raise UserError(f"train.init_from={config.train.init_from} has other parameters at step {step} than the run began with")
    return found.state["params"]


def _is_finite(loss, gradient_norm) -> bool:
    return math.isfinite(float(loss)) and math.isfinite(float(gradient_norm))


def _not_finite(state) -> tuple[str, ...]:
    """The arrays that hold a number that is not finite, by path."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return tuple(path for path, is_finite in zip(paths, jax.device_get(_finite(state)), strict=True) if not is_finite)


@jax.jit
def _finite(state):
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]


def _save_batch(folder: Path, batch: Mapping[str, np.ndarray]) -> None:
    atomic.write_whole(folder / "batch.npz", lambda file: np.savez(file, **batch))


def _save_about(folder: Path, about: Mapping) -> None:
    atomic.write_whole(folder / "about.json", lambda file: file.write(json.dumps(about, indent=2).encode()))


# -- Reading it again ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A folder that `record` wrote."""

    folder: Path
    about: dict
    config: RunConfig
    batch: dict[str, np.ndarray]
    data_vocab_size: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The recorded step, made again in one form."""

    form: str  # of the mixers' ops: "as configured", or an implementation
    compute_dtype: str
    loss: float
    gradient_norm: float
    finite: bool  # these, and what the step makes of the state
    wrong: tuple[str, ...] = ()  # arrays of the state after the step that are not finite
    missing: str | None = None  # why the form could not be had


def load(workdir: str | Path, report: Callable[[str], None] = lambda line: None) -> Recorded:
    """The record in a run folder, or the folder of a record itself.

    Args:
      report: called with one line where about.json is of another step than the state.

    Raises:
      UserError: there is none, or it is not complete.
    """
    workdir = atomic.expanded(workdir)
    is_record = not (workdir / FOLDER).exists() and (workdir / "about.json").is_file()
    folder = workdir if is_record else workdir / FOLDER
    if not (folder / "about.json").is_file():
        raise UserError(f"{workdir} has no {FOLDER}/about.json: no run has diverged there since such records are made")
    try:
        about = json_text.read(folder / "about.json")
        config = config_lib.load(folder / "config.json")
        batch = npz.read(folder / "batch.npz")
        _check(about, batch)
        if about["state_step"] is None:
            raise UserError(f"{folder} holds no train state: train.py said why when it recorded the divergence")
        about = _of_the_state(about, folder, report)
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if "data_vocab_size" in about:
        data_vocab_size = about["data_vocab_size"]
    else:  # of a record that was made before it said so
        data_vocab_size = run_folder.known_vocab_size(config, run_folder.read_tokenizer(folder.parent, config))
    vocab_size = model.vocabulary_size(config.model, data_vocab_size)
    for name in ("inputs", "targets"):
        least, most = batch[name].min(), batch[name].max()
        if not 0 <= least <= most < vocab_size:
            raise UserError(
                f"{folder / 'batch.npz'} has {name} from {least} to {most}, and the model {vocab_size} tokens: it is damaged"
            )
    return Recorded(folder, about, config, batch, data_vocab_size)


def _check(about: Any, batch: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where these are not what `record` writes: the folder may be untrusted."""
    kinds = {"step": int, "what": str, "evaluating": bool, "versions": dict, "state_step": int | None}
    whole = isinstance(about, dict) and all(name in about and isinstance(about[name], kind) for name, kind in kinds.items())
    numbers = [about["step"], about["state_step"], about.get("data_vocab_size")] if whole else []
    if not whole or not all(number is None or (type(number) is int and 0 <= number < 1 << 31) for number in numbers):
        raise ValueError(f"about.json has not just {', '.join(kinds)} as they were written")
    numbers = {"inputs": "iu", "targets": "iu", "weights": "f", "bytes": "f", "reset": "b"}
    if not {"inputs", "targets"} <= batch.keys() <= numbers.keys():
        raise ValueError("batch.npz has other arrays than a batch")
    if about["evaluating"] and "weights" not in batch:
        raise ValueError("batch.npz lacks the weights of an evaluation")
    shape = batch["inputs"].shape
    if (
        len(shape) != 2
        or 0 in shape
        or any(array.shape != shape or array.dtype.kind not in numbers[name] for name, array in batch.items())
    ):
        raise ValueError("the arrays of batch.npz have other shapes or types than a batch's")


def _of_the_state(about: dict, folder: Path, report: Callable[[str], None]) -> dict:
    """The same with the steps of the state that is there, whose checkpoint has digests, as about.json has not."""
    saved = checkpoint.steps(folder / "state")
    if not saved:
        raise UserError(f"{folder / 'state'} holds no whole checkpoint")
    done = saved[-1]
    steps = {"state_step": done, "step": done if about["evaluating"] else done + 1}
    if steps != {name: about[name] for name in steps}:
        report(
            f"{folder / 'about.json'} says step {about['step']} and a state after {about['state_step']} steps, and the state is after "
            f"{done}: it was edited, or is damaged; step {steps['step']} is made again"
        )
    return about | steps


def absurd_arrays(recorded: Recorded) -> dict[str, float]:
    """The arrays of the recorded state that hold absurd numbers, by path, with the largest: the step began with them."""
    _, state, _ = _open(recorded, recorded.config, lambda line: None)
    largest = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    return {name: value for name, value in largest.items() if value > ABSURD}


def find(recorded: Recorded, report: Callable[[str], None] = lambda line: None) -> Finding | None:
    """The first operation of the recorded step whose result is not finite or absurd, on one device."""
    trainer, state, batch = _open(recorded, recorded.config, report)
    return first_finding(_step(trainer, recorded), (state, batch), (_healthy(trainer, state), batch))


def compare(
    recorded: Recorded,
    forms: Sequence[str | None] = (None, *IMPLEMENTATIONS),
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Outcome]:
    """The recorded step in several forms of the mixers' ops (None: as configured), in the run's dtype and in float32."""
    used = recorded.config.model.compute_dtype
    for compute_dtype in dict.fromkeys((used, "float32")):
        for form in forms:
            config = _in_form(recorded.config, form, compute_dtype)
            name = "as configured" if form is None else form
            try:
                trainer, state, batch = _open(recorded, config, report)
                state, loss, norm = jax.jit(_step(trainer, recorded))(state, batch)
            except (NotImplementedError, ValueError) as error:
                yield Outcome(name, compute_dtype, math.nan, math.nan, False, missing=" ".join(str(error).split())[:120])
                continue
            wrong = _not_finite(state)
            yield Outcome(name, compute_dtype, float(loss), float(norm), _is_finite(loss, norm) and not wrong, wrong)


def layer_of(finding: Finding, config: RunConfig) -> str:
    """The layer that an operation belongs to, in words."""
    words, loops = parse_pattern(config.model.pattern), iter(finding.loops)
    repeat = 0  # the iteration of the innermost loop around the layers: there may be one over micro-batches around that
    for scope in finding.scope.replace("(", "/").replace(")", "/").split("/"):
        position, _, word = scope.partition("_")
        if scope == LOOP:
            repeat = next(loops)
        elif position.isdecimal() and int(position) < len(words) and word:
            return f"layer {repeat * len(words) + int(position)} ({word}, repeat {repeat}, position {position} of the pattern)"
        elif scope in OUTSIDE_LAYERS:
            return OUTSIDE_LAYERS[scope]
    return "outside the layers"


def _open(recorded: Recorded, config: RunConfig, report) -> tuple[Trainer, dict, dict]:
    one_device = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=1, tensor=1, sequence=1))
    trainer = Trainer(one_device, recorded.data_vocab_size, devices=jax.devices()[:1])
    step = recorded.about["state_step"]
    restored = checkpoint.restore(recorded.folder / "state", trainer.abstract_state(), step=step, report=report)
    return trainer, restored.state, trainer.put(recorded.batch)


def _step(trainer: Trainer, recorded: Recorded) -> Callable[[dict, dict], tuple[Any, Any, Any]]:
    """The recorded training step (of an evaluation, its loss) as a function of state and batch: state, loss, norm."""

    def training(state, batch):
        state, metrics = trainer.untraced_train_step(state, batch)
        return {name: state[name] for name in ("params", "optimizer")}, metrics["loss"], metrics["gradient_norm"]

    def evaluation(state, batch):
        sums = trainer.eval_step(state["params"], batch)
        return {}, sums["loss"].sum() / jnp.maximum(sums["weight"].sum(), 1.0), jnp.zeros(())

    return evaluation if recorded.about["evaluating"] else training


def _healthy(trainer: Trainer, state: dict) -> dict:
    """Another state of the same shapes: fresh parameters."""
    return trainer.init() | {"step": state["step"]}


def _in_form(config: RunConfig, form: str | None, compute_dtype: str) -> RunConfig:
    options = config.model.mixers
    if form is not None:
        options = tuple((name, dataclasses.replace(each, implementation=form)) for name, each in options)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mixers=options, compute_dtype=compute_dtype))
