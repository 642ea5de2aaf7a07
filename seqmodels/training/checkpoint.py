"""Checkpoints of a run: atomic, written in the background, verified when they are read.

A step's folder holds two items: `state`, the train state (a dict of arrays, among them the step, which is
also the position in the data), and `record`, a JSON object with what a resumed run must agree on (seed, data
fingerprint) and one checksum per array. Orbax writes a step under a temporary name and renames it when it is
complete and on the disk, so a killed process, or a power cut, leaves a whole step or none. It does not notice a byte
that flipped on the disk; the checksums do.
"""

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from seqmodels.data import atomic
from seqmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: the step, its arrays, and the record saved with them."""

    step: int
    state: dict
    record: dict
    fingerprint: str  # of the arrays in `state`: equal for equal values


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that were saved in a folder and are still there, ascending."""
    if not os.path.isdir(directory):
        return []
    return sorted(int(entry.name) for entry in Path(directory).iterdir() if entry.name.isdigit())


def restore(
    directory: str | os.PathLike,
    abstract_state: dict,
    *,
    step: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    set_aside: bool = False,
) -> Restored | None:
    """Read the newest whole checkpoint, or the one of `step`; None when no step was ever saved completely.

    A checkpoint that cannot be read, or whose arrays differ from their checksums, is reported and the one
    before it is taken.

    Args:
        directory: the folder of checkpoints.
        abstract_state: `jax.ShapeDtypeStruct`s with shardings: the whole train state, or a part of it
            (evaluation reads only `{"params": ...}`). The number of devices may differ from the saving run's.
        step: take exactly this step, or fail.
        report: called with one line for each thing a person should know.
        set_aside: move damaged checkpoints newer than the one taken to `<directory>_broken`, so that
            training can write these steps again. Otherwise nothing on the disk is touched.

    Raises:
        UserError: `step` does not exist; or there are checkpoints, but none can be restored.
    """
    directory = Path(directory).absolute()
    saved = steps(directory)
    if step is not None and step not in saved:
        raise UserError(f"no checkpoint of step {step} in {directory}; there are {saved or 'none'}")
    damaged = []
    with _quiet_failures():
        for candidate in [step] if step is not None else reversed(saved):
            try:
                restored = _restore_step(directory / str(candidate), abstract_state)
            except Exception as error:  # Orbax raises a bare Exception for a truncated file
                reason = " ".join(str(error).split()).partition(". See full TensorStore details")[0][:200]
                report(f"checkpoint {directory / str(candidate)} cannot be restored: {reason}")
                damaged.append(candidate)
                continue
            if damaged:
                report(f"using the checkpoint of step {candidate} instead")
            if set_aside:
                _set_aside(directory, damaged)
            return restored
    if damaged:
        raise UserError(
            f"none of the checkpoints {damaged} in {directory} can be restored; to begin anew, choose "
            "another --workdir or delete this one"
        )
    return None


class _SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step's folder under its temporary name, whose files reach the disk before the folder gets its own."""

    async def finalize(self) -> None:
        await asyncio.to_thread(atomic.sync_folder, self.get())
        await super().finalize()
        await asyncio.to_thread(atomic.sync, self.get_final().parent)


class Writer:
    """Writes the checkpoints of one folder: the newest `keep` and the one of lowest validation loss stay.

    Make it after `restore`: what an earlier process left half written is removed.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        """`keep` >= 1; two, so that a damaged newest checkpoint costs one interval and not the run."""
        self._directory = Path(directory).absolute()

        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet_failures())

        def loss(metrics: Mapping) -> float:
            return metrics["validation_loss"]

        options = ocp.CheckpointManagerOptions(
            # Without `best_fn` Orbax does not write the losses; a resumed run would not know its best step.
            best_fn=loss,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1),
            ]),
            cleanup_tmp_directories=True,
            temporary_path_class=_SyncedPath,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: dict, record: Mapping, *, validation_loss: float | None) -> None:
        """Begin to write one step; returns once the arrays are copied and may be donated.

        Args:
            step: must not have been saved yet.
            state: the train state.
            record: JSON values, handed back by `restore`.
            validation_loss: nats per token, if this state was evaluated; competes for the best checkpoint.

        Raises:
            UserError: no space left, in this save or in the one before it, which was written meanwhile.
        """
        checksums = {name: int(value) for name, value in jax.device_get(_checksums(state)).items()}
        record = {**record, "step": step, "checksums": checksums}
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    record=ocp.args.JsonSave({**record, "digest": _digest(record)}),
                ),
                # Orbax warns of a save without metrics; an infinite loss competes as well as none.
                metrics={"validation_loss": math.inf if validation_loss is None else validation_loss},
                force=True,  # which steps are saved is the loop's decision, not Orbax's
            )

    def wait(self) -> None:
        """Return when what `save` began is safe on the disk.

        Raises:
            UserError: no space left.
        """
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait like `wait`, then end the background threads."""
        with self._quiet, self._explained():
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A full disk is a person's problem and becomes one line; anything else stays what it was."""
        try:
            yield
        except Exception as error:
            # What tensorstore says, and what Python says.
            if not re.search("RESOURCE_EXHAUSTED|No space left on device|Disk quota exceeded", str(error)):
                raise
            raise UserError(
                f"no space left in {self._directory}; free some, then start the same command again: the "
                "checkpoints written before this one are whole"
            ) from error


def _restore_step(directory: Path, abstract_state: dict) -> Restored:
    items = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
            abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=True,
        ),
        record=ocp.args.JsonRestore(),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(directory, args=items)
    record = dict(found.record)
    if record.pop("digest") != _digest(record) or record["step"] != int(directory.name):
        raise ValueError("its record is damaged")
    saved = record.pop("checksums")
    checksums = {name: int(value) for name, value in jax.device_get(_checksums(found.state)).items()}
    for name, value in checksums.items():
        if saved[name] != value:
            raise ValueError(f"the data of {name} is damaged: its checksum is not the one saved with it")
    return Restored(record["step"], found.state, record, _digest(checksums))


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Keep off stderr what Orbax leaves behind when it fails, a page of traceback for every array.

    The failure itself is raised, and reported once.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def filtered(unraisable):
        message = str(unraisable.exc_value)
        if "Event loop is closed" not in message and "error while reading array index" not in message:
            hook(unraisable)

    sys.unraisablehook = filtered
    level, logger.level = logger.level, logging.CRITICAL
    try:
        yield
    finally:
        gc.collect()  # now, while nobody listens
        sys.unraisablehook, logger.level = hook, level


def _set_aside(directory: Path, damaged: list[int]) -> None:
    attic = directory.with_name(directory.name + "_broken")
    for step in damaged:
        attic.mkdir(exist_ok=True)
        shutil.rmtree(attic / str(step), ignore_errors=True)
        os.replace(directory / str(step), attic / str(step))


def _digest(record: Mapping) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksums(state: dict) -> dict[str, jax.Array]:
    """One uint32 per array, by path.

    The sum, modulo 2^32, of a bijective mix of each element's bits with its position. Any single changed
    element changes it for certain; the order of summation does not matter, so any number of devices agrees.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _checksum(leaf) for path, leaf in leaves}


def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # An element of 8 bytes becomes two words, along a new last axis.
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    position = jnp.uint32(0)
    for axis in range(bits.ndim):
        stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    # The finaliser of MurmurHash3 (Appleby 2011), each of whose operations can be undone.
    mixed = bits ^ (position * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
