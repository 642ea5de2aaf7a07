"""Checkpoints of a run: atomic, written in the background, verified when they are read.

A step's folder holds two items: `state`, the train state (a dict of arrays, among them the step, which is
also the position in the data), and `record`, a JSON object with what a resumed run must agree on (seed, data
fingerprint) and one checksum per array. Orbax writes a step under a temporary name and renames it when it is
complete and on the disk, so a killed process, or a power cut, leaves a whole step or none. It does not notice a byte
that flipped on the disk; the checksums do.

A read that fails means one of three things. The step has vanished, because the run that writes it keeps only its newest
ones: the folder is listed again. Something outside the data is in the way (permission, memory, open files, the disk), or the
step is of another model than is asked for: that is said, and nothing is touched. Or the data are damaged: the step before is
taken.
"""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from seqmodels import failures, migrations, processes
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.formats import json_text
from seqmodels.formats.limits import Malformed, open_file, size

DELETION_SECONDS: Final = 0.3  # that a step of which something is missing is watched for, whether more of it goes
_DATA_FOLDER: Final = "d"  # of OCDBT; what else is in a step is JSON, or small
_OTHER_SHAPE: Final = re.compile(r"Requested shape: (\(.*?\)) is not compatible with the stored shape: (\(.*?\))")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found: the step, its arrays, and the record saved with them."""

    step: int
    state: dict
    record: dict
    fingerprint: str  # of the arrays in `state`: equal for equal values


class NonFinite(ArithmeticError):
    """A train state holds numbers that are not finite, and is not saved."""

    def __init__(self, names: Sequence[str]):
        super().__init__(names)
        self.names = tuple(names)  # of the arrays, by path


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that were saved in a folder and are still there, ascending; none where there is no such folder.

    Raises:
        UserError: the folder cannot be listed, or has a name that Orbax cannot write.
    """
    try:
        os.fspath(Path(directory).absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"the name of the folder '{directory}' is not UTF-8, as those of checkpoints must be; rename it"
        ) from None
    try:
        # Not 007, nor a number of other digits: no step has that name.
        return sorted(int(name) for name in os.listdir(directory) if name.isdecimal() and str(int(name)) == name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{directory} cannot be listed: {failures.obstacle(error) or error.strerror}") from error


def restore(
    directory: str | os.PathLike,
    abstract_state: dict,
    *,
    step: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    set_aside: bool = False,
    check: Callable[[Mapping], None] = lambda record: None,
    group: processes.Group | None = None,
) -> Restored | None:
    """Read the newest whole checkpoint, or the one of `step`; None when no step was ever saved completely.

    A checkpoint that is damaged (not complete, or with arrays that differ from their checksums) is reported and the one
    before it is taken.

    Args:
        directory: the folder of checkpoints.
        abstract_state: `jax.ShapeDtypeStruct`s with shardings: the whole train state, or a part of it
            (evaluation reads only `{"params": ...}`). The number of devices may differ from the saving run's.
        step: take exactly this step, or fail.
        report: called with one line for each thing a person should know.
        set_aside: move damaged checkpoints newer than the one taken to `<directory>_broken`, so that
            training can write these steps again. Otherwise nothing on the disk is touched.
        check: called with a step's record before its arrays are read; a UserError of it ends the reading, and is no damage.
        group: the processes that all call this; the first one lists the folder, and what one of them cannot read none takes.

    Raises:
        UserError: `step` does not exist; a checkpoint cannot be read now, or is of another model; there are checkpoints, but all are
            damaged, or are deleted meanwhile; and what `check` raises.
    """
    directory = Path(directory).absolute()
    group = processes.Group.alone() if group is None else group

    listed, damaged = group.from_first(lambda: steps(directory)), []
    if step is not None and step not in listed:
        raise UserError(f"no checkpoint of step {step!r} in {directory}; there are {listed or 'none'}")
    waiting = list(listed) if step is None else [step]
    with _quiet_failures() as failed:
        while waiting:
            candidate = waiting.pop()
            path = directory / str(candidate)
            restored, failure = _restore_step(path, abstract_state, check, group)
            if restored is not None:
                if damaged:
                    report(f"using the checkpoint of step {candidate} instead")
                if set_aside and group.is_first:
                    _set_aside(directory, damaged)
                return restored
            failed.append(failure["reason"])
            _raise_unless_damaged(path, failure)
            # Who sets damaged ones aside is the run that writes here: nobody else deletes.
            deleted = not set_aside and group.from_first(functools.partial(_is_being_deleted, path))
            now = group.from_first(lambda: steps(directory))
            deleted = deleted or candidate not in now
            # Where a run that writes here has saved newer steps, it deletes this one or will.
            if not deleted and (step is not None or now[-1] <= listed[-1]):
                report(f"checkpoint {path} cannot be restored: {failure['reason']}")
                damaged.append(candidate)
                continue
            left = [each for each in now if each != candidate or not deleted]
            if not left:
                raise UserError(f"the checkpoints in {directory} were deleted while they were read")
            if step is not None:
                raise UserError(
                    f"the checkpoint of step {step} in {directory} was deleted by the run that writes there, which "
                    f"keeps its newest; there are {left}"
                )
            listed, waiting = left, [each for each in left if each not in damaged]
    if damaged:
        raise UserError(
            f"none of the checkpoints {sorted(damaged)} in {directory} can be restored: they are damaged; put a copy in their "
            "place, or train in another --workdir"
        )
    return None


def _raise_unless_damaged(path: Path, failure: Mapping) -> None:
    """Raises UserError for a failure of `_restore_step` that is no damage of the checkpoint."""
    if failure.get("refused"):
        raise UserError(failure["reason"])
    if failure["obstacle"]:
        raise UserError(
            f"checkpoint {path} cannot be read now: {failure['reason']}; nothing was changed, the same command goes on "
            "once that is mended"
        )


class _SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step's folder under its temporary name, whose files reach the disk before the folder gets its own."""

    published: Callable[[Path], None] | None = None

    async def finalize(self) -> None:
        await asyncio.to_thread(atomic.sync_folder, self.get())
        await super().finalize()
        await asyncio.to_thread(atomic.sync, self.get_final().parent)
        if self.published is not None and self.get_final().name.isdecimal():  # a step, and no item of one
            await asyncio.to_thread(self.published, Path(self.get_final()))


class Writer:
    """Writes the checkpoints of one folder: the newest `keep` and the one of lowest validation loss stay.

    Make it after `restore`: what an earlier process left half written is removed.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        published: Callable[[Path], None] | None = None,
        by_first: bool = False,
    ):
        """Make the writer.

        Args:
            directory: the folder of checkpoints.
            keep: >= 1; two, so that a damaged newest checkpoint costs one interval and not the run.
            published: called with a step's folder when that is whole, in the background; a checkpoint is saved when it returns.
            by_first: of several processes, which then share no folder, process 0 gathers all arrays in its memory and writes
                them; otherwise each writes its part.
        """
        self._directory = Path(directory).absolute()
        self.by_first = by_first

        self._quiet = contextlib.ExitStack()
        self._failed = self._quiet.enter_context(_quiet_failures())
        self._manager = None
        if by_first:
            if jax.process_index() != 0:
                return
            self._directory.mkdir(parents=True, exist_ok=True)

        def loss(metrics: Mapping) -> float:
            return metrics["validation_loss"]

        options = ocp.CheckpointManagerOptions(
            # Without `best_fn` Orbax does not write the losses; a resumed run would not know its best step.
            best_fn=loss,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(keep),
                    checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1),
                ]
            ),
            create=not by_first,
            cleanup_tmp_directories=True,
            **(_without_barriers() if by_first else {}),
            temporary_path_class=type("_PublishedPath", (_SyncedPath,), {"published": published and staticmethod(published)}),
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
            NonFinite: some number is not finite; nothing is written.
            UserError: no space left, in this save or in the one before it, which was written meanwhile.
        """
        examined = _examined(state)
        wrong = [name for name, (_, is_finite) in examined.items() if not is_finite]
        if wrong:
            raise NonFinite(wrong)
        checksums = {name: int(checksum) for name, (checksum, _) in examined.items()}
        record = {**record, "step": step, "checksums": checksums}
        if self.by_first:
            state = jax.tree.map(_on_first_process, state)
        if self._manager is None:
            return
        with self._disk_errors_as_user_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    record=ocp.args.JsonSave({**record, "digest": json_text.digest(record)}),
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
        if self._manager is None:
            return
        with self._disk_errors_as_user_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait like `wait`, then end the background threads."""
        with self._quiet, self._disk_errors_as_user_errors():
            if self._manager is not None:
                self._manager.close()

    @contextlib.contextmanager
    def _disk_errors_as_user_errors(self) -> Iterator[None]:
        """Inside, an error of the disk is a UserError; any other stays what it is."""
        try:
            yield
        except UserError:  # of what publishes
            raise
        except Exception as error:
            self._failed.append(str(error))
            saved = "start the same command again: the checkpoints written before this one are whole"
            if failures.is_no_space(error):
                raise UserError(f"no space left in {self._directory}; free some, then {saved}") from error
            reason = failures.obstacle(error)
            if reason is None:
                raise
            raise UserError(f"a checkpoint cannot be written in {self._directory}: {reason}; mend that, then {saved}") from error


def _restore_step(
    directory: Path, abstract_state: dict, check: Callable[[Mapping], None], group: processes.Group
) -> tuple[Restored | None, dict[str, Any]]:
    """A step, or why it cannot be had: the ``reason``, and whether it is an ``obstacle`` outside the data, or ``refused``.

    All processes take the step or none does: each reads its part without waiting for another, then they compare.
    """
    found, failure = None, None
    try:
        found = _read_step(directory, abstract_state, check)
    except UserError as refusal:
        failure = {"obstacle": False, "refused": True, "reason": str(refusal)}
    except Exception as error:  # Orbax raises a bare Exception for a truncated file
        failure = _reason(error, directory)
    failure = next((each for each in group.gather(failure) if each is not None), None)
    if failure is not None:
        return None, failure
    record, state = found
    saved = record.pop("checksums")
    checksums = {name: int(checksum) for name, (checksum, _) in _examined(state).items()}
    for name, value in checksums.items():
        if saved[name] != value:
            reason = f"the data of {name} is damaged: its checksum is not the one saved with it"
            return None, {"obstacle": False, "reason": reason}
    if isinstance(state.get("step"), jax.Array) and int(state["step"]) != record["step"]:
        reason = f"its state is after {int(state['step'])} steps, and its folder and its record say {record['step']}"
        return None, {"obstacle": False, "reason": reason}
    former = migrations.former_layer_names(_names(abstract_state), saved)
    state = _renamed(state, {old: new for new, old in former.items()})
    return Restored(record["step"], state, record, json_text.digest(checksums)), {}


def _reason(error: Exception, directory: Path) -> dict[str, Any]:
    # Orbax takes a folder that it may not look into for one that is not there.
    obstacle = failures.obstacle(error) or _obstacle_in(directory)
    if obstacle is not None:
        return {"obstacle": True, "reason": obstacle}
    shapes = _OTHER_SHAPE.search(str(error))
    if shapes is not None:
        reason = _of_another_model(directory, f"an array of {shapes[2]}, not {shapes[1]}")
        return {"obstacle": False, "refused": True, "reason": reason}
    return {"obstacle": False, "reason": " ".join(str(error).split()).partition(". See full TensorStore details")[0][:200]}


def _of_another_model(directory: Path, holds: str) -> str:
    return f"checkpoint {directory} holds {holds}: it is of another model, or tokenizer, than is asked for (config.json was replaced?)"


def _is_being_deleted(directory: Path) -> bool:
    """Whether a step goes while one looks: a folder is not deleted at one stroke."""

    def names() -> int:
        return sum(len(folders) + len(files) for _, folders, files in os.walk(directory))

    before, end = names(), time.monotonic() + DELETION_SECONDS
    while time.monotonic() < end:
        time.sleep(DELETION_SECONDS / 10)
        if names() < before or not directory.exists():
            return True
    return not directory.exists()


def _check_files(directory: Path) -> None:
    """Raises ValueError where a step has what is neither a folder nor a regular file, for which Orbax would wait or which has no
    end, or a file that is larger than such files are."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(directory, onerror=refuse):
        linked = next((name for name in folders if os.path.islink(os.path.join(parent, name))), None)
        if linked is not None:  # what is behind it would not be looked at
            raise ValueError(f"{linked} is a symbolic link to a folder")
        for name in files:
            about = os.stat(os.path.join(parent, name))
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"{name} is not a regular file")
            if os.path.basename(parent) != _DATA_FOLDER and about.st_size > json_text.MOST_BYTES:
                raise ValueError(f"{name} has {size(about.st_size)}")


