"""A run of several processes, started as docs/scaling.md has it: stopped, killed, and resumed with another number of processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from seqmodels.training import checkpoint, loop

ROOT = Path(train.__file__).parent
TINY = {
    "data.source": "toy", "data.toy_documents": 40, "data.tokenizer": "bytes", "data.seq_len": 8, "data.batch_size": 4,
    "model.d_model": 32, "model.repeats": 1, "model.pattern": "attention", "optim.warmup_steps": 2, "optim.decay_steps": 50,
    "train.log_every_steps": 1, "train.eval_every_steps": 1, "train.eval_tokens": 64, "train.checkpoint_every_steps": 4,
    "train.sample_every_steps": 0,
}  # fmt: skip
FAST = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MOST_SECONDS = 60
"""From a signal to the end of all processes: none waits for another that has gone, which once took 8.5 minutes."""

pytestmark = pytest.mark.tools


def arguments(folder, steps):
    caches = {"data.cache_dir": folder / "data", "train.compilation_cache_dir": folder / "xla"}
    config = [f"--config.{name}={value}" for name, value in (TINY | caches | {"train.steps": steps}).items()]
    return ["train.py", "--config=configs/tinystories.py:attention", f"--workdir={folder / 'run'}", *config]


class Processes:
    """train.py, started once for each process; `own`: what each of them has on its command line alone."""

    def __init__(self, argv, count=2, own=lambda index: ()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children = [
            subprocess.Popen(
                [
                    sys.executable,
                    *argv,
                    *own(index),
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num_processes={count}",
                    f"--process_id={index}",
                ],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST},
            )  # fmt: skip
            for index in range(count)
        ]

    def wait_for_rows(self, workdir, number):
        deadline = time.monotonic() + 600
        while len(rows_of(workdir)) < number:
            if any(child.poll() is not None for child in self.children) or time.monotonic() > deadline:
                raise AssertionError(self.end())
            time.sleep(0.01)

    def end(self):
        """Of each process: its exit code, stdout and stderr."""
        texts = [child.communicate(timeout=600) for child in self.children]
        return [(child.returncode, *text) for child, text in zip(self.children, texts, strict=True)]


def rows_of(workdir):
    """Of metrics.jsonl: loss by (step, split), each written once."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    losses = {(row["step"], row["split"]): row["loss"] for row in rows}
    assert len(losses) == len(rows), "a row was written twice"
    return losses


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened: the ends of two processes told to stop, and of two of which one was killed; then the folder and its summary."""
    folder = tmp_path_factory.mktemp("processes")
    workdir, argv = folder / "run", arguments(folder, 10**6)

    running = Processes(argv)
    running.wait_for_rows(workdir, 5)
    begun = time.monotonic()
    running.children[1].send_signal(signal.SIGTERM)
    stopped = running.end()
    seconds = {"stopped": time.monotonic() - begun}
    stopped_at = checkpoint.steps(workdir / "checkpoints")[-1]

    running = Processes(argv)
    running.wait_for_rows(workdir, 2 * stopped_at + 3)
    begun = time.monotonic()
    running.children[1].kill()
    killed = running.end()
    seconds["killed"] = time.monotonic() - begun

    steps = checkpoint.steps(workdir / "checkpoints")[-1] + 2
    summary = loop.train(*train.parse(arguments(folder, steps)))
    return {
        "folder": folder,
        "stopped": stopped,
        "stopped_at": stopped_at,
        "killed": killed,
        "seconds": seconds,
        "summary": summary,
    }


def test_a_signal_to_one_process_stops_all_at_one_step(story):
    assert [code for code, _, _ in story["stopped"]] == [143, 143], story["stopped"]
    assert not any("{" in out for _, out, _ in story["stopped"])  # Gloo says a line there
    first, second = (err for _, _, err in story["stopped"])
    assert "SIGTERM; to go on: python train.py" in first
    assert "error:" not in first + second
    assert "step 1" in first and "step 1" not in second  # one process speaks
    assert story["stopped_at"] >= 2
    assert story["seconds"]["stopped"] < MOST_SECONDS


def test_a_killed_process_ends_the_others_with_a_line(story):
    (code, out, err), (killed, _, last_words) = story["killed"]
    assert killed == -signal.SIGKILL and code != 0 and "{" not in out
    for text in (err, last_words):  # where JAX was faster it has aborted process 0; the line is the same
        line = text.splitlines()[-1]
        assert re.match("error: .*another process of (this|the) run .*; start all processes again with the same command", line)
    assert story["seconds"]["killed"] < MOST_SECONDS


def test_a_run_goes_on_with_another_number_of_processes(story, tmp_path):
    """Rows each once, evaluations due when it was stopped too, and the numbers of one process left alone."""
    rows, steps = rows_of(story["folder"] / "run"), story["summary"]["step"]
    assert rows.keys() == {(step, split) for step in range(1, steps + 1) for split in ("train", "validation")}
    config, _ = train.parse(arguments(story["folder"], steps))
    loop.train(config, tmp_path / "run")
    alone = rows_of(tmp_path / "run")
    np.testing.assert_allclose([rows[key] for key in alone], list(alone.values()), rtol=1e-5)


@pytest.mark.tools
def test_machines_without_a_shared_folder_use_a_store(tmp_path):
    """Each has a cache of its own; parameters are split over them. One process goes on from the store, then two again."""

    def argv(store, steps):
        *base, _ = arguments(tmp_path, steps)
        place = f"--workdir=file://{tmp_path}/{store}/run"
        return [each for each in base if not each.startswith(("--workdir", "--config.data.cache_dir"))] + [
            place,
            f"--config.train.steps={steps}",
        ]

    def own(index):
        return (f"--config.data.cache_dir={tmp_path}/machine{index}", "--config.mesh.fsdp=2", "--config.mesh.data=1")

    def ended(steps):
        found = Processes(argv("bucket", steps), own=own).end()
        assert [code for code, _, _ in found] == [0, 0], "\n".join(err for _, _, err in found)
        return found

    ended(6)
    assert not list((tmp_path / "machine1").rglob("metrics.jsonl")), "only process 0 writes"
    one, _ = train.parse([*argv("bucket", 9), f"--config.data.cache_dir={tmp_path}/machine2"])
    loop.train(one, f"file://{tmp_path}/bucket/run")
    [(_, _, said), _] = ended(12)
    assert "resuming" in said and "after step 9" in said
    alone, _ = train.parse([*argv("alone", 12), f"--config.data.cache_dir={tmp_path}/machine3"])
    loop.train(alone, tmp_path / "alone")
    expected = rows_of(tmp_path / "alone")
    found = rows_of(tmp_path / "bucket" / "run")
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-5)


ON_TWO_DEVICES = """
import json, sys
import numpy as np
import seqmodels
found = []
for devices in (1, 2):
    run = seqmodels.load_run(sys.argv[1], devices=devices)
    written = run.generate_batch(["a", "of", "tree"], max_tokens=6, temperature=0)
    logits = np.asarray(run.logits(np.arange(24).reshape(3, 8)))
    found.append([run.evaluate(max_tokens=64).loss, written, logits.shape, float(np.abs(logits).sum()), run.trainer.mesh.size])
print(json.dumps(found))
"""


def test_evaluation_and_decoding_on_two_devices(story):
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES, story["folder"] / "run"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST.replace("count=1", "count=2")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout.splitlines()[-1])
    assert [one[-1], two[-1]] == [1, 2] and one[1:3] == two[1:3] and one[2] == [3, 8, 257]
    np.testing.assert_allclose([one[0], one[3]], [two[0], two[3]], rtol=1e-5)
    assert abs(one[0] - story["summary"]["validation_loss"]) < 1e-5
