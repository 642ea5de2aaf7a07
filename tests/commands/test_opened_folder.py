"""A run folder may come from anybody: opening it executes nothing of it, and neither reads nor writes the places it names."""

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import eval as eval_program
from configs import base, from_run
from scripts import generate
from seqmodels import config as config_lib
from seqmodels import data, ranges
from seqmodels.comparison import worker
from seqmodels.data.text.tokenizer import BytesTokenizer
from seqmodels.errors import UserError
from seqmodels.training import checkpoint
from seqmodels.training.state import Trainer

TINY = {
    "data.source": "toy", "data.toy_documents": 30, "data.tokenizer": "bytes", "data.seq_len": 16, "data.batch_size": 2,
    "model.d_model": 32, "model.repeats": 1, "model.pattern": "linear_attention", "train.sample_every_steps": 0,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR

opened: list[tuple[str, bool]] | None = None  # (path, whether to write), while somebody listens; a hook cannot be taken away


def _listen(event: str, arguments: tuple) -> None:
    if opened is None or not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    if event == "open":
        flags = arguments[2]
        opened.append((os.path.abspath(os.fsdecode(arguments[0])), bool(isinstance(flags, int) and flags & WRITES)))
    elif event in ("os.listdir", "os.scandir"):
        opened.append((os.path.abspath(os.fsdecode(arguments[0])), False))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
        opened.append((os.path.abspath(os.fsdecode(arguments[0])), True))


sys.addaudithook(_listen)


@contextlib.contextmanager
def listening():
    global opened
    opened = []
    try:
        yield opened
    finally:
        opened = None


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A run folder of somebody else's, and the folder that all its places are in, each with something to be found."""
    folder = tmp_path_factory.mktemp("opened")
    config = base.get_config()
    config.update_from_flattened_dict(TINY | {"data.cache_dir": str(folder / "their_cache")})
    config = config_lib.from_config_dict(config)
    dataset = data.prepare(config.data, seed=0)
    (folder / "run").mkdir()
    dataset.save(folder / "run")
    writer = checkpoint.Writer(folder / "run" / "checkpoints")
    writer.save(1, Trainer(config, dataset.vocab_size).init(), {"seed": 0}, validation_loss=None)
    writer.close()
    places = folder / "places"
    values = config_lib.to_dict(config)
    for field in config_lib.PLACE_FIELDS:
        group, name = field.split(".")
        (places / name).mkdir(parents=True)
        (places / name / "text.txt").write_text("Once upon a time there was a canary. " * 200)
        values[group][name] = str(places / name)
    BytesTokenizer().save(places / "tokenizer" / "tokenizer.json")
    (folder / "run" / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def no_program_cache():
    """As in a process of its own, where no cache of compiled programs has been chosen yet."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def call(main, *argv):
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()):
        patched.setattr(sys, "argv", ["program", *map(str, argv)])
        main()


def commands(run, own):
    """What opens a run folder, by name."""
    caches = (f"--compilation_cache_dir={own / 'xla'}",)
    return {
        "eval": lambda: call(
            eval_program.main, f"--workdir={run}", "--data=toy", f"--cache_dir={own / 'data'}", "--max_tokens=32", *caches
        ),
        "generate": lambda: call(generate.main, f"--workdir={run}", "--prompt=a", "--max_tokens=3", *caches),
        "score": lambda: call(worker.main, f"--score={run}", "--validation_tokens=32", *caches),
        "from_run": lambda: from_run.get_config(str(run)),
    }


def test_no_place_that_a_folder_names_is_touched(canary, tmp_path, no_program_cache):
    for name, command in commands(canary / "run", tmp_path).items():
        with listening() as touched:
            command()
        touched = list(touched)
        assert touched, "the audit hook hears nothing"
        named = [path for path, _ in touched if path.startswith(str(canary / "places"))]
        assert not named, f"{name} touches {named[0]}"
        allowed = (str(canary / "run"), str(tmp_path), os.devnull, str(Path.home() / ".cache"), str(Path.home() / ".config"))
        written = [path for path, writes in touched if writes and not path.startswith(allowed)]
        assert not written, f"{name} writes {written[0]}"
        programs = jax.config.jax_compilation_cache_dir
        assert programs in (None, str(tmp_path / "xla")), f"{name} takes compiled programs from {programs}"


def test_a_link_in_the_folder_leads_no_writer_outside(canary, tmp_path, no_program_cache):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    picture = canary / "run" / "loss_by_position.png"
    picture.unlink(missing_ok=True)
    picture.symlink_to(precious)
    call(eval_program.main, f"--workdir={canary / 'run'}", "--max_tokens=32", "--compilation_cache_dir=")
    assert precious.read_text() == "mine" and not picture.is_symlink() and picture.stat().st_size > 1000


def test_training_on_from_a_folder_asks_what_to_train_on(canary):
    config = from_run.get_config(str(canary / "run"))
    with pytest.raises(UserError, match="data.source is empty: say what to train on"):
        config_lib.from_config_dict(config)
    config.data.source = "toy"
    ours = config_lib.from_config_dict(config)
    assert ours.data.cache_dir == config_lib.DEFAULT_CACHE_DIR and ours.train.init_from == str(canary / "run")


def test_every_text_in_a_config_is_known_to_be_a_place_or_not():
    """A new field of free text needs a thought: where it says where something is, it belongs into PLACE_FIELDS."""
    no_place = {"data.task", "model.pattern", "train.sample_prompt", "train.loggers", "train.profile_steps"}
    texts = {
        f"{group.name}.{field}"
        for group in dataclasses.fields(config_lib.RunConfig)
        if dataclasses.is_dataclass(group.type)
        for field, hint in ranges.declared(group.type).items()
        if ranges.unpack_type(hint)[0] is str and not any(isinstance(rule, ranges.OneOf) for rule in ranges.rules_of(hint))
    }
    assert texts == no_place | set(config_lib.PLACE_FIELDS)
