"""What ends a run in good order: signals, whatever a library does with them."""

import contextlib
import os
import resource
import signal
import threading
import time

import pytest

from seqmodels.errors import UserError
from seqmodels.training import loop, run_folder
from tests.configs import tiny


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.setattr(loop.Signals, "AGAIN_SECONDS", 0.05)
    with loop.Signals() as signals:
        yield signals


def swallow_a_signal():
    """What Python does with an exception in a callback of a library written in C, or in a finaliser: it is thrown away."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except loop.Stopped:
        pass


def test_a_signal_that_was_swallowed_is_delivered_again(signals):
    begun = time.monotonic()
    with pytest.raises(loop.Stopped), signals.interrupting():
        swallow_a_signal()
        time.sleep(60)
    assert time.monotonic() - begun < 30


def test_a_signal_that_was_swallowed_at_the_end_counts(signals):
    with pytest.raises(loop.Stopped), signals.interrupting():
        swallow_a_signal()


def test_a_signal_of_which_a_library_made_an_error_counts(signals):
    with pytest.raises(loop.Stopped), signals.interrupting():
        swallow_a_signal()
        raise RuntimeError("the callback failed")


def test_an_error_without_a_signal_stays_what_it_is(signals):
    with pytest.raises(RuntimeError, match="a bug"), signals.interrupting():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_asks_to_end_is_obeyed(number):
    before = signal.signal(number, signal.default_int_handler)  # also where nohup started the tests
    try:
        with pytest.raises(loop.Stopped) as stopped, loop.Signals() as signals, signals.interrupting():
            os.kill(os.getpid(), number)
            time.sleep(60)
    finally:
        signal.signal(number, before)
    assert stopped.value.exit_code == 128 + number


def test_a_hangup_that_nohup_keeps_away_is_none():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.Signals() as signals, signals.interrupting():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_counts_however_many_files_are_open(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1200 if hard == resource.RLIM_INFINITY else min(1200, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    ended = threading.Event()
    monkeypatch.setattr(loop.Signals, "_end_at_once", lambda self, number: ended.set())
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1030):
            stack.enter_context(open(os.devnull))
        with loop.Signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            assert ended.wait(10)


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), loop.only_process_in(tmp_path):
        pass  # pragma: no cover
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", run_folder.FOLDERS)
def test_a_folder_of_the_run_that_is_a_link_is_refused(tmp_path, name):
    precious, workdir = tmp_path / "precious", tmp_path / "run"
    precious.mkdir()
    workdir.mkdir()
    (precious / "mine").touch()
    for target in (precious, tmp_path / "nothing"):
        (workdir / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name}' is a symbolic link") as error:
            loop.train(tiny(), workdir)
        assert "\n" not in str(error.value)
        (workdir / name).unlink()
    assert [path.name for path in precious.iterdir()] == ["mine"] and not (tmp_path / "nothing").exists()
    (workdir / name).touch()
    with pytest.raises(UserError, match=f"{name}' is not a folder"):
        loop.train(tiny(), workdir)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints_broken"])
def test_a_step_of_the_run_that_is_a_link_is_refused(tmp_path, name):
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / name / "10").mkdir(parents=True)
    for step, target in (("20", tmp_path / "precious"), ("30.orbax-checkpoint-tmp-1", tmp_path / "nothing")):
        link = tmp_path / "run" / name / step
        link.symlink_to(target)
        with pytest.raises(UserError, match=f"{name}/{step}' is a symbolic link"):
            loop.train(tiny(), tmp_path / "run")
        link.unlink()


def test_outside_of_work_that_can_be_left_nothing_is_raised(signals):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(loop.Stopped) as stopped:
        signals.check()
    assert stopped.value.exit_code == 143
