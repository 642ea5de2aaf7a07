"""A run that is killed, stopped or damaged, and started again, ends as if nothing had happened.

Real child processes are killed, so that the operating system, not our imagination, decides what is left: in `make test-tools`.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, loop, run_folder

ROOT = Path(train.__file__).parent
STEPS = 30
TINY = {
    "data.source": "toy", "data.toy_documents": 60, "data.tokenizer": "bytes", "data.seq_len": 32,
    "data.batch_size": 4, "model.d_model": 32, "model.repeats": 2, "model.dropout": 0.1,
    "optim.warmup_steps": 5, "train.steps": STEPS, "train.log_every_steps": 1, "train.eval_every_steps": 10,
    "train.eval_tokens": 512, "train.checkpoint_every_steps": 5, "train.sample_every_steps": 15,
}  # fmt: skip


def arguments(workdir, folder, **changes):
    """A command line for a tiny run; `folder` holds its tokens, the environment says where its programs are."""
    cache = {"data.cache_dir": folder / "data"}
    values = TINY | cache | {name.replace("__", "."): value for name, value in changes.items()}
    config = [f"--config.{name}={value}" for name, value in values.items()]
    return ["train.py", "--config=configs/tinystories.py:attention", f"--workdir={workdir}", *config]


def start(argv, **environment):
    return subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip


def finish(argv, **environment):
    """Run to the end: (the summary on stdout, stderr)."""
    child = start(argv, **environment)
    out, err = child.communicate(timeout=900)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def train_here(argv):
    """The same, in this process, which saves the seconds that a new one takes to start."""
    return loop.train(*train.parse(argv))


def rows_of(workdir):
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [(row["step"], row["split"]) for row in rows]
    assert len(set(keys)) == len(keys), "a step was written twice"
    return dict(zip(keys, rows))


def last_row(workdir):
    """The last step of which a row is written, whatever else the file holds; 0 for none."""
    path = workdir / "metrics.jsonl"
    return max(map(int, re.findall(r'"step": (\d+), ', path.read_text())), default=0) if path.exists() else 0


def wait_for_row(child, workdir, step, *, seconds=900.0):
    """Wait until the run has written a row of this step, or has ended, or so many seconds are over."""
    end = time.monotonic() + seconds
    while child.poll() is None and last_row(workdir) < step and time.monotonic() < end:
        time.sleep(0.005)


def last_arrays(workdir):
    """The step of the newest checkpoint, and its arrays by path, as numpy."""
    newest = max(checkpoint.steps(workdir / "checkpoints"))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(workdir / "checkpoints" / str(newest) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return newest, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, reference):
    """The same parameters and optimizer state bit for bit, and the same rows and samples, each once."""
    (step, arrays), (reference_step, reference_arrays) = last_arrays(workdir), last_arrays(reference)
    assert step == reference_step and arrays.keys() == reference_arrays.keys()
    for name, array in arrays.items():
        assert array.tobytes() == reference_arrays[name].tobytes(), name
    rows, reference_rows = rows_of(workdir), rows_of(reference)
    assert rows.keys() == reference_rows.keys()
    for key, row in rows.items():
        for name in ("loss", "perplexity", "bits_per_byte", "tokens"):
            assert row[name] == reference_rows[key][name], (key, name)
    assert (workdir / "samples.txt").read_text() == (reference / "samples.txt").read_text()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that was left alone: (its folder, its summary, its stderr, seconds until its first step)."""
    folder = tmp_path_factory.mktemp("reference")
    begun = time.monotonic()
    child = start(arguments(folder / "run", folder))
    wait_for_row(child, folder / "run", 1)
    seconds = time.monotonic() - begun
    out, err = child.communicate(timeout=900)
    assert child.returncode == 0, err
    return folder / "run", json.loads(out.splitlines()[-1]), err, seconds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The same in this process: (its folder, its summary)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", train_here(arguments(folder / "run", folder))


