"""A run on a synthetic task is a run like any other: trained, resumed and judged, by labels instead of text."""

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import seqmodels
import train
from configs import copying, recall, state_tracking
from seqmodels import config as config_lib
from seqmodels import data
from seqmodels.comparison import scores
from seqmodels.config import from_config_dict
from seqmodels.errors import UserError
from seqmodels.training import loop
from seqmodels.training.loss import cross_entropy_and_correct

ROOT = Path(__file__).resolve().parents[2]
MIX = "((16,2,0),(24,3,0))"
FLAGS = [
    "--config=configs/recall.py:mqar_small", "--config.data.seq_len=24", "--config.data.batch_size=8",
    f"--config.data.tasks.mqar.train_mix={MIX}", "--config.data.tasks.mqar.test_mix=((16,2,24),(48,3,20))",
    "--config.model.d_model=32", "--config.model.repeats=1", "--config.optim.decay_steps=6", "--config.train.log_every_steps=1",
    "--config.train.eval_every_steps=3", "--config.train.checkpoint_every_steps=3", "--config.train.compilation_cache_dir=",
]  # fmt: skip


def train_here(workdir, *flags):
    return loop.train(*train.parse(["train.py", *FLAGS, f"--workdir={workdir}", *flags]))


def arrays_of(workdir, step):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the run folder, the summary) of 6 steps."""
    workdir = tmp_path_factory.mktemp("probe") / "run"
    return workdir, train_here(workdir, "--config.train.steps=6")


@pytest.fixture(scope="module")
def run(trained):
    return seqmodels.load_run(trained[0])


@pytest.mark.tools
def test_scores_of_a_comparison(run):
    """Example by example what run.evaluate() says of all, and halves that make it up."""
    scored, whole = scores.score(run), run.evaluate()
    every = np.ones(len(scored.loss), bool)
    assert scored.segment_names == tuple(whole.segments) and scored.segment_lengths == (16, 48)
    assert scored.tokens.sum() == whole.tokens and np.bincount(scored.segment).tolist() == [24, 20]
    assert scored.mean("errors", every) == pytest.approx(1.0 - whole.accuracy)
    assert scored.mean("loss", every) == pytest.approx(whole.loss, rel=1e-6)
    halves = [scored.mean("errors", half) for half in (scored.reported, ~scored.reported)]
    assert np.mean(halves) == pytest.approx(1.0 - whole.accuracy), "as many examples of each segment in both halves"
    assert scored.measure == "errors"
    values, tokens = scored.sums("errors", scored.reported)
    assert values.sum() / tokens.sum() == pytest.approx(halves[0]) and np.ptp(tokens) > 0
    assert 1.0 - np.mean(scored.accuracy_by_segment()) == pytest.approx(halves[0])


def by_hand(run, batch):
    """Losses in nats and hits of the labelled positions, from all the logits, in float64."""
    logits = np.asarray(run.logits(batch["inputs"]), np.float64)
    log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nats = log_total - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    scored = batch["weights"] > 0
    return nats[scored], (logits.argmax(-1) == batch["targets"])[scored]


def test_rows_have_accuracy_in_place_of_what_text_has(trained):
    workdir, summary = trained
    rows = rows_of(workdir)
    assert [(row["step"], row["split"]) for row in rows] == [
        (1, "train"), (2, "train"), (3, "train"), (3, "validation"), (4, "train"), (5, "train"), (6, "train"), (6, "validation")
    ]  # fmt: skip
    for row in [*rows, summary]:
        assert 0.0 <= row["accuracy"] <= 1.0 and "perplexity" not in row and "bits_per_byte" not in row
    assert {"step", "validation_loss", "tokens_per_second", "parameters", "state_bytes"} <= summary.keys()
    assert summary["task"] == "mqar" and summary["validation_loss"] == rows[-1]["loss"]
    assert list(summary["accuracy_by_segment"]) == ["length 16, 2 pairs", "length 48, 3 pairs"]
    assert {"tokenizer.json", "validation.npz"}.isdisjoint(path.name for path in workdir.iterdir())


def test_loss_and_accuracy_are_those_of_the_labelled_positions(trained, run):
    """Of every segment, and of all as their mean; eval.py's figures are those of the loop."""
    evaluation = run.evaluate()
    for segment, scored in zip(run.validation().segments.values(), evaluation.segments.values()):
        nats, hits = map(np.concatenate, zip(*(by_hand(run, b) for b in segment.batches(8, segment.segment.length))))
        assert scored.tokens == len(nats) == segment.segment.examples * segment.segment.difficulty
        assert scored.loss == pytest.approx(nats.mean(), rel=1e-5)
        assert scored.accuracy == pytest.approx(hits.mean(), abs=1e-12)
        assert np.nansum(scored.accuracy_by_position) >= scored.accuracy
    assert evaluation.loss == pytest.approx(np.mean([each.loss for each in evaluation.segments.values()]))
    assert evaluation.loss == pytest.approx(trained[1]["validation_loss"], rel=1e-6)
    assert evaluation.scores["accuracy_by_segment"] == pytest.approx(trained[1]["accuracy_by_segment"])


