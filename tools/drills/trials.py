"""What every drill needs: a place, a tiny run, child processes that can be killed or limited, and a count of outcomes."""

import dataclasses
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

import train
from seqmodels import command_line

TINY: Final = {
    "data.source": "toy", "data.toy_documents": 60, "data.tokenizer": "bytes", "data.seq_len": 16, "data.batch_size": 2,
    "model.d_model": 32, "model.repeats": 1, "model.pattern": "linear_attention", "optim.warmup_steps": 2,
    "train.steps": 40, "train.eval_every_steps": 10, "train.checkpoint_every_steps": 10, "train.log_every_steps": 5,
    "train.eval_tokens": 64, "train.sample_every_steps": 0,
}  # fmt: skip


@dataclasses.dataclass
class Count:
    """How often something was tried, and what did not hold: one line for each."""

    tried: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: str | None = None  # why nothing, or not all, could be tried here

    def record(self, holds: bool, otherwise: str) -> None:
        self.tried += 1
        if not holds:
            self.failures.append(" ".join(otherwise.split())[:300])

    @property
    def held(self) -> int:
        return self.tried - len(self.failures)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the drills of one call work, how much of them, and the random numbers that choose moments and bytes."""

    folder: Path
    long: bool
    draw: random.Random

    def some(self, quick: int, long: int) -> int:
        """How many trials."""
        return long if self.long else quick

    def new(self, name: str) -> Path:
        """A folder that is empty."""
        return Path(tempfile.mkdtemp(prefix=f"{name}_", dir=self.folder))

    def flags(self, workdir: Path, **changes: object) -> list[str]:
        """The command line of a tiny run; ``changes`` have `__` for a dot."""
        caches = {"data.cache_dir": self.folder / "tokens", "train.compilation_cache_dir": self.folder / "programs"}
        values = TINY | caches | {name.replace("__", "."): value for name, value in changes.items()}
        return [
            "train.py", "--config=configs/base.py", f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in values.items()),
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: the signal that killed it), what it wrote, seconds, most memory in bytes."""

    code: int
    out: str
    err: str
    seconds: float
    most_bytes: int

    @property
    def in_one_line(self) -> bool:
        """Whether it ended with a mistake in one line, as every program here does, without a traceback."""
        return self.code == 1 and "Traceback" not in self.err and "error: " in self.err.strip().splitlines()[-1]


def in_child(
    function: Callable[[], None],
    *,
    after: float | None = None,
    number: int = signal.SIGKILL,
    limit: tuple[int, int] | None = None,
    environment: dict[str, str | None] | None = None,
    seconds: float = 300.0,
) -> Ended:
    """Run a program in a fork of this process, which has imported what takes time and has not started JAX's backend.

    Args:
        after: send the signal ``number`` after so many seconds.
        limit: a resource's limit (`resource.RLIMIT_...`, value).
        environment: variables to set, or with None to take away.
        seconds: it is killed after so long.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_child(function, out.fileno(), err.fileno(), limit, environment)
        status, used = _wait(child, begun, after, number, seconds)
        taken = time.monotonic() - begun
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        texts = (file.read().decode("utf-8", "replace") for file in (out, err))
        return Ended(code, *texts, taken, used.ru_maxrss * 1024)


def _be_child(function, out, err, limit, environment) -> None:
    code = 70
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for name, value in (environment or {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails then, as on a disk that is full
            resource.setrlimit(limit[0], (limit[1], limit[1]))
        command_line.run(function)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)


def _wait(child: int, begun: float, after: float | None, number: int, seconds: float):
    sent = after is None
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used
        gone = time.monotonic() - begun
        if not sent and gone >= after:
            os.kill(child, number)
            sent = True
        if gone >= seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def train_in_child(flags: list[str], **options) -> Ended:
    return in_child(lambda: train.main(flags), **options)


def outcome(workdir: Path) -> dict:
    """What a run came to: the checksums of its newest checkpoint's arrays, and its rows without their times."""
    steps = sorted(int(entry.name) for entry in (workdir / "checkpoints").iterdir() if entry.name.isdigit())
    record = json.loads((workdir / "checkpoints" / str(steps[-1]) / "record" / "metadata").read_text())
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        "step": steps[-1],
        "checksums": record["checksums"],
        "rows": [[row["step"], row["split"], row["loss"]] for row in rows],
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
