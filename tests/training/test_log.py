"""metrics.jsonl has each row once, whatever a kill left behind; speeds leave out compilation and pauses."""

import json
import math
import os
import struct
import time

import pytest
from tensorboardX.proto import event_pb2

from seqmodels.errors import UserError
from seqmodels.evaluation.perplexity import text_scores
from seqmodels.training.log import (
    Log,
    MetricsFile,
    SamplesFile,
    Stopwatch,
    peak_flops_per_second,
)
from seqmodels.training.loggers import TensorBoard


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(workdir, step, **options):
    return Log(
        workdir, step=step, total_steps=10, tokens_per_step=64, flops_per_token=1e3, flops_per_second=1e9, **options,
    )  # fmt: skip


def train_to(log, first, last):
    for step in range(first, last + 1):
        log.stopwatch.step()
        log.progress(step)
        log.train(step, loss=1.0 / step, scores=text_scores(1.0 / step, 2.0), gradient_norm=1.0, learning_rate=1e-3)


def test_rows_beyond_the_checkpoint_are_written_once(tmp_path):
    log = open_log(tmp_path, 0)
    train_to(log, 1, 7)
    log.validation(5, loss=0.5, scores=text_scores(0.5, 2.0), tokens_per_second=10.0)
    log.sample(5, "Once upon a time")
    log.sample(6, "there was")
    log.close()
    log = open_log(tmp_path, 5, seconds=2.5)
    assert log.evaluation(5)["loss"] == 0.5 and log.has_sample(5) and not log.has_sample(6)
    train_to(log, 6, 8)
    log.close()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert sorted(row["step"] for row in rows if row["split"] == "train") == list(range(1, 9))
    assert [row["step"] for row in rows if row["split"] == "validation"] == [5]
    assert rows[-1]["tokens"] == 8 * 64 and rows[-1]["seconds"] > 2.5
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(1 / 8))
    assert rows[-1]["bits_per_byte"] == pytest.approx(1 / 8 / math.log(2) / 2)
    assert rows[-1]["mfu"] == pytest.approx(rows[-1]["tokens_per_second"] * 1e3 / 1e9)
    assert (tmp_path / "samples.txt").read_text() == "=== step 5\nOnce upon a time\n\n"


def row(step, loss):
    return {"step": step, "split": "train", "loss": loss, "tokens": 64 * step, "seconds": 0.5}


@pytest.mark.parametrize(
    "damage",
    [
        '{"step": 3, "split": "tr', '{"step": 3}\n', "\x00\n", "null\n", "\n",
        # A byte that changed in the name of a number, in its value, in the step.
        json.dumps(row(3, 1.0)).replace("loss", "lors") + "\n", json.dumps(row(3, 1.0)).replace("tokens", "tokemr") + "\n",
        json.dumps(row(3, "1.0")) + "\n", json.dumps(row(True, 1.0)) + "\n", json.dumps(row(-3, 1.0)) + "\n",
    ],
)  # fmt: skip
def test_a_torn_line_is_repaired(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(row(step, loss)) + "\n" for step, loss in ((1, 2.5), (2, 1.5)))
    path.write_text(whole + damage)
    file = MetricsFile(path, last_step=9)
    assert path.read_text() == whole
    file.append(row(3, 1.0))
    file.close()
    assert [row["loss"] for row in rows_of(path)] == [2.5, 1.5, 1.0]


def test_a_kill_while_rewriting_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(row(step, 1.0)) + "\n" for step in (1, 2, 3))
    path.write_text(text)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, last_step=2)
    assert path.read_text() == text
    monkeypatch.undo()
    assert [row["step"] for row in MetricsFile(path, last_step=2).rows] == [1, 2]


def test_rows_are_json_even_when_numbers_are_not_finite(tmp_path):
    log = open_log(tmp_path, 0)
    log.stopwatch.step()
    log.validation(1, loss=800.0, scores={"perplexity": math.inf, "bits_per_byte": math.nan}, tokens_per_second=1.0)
    log.close()
    [row] = rows_of(tmp_path / "metrics.jsonl")
    assert row["perplexity"] is None and row["bits_per_byte"] is None and row["loss"] == 800.0


def events_of(directory):
    """Every event in a folder, in the order of writing; a record is length, crc, content, crc."""
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            [length] = struct.unpack_from("<Q", content)
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_events_are_written_at_once_and_purged_on_resume(tmp_path):
    log = open_log(tmp_path, 0)
    train_to(log, 1, 3)
    log.sample(3, "Once upon a time")
    log.validation(3, loss=math.nan, scores={"bits_per_byte": 1.0}, tokens_per_second=10.0)
    # Not closed: as if killed.
    events = list(events_of(tmp_path / "tensorboard"))
    points = ((event.step, point) for event in events for point in event.summary.value)
    scalars = {(step, point.tag): point.simple_value for step, point in points}
    assert scalars[3, "train/loss"] == pytest.approx(1 / 3) and (3, "train/gradient_norm") in scalars
    assert (3, "validation/bits_per_byte") in scalars and (3, "validation/loss") not in scalars
    assert (3, "sample/text_summary") in scalars
    resumed = TensorBoard(tmp_path, last_step=2, hyperparameters={})
    *_, last = events_of(tmp_path / "tensorboard")
    assert last.session_log.status == event_pb2.SessionLog.START and last.step == 3
    resumed.close()


