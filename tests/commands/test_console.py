"""``seqmodels COMMAND``: the same programs as those at the top of a clone."""

import os
import subprocess
import sys

import pytest

from seqmodels import __main__, command_line, packages
from seqmodels.errors import UserError


def test_help_lists_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["seqmodels"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in packages.COMMANDS)


def test_an_unknown_command_names_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["seqmodels", "trian", "--workdir=x"])
    with pytest.raises(SystemExit, match="there is no command 'trian'; did you mean 'train'"):
        __main__.main()


def test_it_runs_the_command_with_its_flags(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "seqmodels", "train", "--config=configs/base.py", "--wrkdir=x"], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(packages.CLONE)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: --wrkdir is not a flag; did you mean --workdir?\n")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_comes_with_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in (["--config=configs/tinystories.py:gla"], ["--config", "configs/tinystories.py:gla"]):
        config, _ = command_line.config_and_flags(["train.py", *flag, "--workdir=x"], {"workdir": None})
        assert config.model.pattern == "gla mlp"
    with pytest.raises(UserError, match=r"no file configs/tinystory\.py; did you mean 'configs/tinystories\.py'"):
        command_line.config_and_flags(["train.py", "--config=configs/tinystory.py:gla", "--workdir=x"], {"workdir": None})
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tinystories.py").write_text(
        "from configs import base\nget_config = lambda name: base.get_config()\n"
    )
    config, _ = command_line.config_and_flags(["train.py", *flag, "--workdir=x"], {"workdir": None})
    assert config.model.pattern == "attention mlp"
