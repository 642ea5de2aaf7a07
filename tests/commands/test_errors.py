"""A person's mistake is one line on stderr and exit code 1, and nothing is lost."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from seqmodels import command_line, data, ranges
from seqmodels.training import checkpoint
from tests import odd_values

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/tinystories.py:attention"
TINY = (
    "--config.data.source=toy", "--config.data.toy_documents=40", "--config.data.tokenizer=bytes",
    "--config.data.seq_len=16", "--config.data.batch_size=2", "--config.model.d_model=32",
    "--config.model.repeats=1", "--config.train.steps=2", "--config.train.sample_every_steps=0",
    "--config.train.eval_tokens=64", "--config.train.compilation_cache_dir=",
)  # fmt: skip


def error_of(*argv):
    """The one line that train.py ends with, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: train.main(["train.py", *argv]))
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "--config is missing"),
        ([CONFIG], "--workdir is missing"),
        (["--workdir={}"], "--config is missing"),
        ([CONFIG, "--workdir={}", "--coordinator="], "--coordinator= is empty: give it a value, or leave it out"),
        ([CONFIG, "--wrokdir={}"], "wrokdir"),
        ([CONFIG, "--workdri={}"], "did you mean --workdir?"),
        ([CONFIG, "--workdir={}", "--lr=0.1"], "--lr is not a flag; did you mean --config.optim.learning_rate?"),
        ([CONFIG, "--workdir={}", "--config.layers=3"], "did you mean --config.model.repeats?"),
        ([CONFIG, "--workdir={}", "--config.data.bs=3"], "did you mean --config.data.batch_size?"),
        ([CONFIG, "--workdir={}", "--config.model.width=64"], "did you mean --config.model.d_model?"),
        ([CONFIG, "--workdir={}", "--config.train.learning_rate=1"], "did you mean --config.optim.learning_rate?"),
        ([CONFIG, "--workdir={}", "stray"], "'stray' is not a flag"),
        ([CONFIG, "--workdir={}", "--config.train.stpes=3"], "steps"),
        ([CONFIG, "--workdir={}", "--config.trian.steps=3"], "train"),
        ([CONFIG, "--workdir={}", "--config.train.steps=many"], "--config.train.steps='many' must be int"),
        ([CONFIG, "--workdir={}", "--config.train.steps=1.5"], "--config.train.steps='1.5' must be int"),
        ([CONFIG, "--workdir={}", "--config.optim.learning_rate=fast"], "--config.optim.learning_rate='fast' must be float"),
        ([CONFIG, "--workdir={}", "--config.model.remat=perhaps"], "--config.model.remat='perhaps' must be bool"),
        (["--config=configs/nosuch.py", "--workdir={}"], "configs/nosuch.py"),
        ([f"--config={ROOT / 'README.md'}", "--workdir={}"], "README.md is not a Python file (.py) with get_config()"),
        ([f"--config={ROOT / 'configs'}", "--workdir={}"], "configs is not a Python file (.py) with get_config()"),
        (["--config=configs/tinystories.py:atention", "--workdir={}"], "did you mean 'attention'"),
        ([CONFIG, "--workdir={}", "--config.model.pattern=attention mpl"], "mpl"),
        ([CONFIG, "--workdir={}", "--config.train.steps=0"], "train.steps=0"),
        ([CONFIG, "--workdir={}", "--config.optim.schedule=cosin"], "cosin"),
        ([CONFIG, "--workdir={}", *TINY, "--config.model.mixers.attention.num_heads=5"], "num_heads"),
        ([CONFIG, "--workdir={}", *TINY, "--config.data.batch_size=0"], "batch_size"),
        ([CONFIG, "--workdir={}", *TINY, "--config.optim.accumulation_steps=3"], "accumulation_steps=3"),
        ([CONFIG, "--workdir={}", *TINY, "--config.mesh.fsdp=64"], "mesh"),
        ([CONFIG, "--workdir={}", *TINY, "--config.data.source=/no/such/data"], "/no/such/data"),
    ],
)
def test_mistakes(argv, expected, tmp_path):
    workdir = tmp_path / "run"
    message = error_of(*(flag.format(workdir) if flag.startswith("--w") else flag for flag in argv))
    assert expected in message
    # A mistake leaves no run behind that would refuse the corrected command.
    assert not (workdir / "config.json").exists()


