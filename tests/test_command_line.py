"""Flags of the commands that have no config: a mistake is one line, which names the nearest flag or value."""

import argparse
import errno
import io
import os
import signal
import sys
import threading
import time

import pytest

import train
from scripts import benchmark, generate
from seqmodels import command_line, ranges
from seqmodels.data import atomic
from seqmodels.errors import UserError
from tools.aot import __main__ as aot
from tools.pages import equivalence


@pytest.fixture
def parser():
    made = command_line.Parser(description="An example.")
    made.add_argument("source", metavar="SOURCE")
    made.add_argument("--workdir", required=True)
    made.add_argument("--format", choices=("table", "csv"), default="table")
    made.add_argument("--note")
    made.add_value("--batch_size", ranges.Count, default=1)
    return made


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--workdri=x"], "--workdri is not a flag; did you mean --workdir?"),
        (["x", "--run_dir=x"], "--run_dir is not a flag; did you mean --workdir?"),
        (["x", "--bs=3"], "--bs is not a flag; did you mean --batch_size?"),
        (["x", "--zzz"], "--zzz is not a flag; known: --workdir, --format, --note, --batch_size"),
        (["x", "--work=x"], "--work is not a flag; did you mean --workdir?"),
        (["x"], "--workdir is missing; --help lists the flags"),
        ([], "SOURCE, --workdir are missing; --help lists the flags"),
        (["x", "--workdir=x", "stray"], "unrecognized arguments: stray; see --help"),
        (["x", "--workdir=x", "--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["x", "--workdir=x", "--batch_size=many"], "--batch_size='many' must be int"),
        (["x", "--workdir=x", "--batch_size"], "--batch_size: expected one argument"),
        (["x", "--workdir=x", "--format=cvs"], "--format=cvs: did you mean 'csv'? known: table, csv"),
        (["--help=model"], "--help=model: the flags of this command are in no groups; --help lists them"),
    ],
)
def test_a_mistake_is_one_line(parser, argv, said):
    with pytest.raises(UserError) as mistake:
        parser.parse_args(argv)
    assert str(mistake.value) == said


def test_what_looks_like_a_flag_and_is_none(parser):
    read = parser.parse_args(["--workdir=x", "--note", "--- a note", "--", "--source"])
    assert (read.source, read.note, read.workdir) == ("--source", "--- a note", "x")


def parsed(monkeypatch, parse, *argv):
    monkeypatch.setattr("sys.argv", ["command.py", *argv])
    return parse()


def test_help_of_a_suite(monkeypatch, capsys):
    for argv in (("--help=ops",), ("--suite=ops", "--help")):
        with pytest.raises(SystemExit) as end:
            parsed(monkeypatch, benchmark.parse_flags, *argv)
        assert end.value.code == 0 and "--suite=ops:" in capsys.readouterr().out
    for argv in (("--help=opps",), ("--suite=opps",)):
        with pytest.raises(UserError, match="there is no suite 'opps'; did you mean 'ops'?"):
            parsed(monkeypatch, benchmark.parse_flags, *argv)


