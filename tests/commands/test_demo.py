"""`make demo`, with a few steps: two runs, one table, two pictures; the second time it finds the first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    "--config.train.steps=4", "--config.train.eval_every_steps=2", "--config.train.sample_every_steps=0",
    "--config.data.toy_documents=100", "--config.data.tokenizer=bytes", "--config.data.seq_len=32",
    "--config.data.batch_size=4", "--config.model.d_model=32", "--config.model.repeats=1",
)  # fmt: skip


def demo(cwd, *arguments):
    command = [sys.executable, ROOT / "scripts" / "demo.py", f"--workdir={cwd / 'demo'}"]
    command += [*OVERRIDES, f"--config.data.cache_dir={cwd / 'cache'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def table(done):
    return done.stdout.partition("writes:")[0]


def test_the_demo_runs_twice_from_any_directory(tmp_path):
    first = demo(tmp_path)
    for mixer in ("attention", "linear_attention"):
        assert (tmp_path / "demo" / mixer / "metrics.jsonl").exists()
        assert f"{mixer} writes:" in first.stdout
    for column in ("perplexity", "bits per byte"):
        assert column in first.stdout
    for picture in ("learning_curves.png", "loss_by_position.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "demo" / "attention" / "metrics.jsonl").read_text()
    again = demo(tmp_path)
    assert (tmp_path / "demo" / "attention" / "metrics.jsonl").read_text() == rows
    assert table(again) == table(first)
