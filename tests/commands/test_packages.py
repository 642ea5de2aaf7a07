"""A Python without the packages: one line that says what to do, from every command."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels import packages

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "train.py", ROOT / "eval.py", *(ROOT / "scripts").glob("*.py")))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_python_without_the_packages(command):
    # -S leaves out site-packages: a bare Python.
    done = subprocess.run([sys.executable, "-S", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: \S+ has no jax, flax, .*yaml: (activate|install) .*\(.*\)\n", done.stderr), done.stderr


def test_nothing_is_missing_here(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    packages.check_packages()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    packages.check_packages()
    assert capsys.readouterr().err == "loading JAX ...\r"


@pytest.mark.parametrize("raised, said", [("KeyboardInterrupt", ""), ("ValueError('a bug')", "ValueError: a bug")])
def test_an_interrupt_while_packages_are_imported_is_no_traceback(raised, said):
    program = f"from seqmodels.packages import check_packages; check_packages(); raise {raised}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == (1 if said else -signal.SIGINT)
    assert done.stderr.strip().splitlines()[-1:] == ([said] if said else [])


def test_the_modules_are_those_of_requirements():
    required = re.findall(r"^([\w-]+)[<>=]", (ROOT / "requirements.txt").read_text(), re.M)
    imported_as = {"PyYAML": "yaml", "orbax-checkpoint": "orbax"}
    assert {imported_as[name] if name in imported_as else name for name in required} == set(packages.MODULES)
