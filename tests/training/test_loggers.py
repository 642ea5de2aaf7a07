"""Where figures go beside metrics.jsonl, what a profile is, and what a sample begins with."""

import os
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from seqmodels import data
from seqmodels.config import TrainConfig
from seqmodels.errors import UserError
from seqmodels.training import loggers, loop
from seqmodels.training.profile import Profiler
from tests.configs import tiny

pytestmark = pytest.mark.tools


def summaries(directory):
    for path in sorted(directory.glob("events*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield from event_pb2.Event.FromString(content[12 : 12 + length]).summary.value
            content = content[16 + length :]


def hparams(directory):
    found = {}
    for value in summaries(directory):
        if value.metadata.plugin_data.plugin_name == "hparams":
            found[value.tag] = plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
    return found


def small(folder, **overrides):
    return tiny(**{
        "data.cache_dir": str(folder / "cache"), "data.toy_documents": 40, "data.seq_len": 16, "data.batch_size": 2,
        "model.repeats": 1, "train.steps": 3, "train.eval_tokens": 64, "train.sample_every_steps": 0,
    } | overrides)  # fmt: skip


def test_what_is_logged_may_be_named_in_bytes_that_are_not_utf8(tmp_path):
    several = loggers.Loggers(["tensorboard"], tmp_path, last_step=0, hyperparameters={"data.source": "caf\udce9.txt"})
    several.text(1, "sample", "half \ud83d")
    several.final({"loss": 1.0})
    several.close()
    values = hparams(tmp_path / "tensorboard")["_hparams_/session_start_info"].session_start_info.hparams
    assert values["data.source"].string_value == "caf\ufffd.txt"


def test_a_run_has_its_hyperparameters_metrics_and_profile(tmp_path):
    summary = loop.train(small(tmp_path, **{"train.profile_steps": "1:3"}), tmp_path / "run")
    found = hparams(tmp_path / "run" / "tensorboard")
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert values["optim.learning_rate"].number_value == 2e-3 and values["model.pattern"].string_value == "attention mlp"
    metrics = {info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos}
    assert {"final/loss", "final/bits_per_byte"} <= metrics
    last = {value.tag: value.simple_value for value in summaries(tmp_path / "run" / "tensorboard") if value.tag == "final/loss"}
    assert last["final/loss"] == pytest.approx(summary["validation_loss"])
    [profile] = (tmp_path / "run" / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    assert b"PjitFunction" in profile.read_bytes()  # the call of a compiled program, in the host's timeline


def test_a_profile_is_ended_where_the_run_ends_first(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    profiler = Profiler((2, 5), tmp_path)
    for step in range(4):
        profiler.before(step)
        profiler.after(step + 1, lambda: calls.append("wait"))
    profiler.close()
    profiler.close()
    assert calls == ["start", "stop"]
    profiler = Profiler((2, 4), tmp_path)
    for step in range(6):
        profiler.before(step)
        profiler.after(step + 1, lambda: calls.append("wait"))
    assert calls == ["start", "stop", "start", "wait", "stop"]


@pytest.mark.parametrize(
    ("first", "end", "said"),
    [
        (0, 9, None),
        (3, 3, None),
        (2, 4, "ends with the run, after step 3"),
        (0, 2, "last step is 1"),
        (3, 9, "goes on from step 3"),
    ],
)
def test_a_profile_that_the_run_does_not_reach_is_said(tmp_path, first, end, said):
    problem = Profiler((2, 5), tmp_path).problem(first, end)
    assert (problem is None) if said is None else (problem.startswith("train.profile_steps=2:5") and said in problem)
    assert Profiler(None, tmp_path).problem(first, end) is None


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("loggers", "tensorbord", "did you mean 'tensorboard'"),
        ("profile_steps", "10", "must be FIRST:END"),
        ("profile_steps", "13:10", "must be FIRST:END"),
    ],
)
def test_a_mistake_is_named(field, value, wrong):
    with pytest.raises(UserError, match=wrong):
        TrainConfig(**{field: value})


def test_loggers_by_name():
    assert TrainConfig(loggers="wandb, tensorboard,wandb").logger_names == ("wandb", "tensorboard")
    assert TrainConfig(loggers="").logger_names == () and set(loggers.KINDS) == {"tensorboard", "wandb"}


def test_a_logger_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        loop.train(small(tmp_path, **{"train.loggers": "wandb"}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


USE = """
import sys
from pathlib import Path
from seqmodels.training import loggers
log = loggers.WandB(Path(sys.argv[1]), last_step=0, hyperparameters={"optim.learning_rate": 1e-3, "optim.rate_changes": ()})
log.scalars(1, {"train/loss": 2.0})
log.text(1, "sample", "Once")
log.final({"loss": 1.5})
log.close()
"""


def test_weights_and_biases_offline(tmp_path):
    settings = {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE, tmp_path], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    [record] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert (tmp_path / "wandb_id").read_text() in record.name
    content = record.read_bytes()
    assert all(name in content for name in (b"train/loss", b"learning_rate", b"final/loss"))


def test_a_sample_begins_as_the_data_do(tmp_path):
    text = tmp_path / "laws.txt"
    text.write_text("".join(f"The court of appeal held in case {n} that it was so.<|endoftext|>" for n in range(60)))
    for source, prompt in ((str(text), "The court of appeal"), ("toy", "Once upon a time")):
        config = small(tmp_path, **{"data.source": source, "data.tokenizer": "bytes"})
        assert data.prepare(config.data, seed=0).prompt == prompt
