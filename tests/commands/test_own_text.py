"""The walk of docs/training.md on a text of one's own: two mixers are trained on it, judged, and one writes."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import train
from seqmodels.training import loop

ROOT = Path(__file__).parents[2]
MIXERS = ("attention", "gla")


def command(script: str, *arguments: str) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code in (0, None), stopped.value.code


@pytest.mark.tools
def test_the_walk(tmp_path, capsys):
    text = tmp_path / "my text.txt"
    text.write_text(
        "<|endoftext|>".join(f"Day {day}: the river rose by {day % 7} feet, said the keeper.\n" for day in range(300))
    )
    losses = {}
    for mixer in MIXERS:
        fields = {
            "data.source": text, "data.tokenizer": "bytes", "data.seq_len": 32, "data.batch_size": 4,
            "data.cache_dir": tmp_path / "cache", "model.pattern": f"{mixer} mlp", "model.d_model": 32, "model.repeats": 1,
            "optim.learning_rate": 1e-2, "optim.warmup_steps": 2, "train.steps": 20, "train.sample_every_steps": 0,
            "train.eval_tokens": 512, "train.compilation_cache_dir": "",
        }  # fmt: skip
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        config = f"--config={ROOT / 'configs' / 'base.py'}"
        summary = loop.train(*train.parse(["train.py", config, f"--workdir={tmp_path / mixer}", *flags]))
        losses[mixer] = summary["validation_loss"]
    assert all(1.0 < loss < 5.0 for loss in losses.values()), "better than guessing one of 256 bytes (5.55 nats)"
    text.unlink()  # a run folder needs nothing else
    capsys.readouterr()
    for mixer in MIXERS:
        command("eval.py", f"--workdir={tmp_path / mixer}")
        judged = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert judged["step"] == 20 and judged["bits_per_byte"] > 0
    command(
        "scripts/generate.py", f"--workdir={tmp_path / MIXERS[1]}", "--prompt=Day 5: the", "--max_tokens=12", "--temperature=0"
    )
    written = capsys.readouterr().out
    assert written.startswith("Day 5: the") and len(written) > len("Day 5: the\n")
