"""Kills and signals at uniform moments, of training, tokenising and evaluating: what is begun again ends as if it had not been."""

import dataclasses
import shutil
import signal
import sys
from pathlib import Path

import eval as eval_program
import train
from seqmodels import data
from tools.drills.trials import Count, Ended, Place, files_of, in_child, outcome, train_in_child


def kill_training(place: Place) -> Count:
    """SIGKILL at a uniform moment of a run, then the same command: parameters and rows of a run that was left alone."""
    return _interrupted_training(place, place.some(3, 100), signal.SIGKILL)


def stop_training(place: Place) -> Count:
    """SIGTERM or Ctrl-C at a uniform moment: exit status 143 or 130 (or the run was done), and the same end afterwards."""
    return _interrupted_training(place, place.some(2, 28), signal.SIGTERM, signal.SIGINT)


def _interrupted_training(place: Place, trials: int, *numbers: int) -> Count:
    count = Count()
    expected, whole = reference(place)
    for trial in range(trials):
        workdir, number = place.new("killed") / "run", numbers[trial % len(numbers)]
        after = place.draw.uniform(0.0, 1.1 * whole.seconds)
        first = train_in_child(place.flags(workdir), after=after, number=number)
        again = train_in_child(place.flags(workdir))
        where = f"signal {number} after {after:.2f} s"
        # Before the program has its handlers, a signal ends it as it ends any program.
        allowed = {0, -number} | ({128 + number} if number != signal.SIGKILL else set())
        if first.code not in allowed or "Traceback" in first.err.replace("KeyboardInterrupt", "") and first.code not in (-number, 130):
            count.judge(False, f"{where}: exit status {first.code}: {first.err[-200:]}")
        elif again.code != 0:
            count.judge(False, f"{where}, started again: exit status {again.code}: {again.err[-200:]}")
        else:
            count.judge(outcome(workdir) == expected, f"{where}: another end than that of a run left alone")
        shutil.rmtree(workdir.parent)
    return count


def reference(place: Place) -> tuple[dict, Ended]:
    """A run that was left alone, made once; and how long such a run takes when its programs are compiled."""
    workdir = place.folder / "reference"
    if not workdir.exists():
        first = train_in_child(place.flags(workdir))
        assert first.code == 0, first.err
    timed = place.new("timed") / "run"
    again = train_in_child(place.flags(timed))
    shutil.rmtree(timed.parent)
    return outcome(workdir), again


def kill_tokenising(place: Place) -> Count:
    """SIGKILL while the token cache is written, then again: the tokens of an undisturbed run, and no folder is left over."""
    config, _ = train.parse(place.flags(place.folder / "none", data__toy_documents=4000))

    def prepare(cache: Path):
        return data.prepare(dataclasses.replace(config.data, cache_dir=str(cache)), seed=0)

    count, cache = Count(), place.new("tokens")
    whole = in_child(lambda: prepare(cache) and None)
    expected = files_of(cache / "tokens")
    shutil.rmtree(cache)
    for _ in range(place.some(4, 60)):
        cache, after = place.new("tokens"), place.draw.uniform(0.0, whole.seconds)
        in_child(lambda cache=cache: prepare(cache) and None, after=after)
        again = in_child(lambda cache=cache: prepare(cache) and None)
        found = files_of(cache / "tokens")
        same = {name: found.get(name) for name in expected} == expected
        count.judge(again.code == 0 and same, f"killed after {after:.2f} s: {again.err[-200:] or 'other tokens'}")
        shutil.rmtree(cache)
    return count


def kill_evaluating(place: Place) -> Count:
    """SIGKILL while eval.py reads a run folder: nothing in it has changed but the picture, which is whole or not there."""
    expected, _ = reference(place)
    count, run = Count(), place.new("evaluated") / "run"
    shutil.copytree(place.folder / "reference", run)
    before = files_of(run)
    argv = ["eval.py", f"--workdir={run}", f"--compilation_cache_dir={place.folder / 'programs'}"]
    whole = in_child(lambda: _with_argv(argv, eval_program.main))
    (run / "loss_by_position.png").unlink()
    for _ in range(place.some(2, 30)):
        after = place.draw.uniform(0.0, 1.1 * whole.seconds)
        in_child(lambda: _with_argv(argv, eval_program.main), after=after)
        found = files_of(run)
        picture = found.pop("loss_by_position.png", b"IEND")
        found = {name: content for name, content in found.items() if not name.startswith(".loss_by_position.png.")}
        count.judge(found == before and b"IEND" in picture[-16:], f"killed after {after:.2f} s: the folder has changed")
        (run / "loss_by_position.png").unlink(missing_ok=True)
    return count


def _with_argv(argv, main) -> None:
    sys.argv = argv
    main()

