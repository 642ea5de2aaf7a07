"""How long a program will take to compile, from what compiling took on this machine: kept beside the compiled programs."""

import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jaxlib

from seqmodels.errors import UserError
from seqmodels.formats import json_text

FILE_NAME = "seconds.jsonl"
"""Of the folder of compiled programs: a line for each compilation. JAX's own files there end in -cache and -atime."""

READ = 64 * 1024  # bytes at its end that are read
ALIKE = 5  # so many programs, the nearest in length, say what another will take
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # of jax.monitoring


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a program before it is compiled.

    Attributes:
        digest: equal for equal StableHLO, compiler and devices, for which JAX's cache keeps one program.
        lines: of its StableHLO, about one for each operation.
        place: the compiler and the devices.
    """

    digest: str
    lines: int
    place: str


def program(lowered: jax.stages.Lowered) -> Program:
    """Of what `jax.jit(...).lower` gives, for the devices of this process."""
    devices = jax.devices()
    flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    place = f"jaxlib {jaxlib.version.__version__}, {len(devices)} x {devices[0].device_kind}, {flags}"
    text = lowered.as_text()
    digest = hashlib.blake2b(f"{place}\n{text}".encode(), digest_size=16).hexdigest()
    return Program(digest, text.count("\n"), place)


def folder() -> Path | None:
    """Where JAX keeps compiled programs; None where it keeps none, or not in a folder of this machine."""
    name = jax.config.jax_compilation_cache_dir
    return Path(name) if name and jax.config.jax_enable_compilation_cache and "://" not in name else None


def expected(of: Program, kept: Path | None) -> tuple[str, str]:
    """How long compiling takes and how that is known, for a person.

    Args:
        kept: the `folder` of compiled programs, where earlier times are.
    """
    there = [each for each in _read(kept) if each["place"] == of.place]
    same = [each for each in there if each["digest"] == of.digest]
    loaded = [each["seconds"] for each in same if each["from_cache"]]
    if loaded:
        return f"about {_seconds(loaded[-1])}", "it is kept from an earlier run"
    if same:
        return f"at most {_seconds(same[-1]['seconds'])}", "it is kept from an earlier run"
    others = {each["digest"]: each for each in there if not each["from_cache"]}.values()
    nearest = sorted(others, key=lambda each: abs(each["lines"] / of.lines - 1))[:ALIKE]
    if not nearest:
        return "how long is not known", "nothing like it was compiled here"
    about = of.lines * statistics.median(each["seconds"] / each["lines"] for each in nearest)
    return f"about {_seconds(about)}", f"by {len(nearest)} programs compiled here" if len(nearest) > 1 else "by one compiled here"


@dataclasses.dataclass
class Took:
    """How long a compilation took; `from_cache`: the program was compiled before, and read."""

    seconds: float = 0.0
    from_cache: bool = False

    def __str__(self) -> str:
        return f"{'compiled before, read' if self.from_cache else 'compiled'} in {_seconds(self.seconds)}"


@contextlib.contextmanager
def measured(of: Program, kept: Path | None) -> Iterator[Took]:
    """Measures the compilation of a program inside, and keeps what it took.

    Yields:
        What it took, once that is over.
    """
    took, begun = Took(), time.perf_counter()

    def listen(event: str, **_: object) -> None:
        took.from_cache |= event == CACHE_HIT

    jax.monitoring.register_event_listener(listen)
    try:
        yield took
    finally:
        jax.monitoring.unregister_event_listener(listen)
    took.seconds = time.perf_counter() - begun
    if kept is not None:
        line = json.dumps(dataclasses.asdict(of) | dataclasses.asdict(took))
        with contextlib.suppress(OSError), open(kept / FILE_NAME, "a", encoding="utf-8") as file:  # of a cache that is read only
            file.write(line + "\n")


def _read(kept: Path | None) -> Sequence[dict]:
    """The newest lines, the last one last; a line that is not as `measured` writes it is left out."""
    if kept is None:
        return []
    try:
        with open(kept / FILE_NAME, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - READ))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [each for each in map(_parsed, lines) if each is not None]


def _parsed(line: str) -> dict | None:
    try:
        each = json_text.parse(line, FILE_NAME)
    except UserError:
        return None
    wanted = {"digest": str, "lines": int, "place": str, "seconds": float, "from_cache": bool}
    is_sound = isinstance(each, dict) and all(isinstance(each.get(name), kind) for name, kind in wanted.items())
    return each if is_sound and each["lines"] > 0 and each["seconds"] > 0 else None


def _seconds(value: float) -> str:
    """As precise as an estimate is."""
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