def kill(reference, folder, stages, *, seed):
    """Kill a run at each of the stages, at a random time as it starts or as it trains; the command line that goes on."""
    workdir, rng = folder / "run", random.Random(seed)
    argv = arguments(workdir, folder)
    for stage in stages:
        last = last_row(workdir)
        child = start(argv)
        if stage == "trains":
            wait_for_row(child, workdir, rng.randint(last + 1, (last + STEPS) // 2))
            time.sleep(rng.uniform(0.0, 0.03))
        else:
            # Importing, tokenising, compiling; on a machine that has become faster, the first step.
            wait_for_row(child, workdir, 1, seconds=rng.uniform(0.0, reference[3]))
        assert child.poll() is None, "it ended before it could be killed"
        child.kill()
        child.communicate()
    return argv


def assert_goes_on(reference, folder, argv, goes_on):
    summary = goes_on(argv)
    assert_same_run(folder / "run", reference[0])
    assert summary["validation_loss"] == reference[1]["validation_loss"]


@pytest.mark.tools
def test_killed_as_it_trains(reference, tmp_path):
    argv = kill(reference, tmp_path, ["trains"], seed=0)
    assert_goes_on(reference, tmp_path, argv, train_here)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed else pytest.mark.tools) for seed in range(8)])
def test_killed_three_times(reference, tmp_path, seed):
    argv = kill(reference, tmp_path, ["starts", "trains", "trains"], seed=seed)
    assert_goes_on(reference, tmp_path, argv, lambda argv: finish(argv)[0])


@pytest.mark.tools
def test_what_a_run_says_and_leaves(reference):
    workdir, summary, err, _ = reference
    assert {"step", "validation_loss", "perplexity", "bits_per_byte", "tokens_per_second", "parameters",
            "state_bytes"} <= summary.keys()  # fmt: skip
    rows = rows_of(workdir)
    assert summary["step"] == STEPS and summary["validation_loss"] == rows[STEPS, "validation"]["loss"]
    assert [step for step, split in rows if split == "train"] == list(range(1, STEPS + 1))
    assert [step for step, split in rows if split == "validation"] == [10, 20, 30]
    assert rows[STEPS, "train"]["loss"] < 0.8 * rows[1, "train"]["loss"]
    train_rows = [row for row in rows.values() if row["split"] == "train"]
    assert all(row["mfu"] is None and row["gradient_norm"] > 0 for row in train_rows)
    left = {"config.json", "metrics.jsonl", "checkpoints", "tokenizer.json", "validation.npz", "samples.txt"}
    assert left <= {path.name for path in workdir.iterdir()}
    assert err.splitlines().count("   forms  softmax_attention: chunked") == 1  # how the step was computed, said once
    assert f"step {STEPS}/{STEPS}: loss" in err and "Traceback" not in err and "Warning" not in err


@pytest.mark.tools
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(reference, tmp_path, number, code):
    """Until it has ended, the process holds its folder's lock."""
    workdir = tmp_path / "run"
    argv = arguments(workdir, reference[0].parent)
    child = start(argv)
    wait_for_row(child, workdir, 12)
    assert run_folder.is_locked(workdir)
    child.send_signal(number)
    out, err = child.communicate(timeout=900)
    assert child.returncode == code and out == "" and "Traceback" not in err
    assert not run_folder.is_locked(workdir)
    stopped_at = max(step for step, split in rows_of(workdir))
    assert max(checkpoint.steps(workdir / "checkpoints")) == stopped_at < STEPS
    assert f"python {shlex.join(argv)}" in err
    train_here(argv)
    assert_same_run(workdir, reference[0])


