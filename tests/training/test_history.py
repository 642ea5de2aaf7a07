"""What a run says before its first step and keeps in its folder."""

import json
import re
from pathlib import Path

import jax
import pytest

from seqmodels import config as config_lib
from seqmodels.errors import UserError
from seqmodels.training import compile_times, history, loop, run_folder, step
from seqmodels.training.state import Trainer
from tests.configs import tiny


def small(folder, **overrides):
    return tiny(**{
        "data.cache_dir": str(folder / "cache"), "data.toy_documents": 40, "data.seq_len": 16, "data.batch_size": 2,
        "model.repeats": 1, "train.steps": 2, "train.eval_tokens": 64, "train.sample_every_steps": 0,
    } | overrides)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps, what it said, its trainer, and how often its step was traced."""
    folder = tmp_path_factory.mktemp("run")
    said, trainers, traces, cache = [], [], [], jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "say", said.append)
        lower, train_step = Trainer.lower, step.train_step
        patch.setattr(Trainer, "lower", lambda setup, batch: trainers.append(setup) or lower(setup, batch))
        patch.setattr(step, "train_step", lambda *args, **options: traces.append(1) or train_step(*args, **options))
        (folder / "xla").mkdir()  # JAX makes it only if it is the first one of the process
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        try:
            loop.train(small(folder), folder / "run")
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
    return folder / "run", said, trainers[0], len(traces)


def test_a_link_in_the_folder_leads_no_entry_outside(tmp_path):
    (tmp_path / "precious").write_text("mine\n")
    (tmp_path / history.FILE_NAME).symlink_to(tmp_path / "precious")
    history.append({"step": 1}, tmp_path)
    assert (tmp_path / "precious").read_text() == "mine\n"
    assert (tmp_path / history.FILE_NAME).read_text() == 'mine\n{"step": 1}\n'


def test_five_lines(run):
    folder, said, setup, _ = run
    lines = "\n".join(line for line in said if line.startswith("  "))
    parameters = f"{setup.num_parameters:,}"
    assert re.search(
        rf"  model  1 x 'attention mlp': 2 layers, {parameters} parameters, a state of [\d,]+ bytes at 16 tokens", lines
    )
    assert re.search(
        r"   data  [\d,]+ documents, [\d,]+ bytes, [\d,]+ tokens of bytes; 64 tokens to read, \S+ epochs in all", lines
    )
    assert re.search(r" device  \d x cpu \(cpu\), mesh data 1 x fsdp 1", lines)
    assert f"folder  {folder}, 2 steps" in lines
    assert "  forms  softmax_attention: " in lines


def test_the_same_is_kept(run):
    folder, _, setup, _ = run
    [about] = [json.loads(line) for line in (folder / history.FILE_NAME).read_text().splitlines()]
    assert about["step"] == 0 and about["model"]["parameters"] == setup.num_parameters and about["host"]
    assert about["versions"]["jax"] == jax.__version__ and {"command", "commit", "date"} <= set(about)
    data = about["data"]
    assert data["tokens_to_read"] == 64 and data["epochs"] == pytest.approx(64 / (data["tokens"] // 16 * 16), rel=0.1)


def test_what_is_traced_for_the_forms_is_not_traced_again(run):
    assert run[3] == 1


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_lines_fit_their_terminal(run, columns):
    [about] = [json.loads(line) for line in (run[0] / history.FILE_NAME).read_text().splitlines()]
    plain, fitted = (history.lines(about, Path("run"), 2, width) for width in (None, columns))
    assert max(map(len, fitted)) <= columns and (len(fitted) > len(plain)) == (columns < max(map(len, plain)))
    assert " ".join(" ".join(fitted).split()) == " ".join(" ".join(plain).split())
    assert all(line[8:10] == "  " and line[10] != " " for line in fitted)


def test_what_compiling_took_is_kept(run):
    [took] = [json.loads(line) for line in (run[0].parent / "xla" / compile_times.FILE_NAME).read_text().splitlines()]
    assert took["seconds"] > 0 and took["lines"] > 100 and "cpu" in took["place"]


def test_a_failed_start_leaves_no_empty_folder(tmp_path):
    for mistake, said in (
        ({"data.source": str(tmp_path / "nothing")}, "nothing"),
        # found before the data are read, into their cache
        ({"train.init_from": str(tmp_path / "nothing")}, "nothing is not a run folder"),
        ({"model.mixers.attention.num_heads": 5}, "num_heads=5"),
        ({"mesh.fsdp": 64}, "mesh"),
    ):
        with pytest.raises(UserError, match=said):
            loop.train(small(tmp_path, **mistake), tmp_path / "runs" / "a")
        assert list(tmp_path.iterdir()) == [], mistake
    (tmp_path / "runs").mkdir()
    with pytest.raises(RuntimeError), run_folder.created(tmp_path / "runs" / "b" / "c"):
        (tmp_path / "runs" / "other.txt").write_text("somebody else's")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other.txt"]
    with pytest.raises(RuntimeError), run_folder.created(tmp_path / "kept"):
        (tmp_path / "kept" / "config.json").write_text("{}")
        raise RuntimeError
    assert (tmp_path / "kept" / "config.json").exists()


def test_files_of_something_else_are_not_replaced(tmp_path):
    """A folder named by mistake, ``--workdir=.`` or that of somebody's data: nothing in it changes, and nothing is left there."""
    for name in (*config_lib.RUN_FILES[1:], "results.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("somebody else's")
        with pytest.raises(UserError, match="choose another --workdir"):
            loop.train(small(tmp_path), folder)
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == "somebody else's"
        (folder / run_folder.LOCK_NAME).touch()  # of a start that was killed early
        run_folder.check_replaces_nothing(folder, config_lib.RUN_FILES, marks=["config.json"])