def _check_arrays(directory: Path, groups: Iterable[str]) -> None:
    """Raises ValueError where the arrays of a step, of these groups, are stored otherwise than they are written: a part that is larger
    than its array would be decompressed whole, whatever memory that takes."""
    is_ocdbt = (directory / "state" / "manifest.ocdbt").exists()
    base = {"driver": "file", "path": f"{directory / 'state'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base} if is_ocdbt else base).result()
    for name in store.list().result():
        if re.split(rb"[./]", name, maxsplit=1)[0].decode("utf-8", "replace") not in groups:
            continue
        words, (_, _, last) = name.decode("utf-8", "replace"), name.rpartition(b"/")
        if last == b".zarray":
            _check_array(json_text.parse(bytes(store.read(name).result().value).decode(), words))
        elif re.fullmatch(rb"\d+(\.\d+)*", last) is None:
            raise ValueError(f"it has an array of another format, {words[:200]}")


def _check_array(about: Any) -> None:
    """Raises ValueError where an array is described otherwise than Orbax writes it."""
    if not isinstance(about, dict) or not {"shape", "chunks", "compressor", "filters"} <= about.keys():
        raise ValueError("the description of its arrays is damaged")
    shape, parts, compressor = about["shape"], about["chunks"], about["compressor"]
    are_lists = isinstance(shape, list) and isinstance(parts, list) and len(shape) == len(parts)
    if not are_lists or not all(type(number) is int for number in shape + parts):
        raise ValueError("the description of its arrays is damaged")
    if any(not 0 < part <= max(length, 1) for part, length in zip(parts, shape, strict=True)):
        raise ValueError(f"an array of {shape} is in parts of {parts}")
    if about["filters"] or not (compressor is None or (isinstance(compressor, dict) and compressor.get("id") == "zstd")):
        raise ValueError("its arrays are compressed by another method than they are written")


def _check_record(record: Mapping) -> None:
    """Raises ValueError where a record is not as it is written: a digest is soon made of anything."""

    def maps(value: Any, kind: type) -> bool:
        return isinstance(value, dict) and all(type(each) is kind for each in value.values())

    def is_model(value: Any) -> bool:
        return isinstance(value, dict) and type(value.get("version")) is int and isinstance(value.get("options"), dict)

    def is_log(value: Any) -> bool:
        return maps(value, dict) and all(
            type(each.get("bytes")) is int and isinstance(each.get("digest"), str) for each in value.values()
        )

    kinds = {
        "checksums": lambda value: maps(value, int),
        "data": lambda value: isinstance(value, str),
        "digests": lambda value: maps(value, str),
        "order": lambda value: isinstance(value, str),
        "tokenizer": lambda value: isinstance(value, str),
        "model": is_model,
        "seconds": lambda value: type(value) in (int, float),
        "log": is_log,
        "skipped": lambda value: isinstance(value, list) and [type(each) for each in value] == [int, int],
    }
    wrong = next((name for name, holds in kinds.items() if record.get(name) is not None and not holds(record[name])), None)
    if wrong is not None or record.get("checksums") is None:
        raise ValueError(f"its record is damaged: {wrong or 'checksums'}")


def _obstacle_in(directory: Path) -> str | None:
    """Why a folder's names, or the beginnings of its files, cannot be read now; None: they can, or are not there."""

    def refuse(error: OSError) -> None:
        raise error

    try:
        for parent, _, files in os.walk(directory, onerror=refuse):
            for name in files:
                with contextlib.suppress(Malformed), open_file(os.path.join(parent, name)) as file:
                    file.read(1)
    except OSError as error:
        return failures.obstacle(error)
    return None


def _read_step(directory: Path, abstract_state: dict, check: Callable[[Mapping], None]) -> tuple[dict, dict]:
    """The record, checked and without its digest, and the arrays, under the names that they were saved with."""
    _check_files(directory)
    _check_arrays(directory, abstract_state)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), **_without_barriers()) as checkpointer:
        record = dict(checkpointer.restore(directory, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record)
        if record.pop("digest") != json_text.digest(record) or record["step"] != int(directory.name):
            raise ValueError("its record is damaged")
        _check_record(record)
        check(record)
        as_saved = _renamed(abstract_state, migrations.former_layer_names(_names(abstract_state), record["checksums"]))
        absent = next((name for name in _names(as_saved) if name not in record["checksums"]), None)
        if absent is not None:
            raise UserError(_of_another_model(directory, f"no {absent}"))
        arrays = ocp.args.PyTreeRestore(
            as_saved, restore_args=ocp.checkpoint_utils.construct_restore_args(as_saved), partial_restore=True
        )
        return record, checkpointer.restore(directory, args=ocp.args.Composite(state=arrays)).state


def _renamed(tree, names: Mapping[str, str]):
    """The same train state with other keys in its dicts; keys that are not in ``names`` stay."""
    if isinstance(tree, dict):
        return {names[key] if key in names else key: _renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [_renamed(part, names) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _on_first_process(array: jax.Array) -> np.ndarray | None:
    """The whole array in the memory of process 0; all processes call this."""
    whole = multihost_utils.process_allgather(array, tiled=True)
    return whole if jax.process_index() == 0 else None


def _without_barriers() -> dict[str, Any]:
    """For an Orbax that works without the other processes: where one fails, the others would wait for it."""
    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read{me}")
    return {"multiprocessing_options": options}


@contextlib.contextmanager
def _quiet_failures() -> Iterator[list[str]]:
    """Keep off stderr what Orbax leaves behind when it fails, a page of traceback for every array.

    The failure itself is raised, and reported once.

    Yields:
        What has failed: to be told of what is raised no further than the body. Where nothing has, no garbage is collected, which
        takes a tenth of a second and more.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    if hook is not _filtered:
        _hook_before[0] = hook
    sys.unraisablehook = _filtered
    level, logger.level = logger.level, logging.CRITICAL
    failed = []
    try:
        yield failed
    except BaseException as error:
        failed.append(str(error))
        raise
    finally:
        if failed:
            gc.collect()  # now, while messages are discarded
        sys.unraisablehook, logger.level = hook, level


_hook_before = [sys.__unraisablehook__]


def _filtered(unraisable) -> None:
    """A ``sys.unraisablehook``; never freed, since CPython holds no reference to the one that a thread of Orbax's is calling."""
    message = str(unraisable.exc_value)
    if "Event loop is closed" not in message and "error while reading array index" not in message:
        _hook_before[0](unraisable)


def _set_aside(directory: Path, damaged: list[int]) -> None:
    attic = directory.with_name(directory.name + "_broken")
    for step in damaged:
        attic.mkdir(exist_ok=True)
        shutil.rmtree(attic / str(step), ignore_errors=True)
        os.replace(directory / str(step), attic / str(step))


def _examined(state: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The `_checksum` of each array and whether all its numbers are finite, by path."""
    return jax.device_get(dict(zip(_names(state), map(_examine, jax.tree.leaves(state)), strict=True)))


def _names(state) -> list[str]:
    """The path of each array, ``params/layers/0_gla/layer/query_kernel``."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state)]


# One program for each shape and not one for the whole state: the arrays are many and their shapes few, so this compiles faster.


@jax.jit
def _examine(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _checksum(array), jnp.isfinite(array).all()


def _checksum(array: jax.Array) -> jax.Array:
    """A uint32: the sum, modulo 2^32, of a bijective mix of each element's bits with its position.

    Any single changed element changes it for certain; the order of summation does not matter, so any number of devices agrees.
    """
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
