"""`make demo`, with a few steps: two runs, one table, two pictures; the second time it finds the first."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    "--config.train.steps=4", "--config.train.eval_every_steps=2", "--config.train.sample_every_steps=0",
    "--config.data.toy_documents=100", "--config.data.tokenizer=bytes", "--config.data.seq_len=32",
    "--config.data.batch_size=4", "--config.model.d_model=32", "--config.model.repeats=1",
)  # fmt: skip
pytestmark = pytest.mark.tools


def demo(cwd, *arguments):
    command = [sys.executable, ROOT / "scripts" / "demo.py", f"--workdir={cwd / 'demo'}"]
    command += [*OVERRIDES, f"--config.data.cache_dir={cwd / 'cache'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def table(out):
    return out.partition("writes:")[0]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder that a demo was started from, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder).stdout


def test_the_demo_runs_from_any_directory(shown):
    folder, out = shown
    for mixer in ("attention", "linear_attention"):
        assert (folder / "demo" / mixer / "metrics.jsonl").exists()
        assert f"{mixer} writes:" in out
    for column in ("perplexity", "bits per byte"):
        assert column in out
    for picture in ("learning_curves.png", "loss_by_position.png"):
        assert (folder / "demo" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_demo_finds_what_it_trained(shown):
    folder, out = shown
    rows = (folder / "demo" / "attention" / "metrics.jsonl").read_text()
    again = demo(folder).stdout
    assert (folder / "demo" / "attention" / "metrics.jsonl").read_text() == rows
    assert table(again) == table(out)