def test_the_loss_of_a_training_step_is_that_of_its_labels(tmp_path, run):
    """By the row of step 1, from the parameters that the seed gives, on the batch that the seed and the step give."""
    config = run.config
    dataset = data.prepare(config.data, seed=config.seed)
    fresh = dataclasses.replace(run, params=run.trainer.init()["params"])
    nats, hits = by_hand(fresh, dataset.train_batch(0))
    first = rows_of(run.workdir)[0]
    assert len(nats) == 8 * 2
    assert first["loss"] == pytest.approx(nats.mean(), rel=1e-5) and first["accuracy"] == pytest.approx(hits.mean())


def test_resuming_is_exact(trained, tmp_path):
    train_here(tmp_path / "run", "--config.train.steps=3")
    summary = train_here(tmp_path / "run", "--config.train.steps=6")
    ours, whole = arrays_of(tmp_path / "run", 6), arrays_of(trained[0], 6)
    assert ours.keys() == whole.keys() and all(ours[name].tobytes() == whole[name].tobytes() for name in whole)
    assert summary["accuracy_by_segment"] == trained[1]["accuracy_by_segment"]
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [row["loss"] for row in rows_of(trained[0])]


def test_another_generator_is_noticed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data.TaskDataset, "fingerprint", "another")
    with pytest.raises(UserError, match="data.task=mqar is not what the run in"):
        train_here(trained[0], "--config.train.steps=6")


