"""What a run folder holds, read back: its config, its tokenizer, and parameters for another run to begin with."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax

from seqmodels import config as config_lib
from seqmodels import data, model, object_store, processes, suggest
from seqmodels.config import RunConfig
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.training import checkpoint

LOCK_NAME = ".lock"  # held by the process that trains
OUTCOME_NAME = "outcome.json"  # what became of a run of a comparison, its summary among it

FOLDERS_OF_STEPS = ("checkpoints", "checkpoints_broken")
FOLDERS = (*FOLDERS_OF_STEPS, "divergence", "tensorboard", "wandb")  # that training makes, and deletes in


@contextlib.contextmanager
def created(workdir: Path) -> Iterator[None]:
    """Make the folder if it is not there. If what is done inside fails, what was made and has nothing in it is removed."""
    absent = [path for path in (workdir, *workdir.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if absent and [path.name for path in workdir.iterdir()] in ([], [LOCK_NAME]):
            (workdir / LOCK_NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a parent has got something else in it
                for path in absent:
                    path.rmdir()
        raise


def check_replaces_nothing(workdir: Path, names: Iterable[str], *, marks: Sequence[str]) -> None:
    """Raise UserError where a folder has a file of a name that will be written there, and nothing says that it was written by us.

    Args:
        names: of what will be written.
        marks: files of which one is there if the folder is ours, beside the lock, which is there from the first start on.
    """
    if any(os.path.lexists(workdir / name) for name in (LOCK_NAME, *marks)):
        return
    there = next((name for name in names if os.path.lexists(workdir / name)), None)
    if there is not None:
        raise UserError(f"{workdir} has a file {there} of something else, which would be replaced: choose another --workdir")


def check_folders(workdir: Path) -> None:
    """Raise UserError where one of `FOLDERS` would lead training out of the run folder, or a step, which training deletes."""
    for name in FOLDERS:
        atomic.check_own_folder(workdir / name)
    for name in FOLDERS_OF_STEPS:
        steps = sorted(os.listdir(workdir / name)) if (workdir / name).exists() else []
        for step in steps:
            if os.path.islink(workdir / name / step):
                atomic.check_own_folder(workdir / name / step)


def is_locked(workdir: Path) -> bool:
    """Whether a process trains in a folder."""
    try:
        file = open(workdir / LOCK_NAME, "r+")
    except OSError:  # there is none, or it is somebody else's
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def read_config(
    workdir: str | Path,
    *,
    cache_dir: str = config_lib.DEFAULT_CACHE_DIR,
    compilation_cache_dir: str = config_lib.DEFAULT_COMPILATION_CACHE_DIR,
    report: Callable[[str], None] = say,
) -> RunConfig:
    """The config of the run folder `workdir`, which may be untrusted: its caches are the reader's.

    A compiled program is executed, so one must never come from the folder that is opened. The other `config.PLACE_FIELDS`
    are left as they are, as a record; no place that they name may be read.

    Args:
        cache_dir, compilation_cache_dir: of who reads, in place of data.cache_dir and train.compilation_cache_dir.
        report: called with one line where the file is not as it was written.

    Raises:
        UserError: `workdir` is not a run folder.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        reason = (
            "its config.json is not a regular file"
            if path.exists()
            else "it has no config.json"
            if path.parent.is_dir()
            else "it is a file"
            if path.parent.exists()
            else "there is no such folder"
        )
        near = "" if path.parent.exists() else suggest.path_hint(path.parent, lambda each: (each / "config.json").is_file())
        raise UserError(f"{workdir} is not a run folder ({reason}); {near}train one with train.py --workdir={workdir}")
    return config_lib.with_caches(
        config_lib.load(path, report=report), cache_dir=cache_dir, compilation_cache_dir=compilation_cache_dir
    )


