"""scripts/benchmark.py measures a tiny shape without PyTorch, writes what it printed, and refuses what it lacks."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "scripts" / "benchmark.py"


def run(*arguments: str, cwd=None):
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite=ops"], "not built yet"),
        (["--suite=trian"], "there is train"),
        ([], "--suite"),
        (["--suite=train", "--mixers=atention"], "attention"),
        (["--suite=train", "--shapes=128"], "WIDTHxREPEATS"),
        (["--suite=train", "--out=no/such/folder/x.json"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint):
    result = run(*arguments)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and complaint in line


def test_train_suite(tmp_path):
    small = ("--shapes=32x1", "--batch_size=2", "--seq_len=16", "--rounds=1")
    result = run("--suite=train", "--mixers=attention", "--out=results.json", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["jax"] in result.stdout
    assert results["dispatch"]["wall_ms"] < 20
    assert results["compile"]["attention"]["cpu_s"] > 0
    steps = {row["name"]: row for row in results["throughput"]}
    tokens_per_second = 1e3 * 2 * 16 / steps["attention"]["wall_ms"]
    assert steps["attention"]["tokens_per_second"] == pytest.approx(tokens_per_second)
    parts = {row["name"]: row["count"] for row in results["parts"]}
    assert parts == {"attention": 1, "mlp": 1, "norm": 3, "embedding": 1, "loss": 1, "optimizer": 1}
    assert results["loss_memory"]["chunked_mib"] < results["loss_memory"]["plain_mib"] / 8