KINDS = {"metrics.jsonl": MetricsFile, "samples.txt": SamplesFile}
ROW = {"step": 1, "split": "train", "loss": 1.0, "tokens": 1, "seconds": 1.0}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, name):
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        put(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.* is a (pipe|device|folder)"):
            KINDS[name](tmp_path / name, last_step=1)
        os.rmdir(tmp_path / name) if (tmp_path / name).is_dir() else os.unlink(tmp_path / name)


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_link_in_the_folder_leads_no_row_outside(tmp_path, name, is_there):
    precious = tmp_path / "precious"
    text = "=== step 1\nx\n\n" if name == "samples.txt" else json.dumps(ROW) + "\n"
    if is_there:
        precious.write_text(text)
    (tmp_path / name).symlink_to(precious)
    file = KINDS[name](tmp_path / name, last_step=1)
    file.append(2, "more") if name == "samples.txt" else file.append(ROW | {"step": 2})
    assert precious.exists() == is_there and (not is_there or precious.read_text() == text)
    assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_text().count("step") == 1 + is_there


def test_samples_of_later_steps_are_cut(tmp_path):
    path = tmp_path / "samples.txt"
    samples = SamplesFile(path, last_step=0)
    samples.append(10, "A cat\n\nsat.")
    samples.append(20, "A dog ran.")
    assert SamplesFile(path, last_step=20).steps == [10, 20]
    assert SamplesFile(path, last_step=19).steps == [10]
    assert path.read_text() == "=== step 10\nA cat\n\nsat.\n\n"


def test_a_sample_may_hold_what_looks_like_a_heading(tmp_path):
    path = tmp_path / "samples.txt"
    samples = SamplesFile(path, last_step=0)
    samples.append(5, "=== step 7\nOnce\n=== step 90\nupon a time")
    samples.append(10, "A dog ran.")
    written = path.read_text()
    assert SamplesFile(path, last_step=10).steps == [5, 10]
    assert path.read_text() == written and "upon a time" in written


def test_speed_leaves_out_compilation_and_pauses(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(seconds=100.0)
    now = 30.0
    watch.step()  # compiled
    for now in (31.0, 32.0):  # noqa: B007 (the clock reads it)
        watch.step()
    now = 50.0  # an evaluation
    watch.resume()
    now = 51.0
    watch.step()
    assert watch.steps_per_second() == 1.0
    assert watch.seconds == 103.0


def test_peak_flops_of_known_devices():
    class Device:
        def __init__(self, platform, device_kind):
            self.platform, self.device_kind = platform, device_kind

    assert peak_flops_per_second([Device("gpu", "NVIDIA H200")] * 2) == 2 * 989e12
    assert peak_flops_per_second([Device("tpu", "TPU v5 lite")]) == 197e12
    assert peak_flops_per_second([Device("gpu", "some other")]) is None
    assert peak_flops_per_second([Device("cpu", "cpu")]) is None


@pytest.mark.parametrize("damage", ["shortened", "changed", "deleted"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_damaged_file_is_noticed_and_kept(tmp_path, name, damage, capsys):
    log = open_log(tmp_path, 0)
    train_to(log, 1, 2)
    log.sample(2, "Once upon a time")
    written = log.written()
    train_to(log, 3, 4)
    log.sample(4, "There was a cat")
    log.close()
    path = tmp_path / name
    data = path.read_bytes()
    open_log(tmp_path, 2, written=written).close()
    assert "is not what was written" not in capsys.readouterr().err, "rows after the checkpoint are no damage"
    whole = path.read_bytes()
    assert data.startswith(whole) and len(whole) == written[name]["bytes"]
    damaged = {"shortened": whole[:-20], "changed": whole.replace(b"1", b"7", 1).replace(b"O", b"P", 1), "deleted": b""}[damage]
    path.write_bytes(damaged)
    if damage == "deleted":
        path.unlink()
    open_log(tmp_path, 2, written=written).close()
    said = capsys.readouterr().err
    assert f"{path} is not what was written up to step 2" in said
    kept = list(tmp_path.glob(f"{name}.damaged*"))
    assert [file.read_bytes() for file in kept] == ([] if damage == "deleted" else [damaged])
    # What is there now is what the next checkpoint expects.
    log = open_log(tmp_path, 2)
    assert path.stat().st_size == log.written()[name]["bytes"] if path.exists() else True
    log.close()