def read_tokenizer(workdir: str | Path, config: RunConfig) -> data.Tokenizer | None:
    """The tokenizer of a run of this config; None: a synthetic task has none, nor an imported checkpoint without one.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(workdir) / "tokenizer.json"
    # Of runs on text, only an imported checkpoint names its vocabulary, and only that may be without a tokenizer.
    has_none = config.data.synthetic_task is not None or (config.model.vocab_size and not path.exists())
    return None if has_none else data.load_tokenizer(path)


def known_vocab_size(config: RunConfig, tokenizer: data.Tokenizer | None) -> int | None:
    """How many tokens a run's data have; None where that is not known."""
    if config.data.synthetic_task is not None:
        return config.data.synthetic_task.vocab_size
    return None if tokenizer is None else tokenizer.vocab_size


def expected_vocab_size(config: RunConfig) -> int:
    """How many tokens a run's data will have, before they are read; a small text may turn out to have fewer.

    Raises:
        UserError: there is no such tokenizer.
    """
    if config.data.synthetic_task is not None:
        return config.data.synthetic_task.vocab_size
    if config.data.tokenizer == "bpe":
        return config.data.vocab_size
    return data.load_tokenizer(config.data.tokenizer, report=lambda line: None).vocab_size


def check_initial_params(config: RunConfig) -> None:
    """Before any work: whether there is a run that `initial_params` can begin with.

    Raises:
        UserError: `config.train.init_from` is not a run folder, or holds no checkpoint.
    """
    if config.train.init_from is None:
        return
    source = object_store.local(config.train.init_from, "train.init_from")
    read_config(source, report=lambda line: None)
    if not checkpoint.steps(source / "checkpoints"):
        raise UserError(f"train.init_from={source} holds no checkpoint yet")


def initial_params(
    config: RunConfig,
    tokenizer: data.Tokenizer | None,
    abstract_params: dict,
    report: Callable[[str], None],
    *,
    step: int | None = None,
    group: processes.Group | None = None,
) -> checkpoint.Restored:
    """The newest parameters in `config.train.init_from`, or those of ``step``, for a run that begins with them: its state's "params".

    Args:
        config: of the new run; what its model has otherwise than the old one's is reported.
        tokenizer: of the new run.
        abstract_params: shapes, dtypes and shardings of the new run's parameters.
        report: called with one line for each thing a person should know.
        group: the processes of the new run, which all call this.

    Raises:
        UserError: it is not a run folder, holds no checkpoint, has another tokenizer, or parameters of other shapes.
    """
    source = object_store.local(config.train.init_from, "train.init_from")
    theirs = read_config(source)
    their_tokenizer = read_tokenizer(source, theirs)
    if None not in (their_tokenizer, tokenizer) and data.tokenizer_digest(their_tokenizer) != data.tokenizer_digest(tokenizer):
        raise UserError(
            f"train.init_from={source} was trained with another tokenizer than data.tokenizer={config.data.tokenizer}; "
            f"set --config.data.tokenizer={source / 'tokenizer.json'}"
        )
    vocab_size = model.vocabulary_size(theirs.model, known_vocab_size(theirs, their_tokenizer))
    their_params = model.param_shapes(theirs.model, vocab_size)
    there, here = _shapes(their_params), _shapes(abstract_params)
    if there != here:
        name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
        shapes = (f"{list(shapes[name])}" if name in shapes else "absent" for shapes in (there, here))
        raise UserError(
            f"train.init_from={source} does not fit config.model: {name} is {next(shapes)} there and {next(shapes)} here; "
            f"--config=configs/from_run.py:{source} takes the model as it is"
        )
    restored = checkpoint.restore(source / "checkpoints", {"params": abstract_params}, step=step, report=report, group=group)
    if restored is None:
        raise UserError(f"train.init_from={source} holds no checkpoint yet")
    changes = [
        f"{name} {before!r} -> {after!r}"
        for name, (before, after) in config_lib.differences(theirs, config).items()
        if name.startswith("model.")
    ]
    report(f"beginning with the parameters of {source}, step {restored.step}{''.join(f'; {each}' for each in changes)}")
    return restored


def _shapes(params: dict) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