def evaluate(monkeypatch, capsys, *flags):
    """(the last line of eval.py, its stderr)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    out, err = capsys.readouterr()
    return (ended.value.code, err) if ended.value.code else (json.loads(out.splitlines()[-1]), err)


def test_eval_ends_with_one_json_line(trained, run, monkeypatch, capsys):
    row, err = evaluate(monkeypatch, capsys, f"--workdir={trained[0]}")
    expected = run.evaluate()
    assert row["step"] == 6 and row["task"] == "mqar" and row["validation_tokens"] == 24 * 2 + 20 * 3
    assert row["validation_loss"] == pytest.approx(expected.loss) and row["accuracy"] == expected.accuracy
    assert row["accuracy_by_segment"] == expected.scores["accuracy_by_segment"]
    assert "perplexity" not in row and row["state_bytes"] == run.state_bytes()
    assert "of the labels of mqar" in err and "length 48, 3 pairs" in err
    assert (trained[0] / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_other_lengths_are_a_flag(trained, run, monkeypatch, capsys):
    row, _ = evaluate(monkeypatch, capsys, f"--workdir={trained[0]}", "--lengths=48,16", "--max_tokens=2000")
    assert list(row["lengths"]) == ["16", "48"] and row["trained_at"] == 24
    for length, scored in row["lengths"].items():
        assert 0.0 <= scored["accuracy"] <= 1.0 and math.isfinite(scored["validation_loss"])
        assert scored["state_bytes"] == run.state_bytes(int(length))
    assert (trained[0] / "extrapolation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lengths=15"], "data.task=mqar has no examples of 15 tokens"),
        (["--lengths=many"], "'many' is not a list of lengths"),
        (["--data=toy"], "is a run on data.task=mqar, not on text"),
    ],
)
def test_mistakes_of_eval(trained, monkeypatch, capsys, flags, message):
    said, _ = evaluate(monkeypatch, capsys, f"--workdir={trained[0]}", *flags)
    assert said.startswith("error: ") and message in said and "\n" not in said


def test_there_is_no_text_to_write(run):
    with pytest.raises(UserError, match="data.task=mqar, which has no text"):
        run.generate("Once upon a time")


def test_a_hit_is_a_logit_above_every_other():
    hidden = np.diag([1.0, 1.0, np.nan]).astype(np.float32)[None]
    kernel = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    for targets, hits in (([0, 0, 1], 1.0), ([1, 1, 1], 0.0)):
        _, found, weight = cross_entropy_and_correct(hidden, kernel, np.array([targets]))
        assert (found, weight) == (hits, 3.0), "neither a tie nor a NaN is a hit"


# -- configs ----------------------------------------------------------------------------------------------------------

SETTINGS = [(module, name) for module in (recall, copying, state_tracking) for name in module.SETTINGS]


@pytest.mark.parametrize("module, name", SETTINGS, ids=[name for _, name in SETTINGS])
def test_every_setting_is_complete_and_survives_its_json(module, name, tmp_path):
    config = from_config_dict(module.get_config(name))
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json") == config and hash(config) == hash(config)
    assert [task for task, _ in config.data.tasks] == [config.data.task]
    batch = data.prepare(dataclasses.replace(config.data, batch_size=2), seed=0).train_batch(0)
    assert batch["weights"].any() and batch["inputs"].shape == (2, config.data.seq_len)


def test_the_published_settings():
    a = from_config_dict(recall.get_config("mqar_a"))
    assert a.train.steps == 64 * 195 and a.data.synthetic_task.train_segments(64)[0].difficulty == 4
    b = from_config_dict(recall.get_config("mqar_b"))
    assert [segment.difficulty for segment in b.data.synthetic_task.train_segments(256)] == [4, 8, 16, 32, 64]
    assert [(s.length, s.difficulty) for s in b.data.synthetic_task.test_segments(256)][-1] == (1024, 256)
    assert 22_000 < b.train.steps < 23_000  # "about 22.5 thousand"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.data.task=mqra"], "there is no task 'mqra'; did you mean 'mqar'?"),
        (["--config.train.sample_every_steps=5"], "data.task=mqar has no text to write: set train.sample_every_steps=0"),
        (["--config.data.tasks.mqar.pair=3"], "pairs"),
        (["--config.data.seq_len=22"], "data.seq_len is 22, but the task's training examples have up to 24 tokens"),
        (["--config.model.readout=last"], "model.readout='last': data.task=mqar asks for 'each'"),
        (["--config.model.readout=first"], "model.readout='first' is not one of each, last"),
        (["--config=configs/recall.py:mqar_c"], "there is no setting 'mqar_c'; known: mqar_small"),
    ],
)
def test_mistakes_of_train(tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        train_here(tmp_path / "run", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.tools
def test_compression_is_read_off_the_last_position(tmp_path):
    """All labels come from one vector: whatever token changes, every position knows of it."""
    config = copying.get_config("compression")
    config.update_from_flattened_dict({
        "data.seq_len": 8, "data.batch_size": 4, "model.d_model": 32, "model.repeats": 1, "model.pattern": "linear_attention",
        "model.mixers.attention.num_heads": 4, "train.steps": 1, "train.compilation_cache_dir": "",
    })  # fmt: skip
    assert 0.0 <= loop.train(from_config_dict(config), tmp_path / "run")["accuracy"] <= 1.0
    run = seqmodels.load_run(tmp_path / "run")
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 15]], np.int32)
    logits, changed = (np.asarray(run.logits(each)) for each in (tokens, np.where(tokens == 7, 9, tokens)))
    assert (np.abs(logits - changed).max(axis=-1) > 0).all(), "every position sees the seventh token"
    assert np.abs(np.diff(logits, axis=1)).max() > 0, "and knows its own number"
