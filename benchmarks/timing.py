"""What the suites of benchmark.py share: contenders in turns, the circumstances of a run, flags, progress."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from seqmodels import suggest
from seqmodels.circumstances import circumstances
from seqmodels.data.atomic import write_whole

AT_LEAST_TURNS = 2


def take_turns(
    contenders: dict[str, Callable], rounds: int, seconds: float = math.inf, *, steady: bool = False
) -> dict[str, dict[str, float]]:
    """Milliseconds of one call of each, after one to warm up: the least wall time, its median, the least CPU time.

    The call to warm up never counts, however long it took: a gradient that needs 2 GiB took three to six times as long
    the first time, and counting it once made a slow form look three times slower than it is.

    Args:
      contenders: name -> a call that waits for its result.
      rounds: turns of each.
      seconds: a contender whose turns have taken so long gets no further one, beyond the first ``AT_LEAST_TURNS``.
      steady: each turn is two calls, of which the second counts, as steps of a training run follow each other. After a pause of
        a second a step took 404, 871 and 362 ms, the three after each of them 350 to 420. The longest spent 672 ms in the
        system: XLA frees its temporaries after each step, and a virtual machine may give idle memory back to its host.
    """
    for call in contenders.values():
        call()
    walls, cpus = ({name: [] for name in contenders} for _ in range(2))
    for turn in range(rounds):
        for name, call in contenders.items():
            if turn >= AT_LEAST_TURNS and sum(walls[name]) >= 1e3 * seconds:
                continue
            if steady:
                call()
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            walls[name].append(1e3 * (time.perf_counter() - wall))
            cpus[name].append(1e3 * (time.process_time() - cpu))
    return {
        name: {
            "wall_ms": min(walls[name]),
            "median_wall_ms": float(np.median(walls[name])),
            "cpu_ms": min(cpus[name]),
            "turns": len(walls[name]),
        }
        for name in contenders
    }


# ---- the circumstances of a run


def circumstances_of_run() -> dict:
    """The circumstances with this process's devices; prints them."""
    about = circumstances()
    machine = about["machine"] = {"devices": [device.device_kind for device in jax.devices()]} | about["machine"]
    print(
        f"{about['date']}, commit {about['commit']}\n"
        f"{', '.join(f'{name} {version}' for name, version in about['versions'].items())}\n"
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['devices'])}, "
        f"load {machine['load_before']:.1f} at the start, huge pages {'on' if machine['huge_pages'] else 'off'}"
    )
    return about


# ---- a suite of many rows, which goes on where it was ended


def rows_so_far(path: Path | None, device: str) -> list[dict]:
    """The rows that an earlier run left in a results' file and that still hold: of this commit and device."""
    if path is None or not path.exists():
        return []
    commit = circumstances()["commit"]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["commit"] == commit and row["device"] == device and not commit.endswith("-dirty")]


def until_deadline(wanted: Sequence[tuple[str, ...]], minutes: int) -> Iterator[tuple[str, ...]]:
    """The rows to measure, one after the other, with progress, until the minutes are over; one that is begun is finished."""
    clock = Progress({", ".join(row): 1.0 for row in wanted})
    for row in wanted:
        if clock.elapsed > 60 * minutes:
            progress(f"{minutes} minutes are over; the same command goes on from here")
            return
        clock.start(", ".join(row))
        yield row


def write_results(path: Path | None, results: dict) -> None:
    """The results so far, whole or not at all; nothing without a path."""
    if path is not None:
        write_whole(path, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


# ---- progress, on stderr


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Says before each part of a suite how long all of it has taken and, from the second part on, how long it may yet.

    Args:
      weights: every part's name, in order, and what it costs compared with the others.
    """

    def __init__(self, weights: dict[str, float]):
        self.weights = weights
        self.started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the first part."""
        return time.perf_counter() - self.started

    def start(self, part: str) -> None:
        names = list(self.weights)
        done = sum(self.weights[name] for name in names[: names.index(part)])
        gone = self.elapsed
        left = gone / done * (sum(self.weights.values()) - done) if done else None
        estimate = "" if left is None else f", about {_minutes(left)} to go"
        progress(f"[{names.index(part) + 1}/{len(names)}, {_minutes(gone)} gone{estimate}] {part}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# ---- flags


def positive(text: str) -> int:
    """A flag's whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """A flag's positive numbers, commas between them."""
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, commas between them") from None
    if not all(0 < number < math.inf for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} has a number that is not positive and finite")
    return found


def lengths(text: str) -> tuple[int, ...]:
    """A flag's whole numbers, commas between them, in ascending order."""
    return tuple(sorted({positive(number) for number in text.split(",")}))


def lengths_or_none(text: str) -> tuple[int, ...]:
    """The same, or an empty line for none."""
    return lengths(text) if text else ()


def names_out_of(kind: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of a flag that takes names out of ``known``, commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        for name in text.split(","):
            if name not in known:
                hint = suggest.hint(name, known)
                raise argparse.ArgumentTypeError(f"there is no {kind} {name!r}; {hint}known: {', '.join(known)}")
        return tuple(dict.fromkeys(text.split(",")))

    return parse
