"""A Python without the packages: one line that says what to do, from every command."""

import os
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
    monkeypatch.setattr(packages, "_end_by_signals", lambda: None)
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


STARTED = "from seqmodels.packages import check_packages; check_packages(); "


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_packages_are_imported_is_one_line_whatever_a_library_does(number):
    """Some catch what is raised while they import, and go on without a part of themselves."""
    program = f"{STARTED}import os\ntry: os.kill(os.getpid(), {int(number)}); print('it went on')\nexcept BaseException: pass"
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # a child of a process that ignores it ignores it, too
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    finally:
        signal.signal(number, before)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"stopped by {number.name}\n")


def test_a_closed_stream_is_no_file_that_is_opened_next(tmp_path):
    """Else what is said would be written into a checkpoint, or a row of metrics."""
    program = f"{STARTED}import os, sys; file = open({str(tmp_path / 'kept')!r}, 'w'); print('a'); os.write(2, b'b')"
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], cwd=ROOT, capture_output=True, timeout=300
        )
        assert done.returncode == 0 and (tmp_path / "kept").read_bytes() == b"", (closed, done)


def test_characters_that_a_terminal_lacks_are_spelt():
    done = subprocess.run(
        [sys.executable, "-c", f"{STARTED}print('gr\\xfcn \\u4e00')"], cwd=ROOT, capture_output=True, timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"gr\\xfcn \\u4e00\n"), done.stderr


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {STARTED}"
    (tmp_path / "gone").mkdir()
    script = 'rmdir "$PWD"; exec "$0" -c "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, program], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.startswith("error: the current folder cannot be read"), done.stderr
    assert done.stderr.count("\n") == 1


def test_the_modules_are_those_of_requirements():
    required = re.findall(r"^([\w-]+)[<>=]", (ROOT / "requirements.txt").read_text(), re.M)
    imported_as = {"PyYAML": "yaml", "orbax-checkpoint": "orbax"}
    assert {imported_as[name] if name in imported_as else name for name in required} == set(packages.MODULES)