def test_a_state_that_is_not_there_is_missed_before_the_run_is_read(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--from_state: there is no file"):
        parsed(monkeypatch, generate.parse_flags, "--workdir=x", f"--from_state={tmp_path / 'begun.npz'}")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("kept")
    for kind in (command_line.output_file, command_line.output_stream):
        assert kind(str(tmp_path / "new")) == tmp_path / "new"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for kind, name in (
        (command_line.output_file, "new"),
        (command_line.output_stream, "new"),
        (command_line.output_stream, "there"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot write in"):
            kind(str(tmp_path / name))


def test_files_that_are_read_are_not_written(tmp_path):
    (tmp_path / "a").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    command_line.check_distinct({"out": tmp_path / "b", "plot": None}, {"prompts": tmp_path / "a"})
    for outputs in ({"out": tmp_path / "link"}, {"out": tmp_path / "b", "plot": tmp_path / "." / "b"}):
        with pytest.raises(UserError, match="is the file of --(prompts|out); give another"):
            command_line.check_distinct(outputs, {"prompts": tmp_path / "a"})
    command_line.check_distinct({"out": tmp_path / "stories.jsonl"}, {}, tmp_path)
    for name in ("config.json", "tokenizer.json", "sub/../metrics.jsonl"):
        with pytest.raises(UserError, match="is the file of --workdir; give another"):
            command_line.check_distinct({"out": tmp_path / name}, {}, tmp_path)


@pytest.fixture
def at_exit(monkeypatch):
    """What is registered to be called when the process ends."""
    registered = []
    monkeypatch.setattr(command_line.atexit, "register", lambda *call: registered.append(call))
    return registered


@pytest.mark.parametrize("code, expected", [(143, [(os._exit, 143)]), (1, []), ("error: no", []), (None, [])])
def test_a_command_that_a_signal_stopped_ends_before_the_teardown(at_exit, code, expected):
    """What XLA was interrupted in may crash there."""
    with pytest.raises(SystemExit) as end:
        command_line.run(lambda: sys.exit(code))
    assert end.value.code == code and at_exit == expected


def test_one_of_several_processes_leaves_as_the_others_do(at_exit, monkeypatch):
    """It would be reported as killed, and the others ended by JAX."""
    monkeypatch.setattr(command_line.processes, "has_others", lambda: True)
    with pytest.raises(SystemExit):
        command_line.run(lambda: sys.exit(143))
    assert at_exit == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line_and_leaves_no_half_written_file(number, tmp_path, capsys, at_exit):
    def main():
        def write(file):
            file.write(b"half")
            os.kill(os.getpid(), number)
            pytest.fail("it went on")  # pragma: no cover

        atomic.write_whole(tmp_path / "state.npz", write)

    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # under nohup, or in the background of a script, it is ignored
    try:
        with pytest.raises(SystemExit) as end:
            command_line.run(main)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number and list(tmp_path.iterdir()) == [] and at_exit == [(os._exit, 128 + number)]
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


def test_a_signal_that_is_not_obeyed_ends_the_process_all_the_same(monkeypatch):
    """Python throws away what is raised in a finaliser, and raises nothing while XLA compiles."""
    ended, codes = threading.Event(), []
    monkeypatch.setattr(command_line, "UNWIND_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: [codes.append(code), ended.set()])

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            assert ended.wait(10) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with pytest.raises(SystemExit) as end:
        command_line.run(main)
    assert end.value.code == 0 and codes == [143]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_throws_away_is_raised_again(number, capsys, at_exit):
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def main():
        Finalised()
        time.sleep(5)
        pytest.fail("it went on")  # pragma: no cover

    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    try:
        with pytest.raises(SystemExit) as end:
            command_line.run(main)
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, tmp_path):
    """As of ``eval.py ... > /dev/full``: Python would end with 120 and a second complaint, from its own flush."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fileno(self):
            return descriptor

    descriptor = os.open(tmp_path / "stdout", os.O_WRONLY | os.O_CREAT)
    try:
        monkeypatch.setattr("sys.stdout", Full())
        with pytest.raises(SystemExit) as end:
            command_line.run(lambda: None)
        assert end.value.code == "error: no space left"
        assert os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("tool", [aot, equivalence])
def test_processes_have_an_upper_bound(monkeypatch, tool):
    """Nobody's typing slip starts a million of them."""
    with pytest.raises(UserError, match="--jobs=1000000 must be at most 1024"):
        parsed(monkeypatch, tool.main, "--jobs=1000000")
    with pytest.raises(UserError, match="--num_processes=1000000 must be at most 65536"):
        train.parse(["train.py", "--config=configs/base.py", "--workdir=x", "--coordinator=a:1", "--num_processes=1000000"])