def copy_of(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", arguments(tmp_path / "run", finished[0].parent)


def test_a_finished_run_trains_nothing(finished, tmp_path, monkeypatch):
    workdir, argv = copy_of(finished, tmp_path)
    monkeypatch.setattr(loop._Run, "train_one_step", None)
    assert train_here(argv) == finished[1]
    assert_same_run(workdir, finished[0])


def test_a_damaged_checkpoint_costs_one_interval(finished, tmp_path, capsys):
    workdir, argv = copy_of(finished, tmp_path)
    newest = workdir / "checkpoints" / str(STEPS)
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train_here(argv)
    err = capsys.readouterr().err
    assert re.search(rf"checkpoints/{STEPS} cannot be restored", err) and f"step {STEPS - 5} instead" in err
    assert_same_run(workdir, finished[0])


def test_nothing_to_restore_is_not_a_fresh_start(finished, tmp_path):
    workdir, argv = copy_of(finished, tmp_path)
    for step in checkpoint.steps(workdir / "checkpoints"):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train_here(argv)
    assert rows_of(workdir) == rows_of(finished[0])


def test_what_only_reports_may_change(finished, tmp_path):
    workdir, _ = copy_of(finished, tmp_path)
    argv = arguments(workdir, finished[0].parent, train__log_every_steps=7, train__checkpoint_every_steps=11)
    assert train_here(argv) == finished[1]
    assert json.loads((workdir / "config.json").read_text())["train"]["log_every_steps"] == 7


def test_a_run_of_another_config_is_refused(finished, tmp_path):
    workdir, _ = copy_of(finished, tmp_path)
    argv = arguments(workdir, finished[0].parent, model__d_model=64, optim__beta1=0.5)
    with pytest.raises(UserError, match="config: model.d_model 32 -> 64, optim.beta1 0.9 -> 0.5; choose"):
        train_here(argv)


@pytest.mark.tools
def test_more_steps_only_where_the_schedule_allows(finished, tmp_path, capsys):
    """A run may be extended when the steps done would have had the same learning rates."""
    workdir, _ = copy_of(finished, tmp_path)
    longer = {"train__steps": STEPS + 10, "train__eval_every_steps": 40}
    argv = arguments(workdir, finished[0].parent, **longer)
    with pytest.raises(UserError, match="learning rates of the 30 steps .*--config.optim.decay_steps=30"):
        train_here(argv)
    argv = arguments(workdir, finished[0].parent, optim__decay_steps=STEPS, **longer)
    assert train_here(argv)["step"] == STEPS + 10
    assert "train.steps 30 -> 40: the run goes on to step 40" in capsys.readouterr().err
    # It is the run that would have been.
    whole = tmp_path / "whole"
    train_here(arguments(whole, finished[0].parent, optim__decay_steps=STEPS, **longer))
    (_, extended), (_, straight) = last_arrays(workdir), last_arrays(whole)
    assert all(extended[name].tobytes() == straight[name].tobytes() for name in straight)
    with pytest.raises(UserError, match="less than the 40 steps done"):
        train_here(arguments(workdir, finished[0].parent))


@pytest.mark.tools
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    argv = arguments(workdir, finished[0].parent)
    train_one_step = loop._Run.train_one_step

    def poisoned(run):
        if run.step == 13:
            run.state["params"]["embedding"] = run.state["params"]["embedding"].at[0, 0].set(np.nan)
        train_one_step(run)

    monkeypatch.setattr(loop._Run, "train_one_step", poisoned)
    with pytest.raises(UserError, match="step 14: the loss is nan.*step 10 is saved"):
        train_here(argv)
    assert checkpoint.steps(workdir / "checkpoints") == [5, 10]
    monkeypatch.undo()
    train_here(argv)
    assert_same_run(workdir, finished[0])


@pytest.mark.tools
def test_a_signal_during_an_evaluation_leaves_it_for_later(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    argv = arguments(workdir, finished[0].parent)
    monkeypatch.setattr(loop.perplexity, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(loop.Stopped):
        train_here(argv)
    assert checkpoint.steps(workdir / "checkpoints") == [5, 10] and (10, "validation") not in rows_of(workdir)
    monkeypatch.undo()
    train_here(argv)
    assert_same_run(workdir, finished[0])


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []  # that the process would have ended with; whichever thread says so
    monkeypatch.setattr(os, "_exit", codes.append)
    with loop.Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(loop.Stopped):
            signals.check()
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.05)
            if codes:
                break
    assert codes[:1] == [130]


@pytest.mark.tools
def test_another_number_of_devices_goes_on(finished, tmp_path):
    """A run begun on two devices, parameters split over them, ends on one."""
    workdir, folder = tmp_path / "run", finished[0].parent
    fewer = {"optim__decay_steps": STEPS, "train__sample_every_steps": 0}
    begun = arguments(workdir, folder, train__steps=5, mesh__fsdp=2, **fewer)
    finish(begun, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    train_here(arguments(workdir, folder, train__steps=9, **fewer))
    rows, finished_rows = rows_of(workdir), rows_of(finished[0])
    for step in range(1, 10):
        assert rows[step, "train"]["loss"] == pytest.approx(finished_rows[step, "train"]["loss"], rel=1e-4)


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_per_folder(finished, tmp_path):
    """That a run holds its lock, `test_a_signal_saves_and_says_how_to_go_on` says."""
    workdir, argv = copy_of(finished, tmp_path)
    holder = [sys.executable, "-c", HOLDER, workdir / run_folder.LOCK_NAME]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training"):
            train_here(argv)