def test_none_is_a_value_of_every_optional_field_and_of_those_alone():
    optional = [field for field, hint in odd_values.fields().items() if ranges.is_optional(hint)]
    assert "model.mixers.attention.window" in optional and "train.init_from" in optional
    flags = [CONFIG, "--workdir=x", *(f"--config.{field}=None" for field in optional)]
    config, _ = train.parse(["train.py", CONFIG, "--config.optim.decay_steps=5", *flags[1:], "--config.model.logit_cap=30."])
    assert (config.model.vocab_size, config.optim.decay_steps, config.train.init_from) == (None, None, None)
    assert config.model.logit_cap == 30.0, "the last one counts"
    for field in ("train.steps", "data.source", "optim.learning_rate", "model.remat", "optim"):
        assert f"config.{field}" in error_of(CONFIG, "--workdir=x", f"--config.{field}=None")
    assert "no field 'stpes'" in error_of(CONFIG, "--workdir=x", "--config.train.stpes=None")


def test_a_long_value_is_cut():
    assert len(error_of(CONFIG, "--workdir=x", f"--config.optim.schedule={'x' * 10**5}")) < 300
    assert len(error_of(CONFIG, "--workdir=x", f"--config.train.steps={'x' * 10**5}")) < 1100
    assert "at most 2147483647" in error_of(CONFIG, "--workdir=x", f"--config.train.steps={'9' * 4000}")


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError(), "error: out of memory"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "error: too many open files: raise the limit with ulimit -n (x)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), "error: out of memory: RESOURCE_EXHAUSTED"),
        (NotImplementedError("no such\nform"), "error: no such form"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, message):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        command_line.run(fail)
    assert stopped.value.code.startswith(message) and "\n" not in stopped.value.code


def test_the_run_folder_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "run" in error_of(CONFIG, f"--workdir={tmp_path / 'run'}", *TINY)
    assert "run" in error_of(CONFIG, f"--workdir={tmp_path / 'run' / 'below'}", *TINY)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_the_run_folder_is_forbidden(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_of(CONFIG, f"--workdir={tmp_path / 'run'}", *TINY)


@pytest.mark.tools
def test_no_space_left(tmp_path, monkeypatch):
    """For rows, and for a checkpoint: what is there stays, and the run goes on later."""
    argv = [CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.data.cache_dir={tmp_path / 'data'}", *TINY,
            "--config.model.pattern=mlp"]  # fmt: skip

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("seqmodels.training.log.MetricsFile.append", full)
    assert "no space left" in error_of(*argv)
    monkeypatch.undo()

    def full_in_the_background(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 8852 bytes to file 4: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", full_in_the_background)
    assert "no space left in" in error_of(*argv)
    monkeypatch.undo()
    train.main(["train.py", *argv])
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 2


def test_other_data_is_refused(tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_text("The cat sat on the mat.<|endoftext|>" * 50)
    argv = [CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.data.cache_dir={tmp_path / 'data'}", *TINY,
            f"--config.data.source={stories}", "--config.model.pattern=mlp"]  # fmt: skip
    train.main(["train.py", *argv])
    stories.write_text("The dog sat on the mat.<|endoftext|>" * 50)
    assert f"data.source={stories} is not what the run" in error_of(*argv)


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(data, "prepare", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        command_line.run(lambda: train.main(["train.py", CONFIG, f"--workdir={tmp_path}", *TINY]))


@pytest.mark.tools
def test_as_a_person_sees_it(tmp_path):
    """Once as a child process: one line, exit code 1, from any directory."""
    script = Path(train.__file__)
    child = subprocess.run(
        [sys.executable, script, f"--config={script.parent}/configs/tinystories.py", f"--workdir={tmp_path}",
         "--config.train.stpes=3"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert child.returncode == 1 and child.stdout == ""
    assert child.stderr.startswith("error: ") and child.stderr.count("\n") == 1 and "steps" in child.stderr
