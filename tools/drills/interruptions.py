"""Kills and signals at uniform moments, of training, tokenising, evaluating, comparing: what is begun again ends as if left alone."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import eval as eval_program
import train
from scripts import compare
from seqmodels import data
from tools.drills.trials import Count, Ended, Place, files_of, in_child, outcome, train_in_child


def kill_training(place: Place) -> Count:
    """SIGKILL at a uniform moment of a run, then the same command: parameters and rows of a run that was left alone."""
    return _interrupted_training(place, place.some(3, 100), signal.SIGKILL)


def stop_training(place: Place) -> Count:
    """SIGTERM or Ctrl-C at a uniform moment: exit status 143 or 130 (or the run was done), and the same end afterwards."""
    return _interrupted_training(place, place.some(2, 28), signal.SIGTERM, signal.SIGINT)


def kill_on_mesh(place: Place) -> Count:
    """SIGKILL at a uniform moment of a run on four virtual devices (data=2, fsdp=2), then the same command: the same end."""
    return _interrupted_training(
        place, place.some(1, 20), signal.SIGKILL, devices=4, mesh__data=2, mesh__fsdp=2, data__batch_size=4
    )


def _interrupted_training(place: Place, trials: int, *numbers: int, devices: int = 1, **changes: object) -> Count:
    count = Count()
    environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"}
    expected, whole = reference(place, environment, **changes)
    for trial in range(trials):
        workdir, number = place.new("killed") / "run", numbers[trial % len(numbers)]
        after = place.draw.uniform(0.0, 1.1 * whole.seconds)
        flags = place.flags(workdir, **changes)
        first = train_in_child(flags, after=after, number=number, environment=environment)
        again = train_in_child(flags, environment=environment)
        where = f"signal {number} after {after:.2f} s"
        # Before the program has its handlers, a signal ends it as it ends any program.
        allowed = {0, -number} | ({128 + number} if number != signal.SIGKILL else set())
        if (
            first.code not in allowed
            or "Traceback" in first.err.replace("KeyboardInterrupt", "")
            and first.code not in (-number, 130)
        ):
            count.record(False, f"{where}: exit status {first.code}: {first.err[-200:]}")
        elif again.code != 0:
            count.record(False, f"{where}, started again: exit status {again.code}: {again.err[-200:]}")
        else:
            count.record(outcome(workdir) == expected, f"{where}: another end than that of a run left alone")
        shutil.rmtree(workdir.parent)
    return count


def reference(place: Place, environment: dict[str, str | None] | None = None, **changes: object) -> tuple[dict, Ended]:
    """A run that was left alone, made once for such flags; and how long it takes when its programs are compiled."""
    workdir = place.folder / "_".join(["reference", *(f"{name}{value}" for name, value in changes.items())])
    if not workdir.exists():
        first = train_in_child(place.flags(workdir, **changes), environment=environment)
        assert first.code == 0, first.err
    timed = place.new("timed") / "run"
    again = train_in_child(place.flags(timed, **changes), environment=environment)
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
        count.record(again.code == 0 and same, f"killed after {after:.2f} s: {again.err[-200:] or 'other tokens'}")
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
        count.record(found == before and b"IEND" in picture[-16:], f"killed after {after:.2f} s: the folder has changed")
        (run / "loss_by_position.png").unlink(missing_ok=True)
    return count


def kill_comparing(place: Place) -> Count:
    """SIGKILL at a uniform moment of compare.py, then the same command: the figures of a comparison that was left alone."""
    count, whole = Count(), _compared(place, place.folder / "comparison")
    assert whole.code == 0, whole.err
    expected = _figures(place.folder / "comparison")
    for _ in range(place.some(1, 12)):
        workdir = place.new("compared") / "comparison"
        after = place.draw.uniform(0.0, whole.seconds)
        _compared(place, workdir, after=after)
        again = _compared(place, workdir)
        same = again.code == 0 and _figures(workdir) == expected
        count.record(same, f"killed after {after:.2f} s: {again.err[-200:] if again.code else 'other figures'}")
        shutil.rmtree(workdir.parent)
    return count


def _compared(place: Place, workdir: Path, **options) -> Ended:
    base = place.flags(workdir, train__steps=6, train__eval_every_steps=3, train__checkpoint_every_steps=3)[3:]
    values = {
        "learning_rates": "1e-3,",
        "seeds": 1,
        "control": False,
        "validation_tokens": 256,
        "contexts": "8,",
        "decode_tokens": 2,
    }
    argv = [
        "compare.py", "--config=configs/compare/toy.py", f"--workdir={workdir}", "--mixers=linear_attention,hgrn", "--jobs=2",
        *(flag.replace("--config.", "--config.base.") for flag in base if "model.pattern" not in flag),
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip
    return in_child(lambda: compare.main(argv), seconds=600.0, **options)


def _figures(workdir: Path) -> dict:
    """Of every mixer, what does not depend on the clock."""
    found = json.loads((workdir / "results.json").read_text())["mixers"]
    return {label: [row["best_rate"], row["quality"], row["counted"]] for label, row in found.items()}


def _with_argv(argv, main) -> None:
    sys.argv = argv
    main()
