"""--suite=gpu: what the first half hour of an NVIDIA GPU is for, in one list of rows, those that decide most first.

    python scripts/benchmark.py --suite=gpu --minutes=30 --carry=FOLDER --out=benchmarks/results/gpu.json

Right or wrong (forward and gradients at T 1024 against float64; 20 runs that must give the same bits, as no kernel has atomics:
a difference is a race), the headline gradients, where their time goes by kernel, variants, other libraries, a training step of
130 million parameters, small shapes, decoding, the kernels' tests, compiled, and long sequences.

Results are written to --out after each row; what stands there already, of the same commit and device, is not measured again.
Our programs are compiled from the start, in the order of the list, by processes side by side, into a cache of JAX's in --carry,
which also holds the float64 numbers: carry that folder from one device to the next. (``--prepare`` makes the numbers beforehand, on
any machine.)
The chunked form is not timed here: XLA takes minutes to choose its products at these sizes.

--rehearse goes through every kind of row once, tiny, kernels in their interpreter, on any machine: it shows that the command works.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import float64
from benchmarks.kernel_cases import CASES, PASSES, REHEARSAL, SHAPES, Shape
from benchmarks.suites import kernels, models
from benchmarks.timing import (
    names_out_of,
    positive,
    rows_so_far,
    until_deadline,
    write_results,
)  # fmt: skip
from seqmodels import command_line, ops
from seqmodels.circumstances import circumstances, num_cores
from seqmodels.errors import UserError
from seqmodels.ops.kernels.gpu import common

ROOT = Path(__file__).resolve().parents[2]
HEADLINE = "B8 T8192 H32 D128"
SMALL = tuple(name for name, shape in SHAPES.items() if shape.small)
LONG = tuple(name for name, shape in SHAPES.items() if not shape.small and name != HEADLINE)
# Ops by how much their figure decides.
BY_RANK = (
    "decay per channel", "delta rule", "gated delta rule", "kda", "selective scan (N 16)", "decay per head", "ssd (N 128)",
    "bonus", "no decay", "linear recurrence", "ssd (N 64)", "softmax attention",
)  # fmt: skip
# Constants of our kernels that only a device can choose: (module, name, value) against what stands there, on the op they touch.
VARIANTS = {
    "delta rule: 3 chunks in shared memory": ("delta rule", "delta_rule", "STAGES", 3),
    "delta rule: 1 chunk in shared memory": ("delta rule", "delta_rule", "STAGES", 1),
    "decay per channel: 1 chunk in shared memory": ("decay per channel", "gated_linear_attention", "STAGES", 1),
    "selective scan (N 16): blocks of 64 channels": ("selective scan (N 16)", "selective_scan", "_WIDE_STATES", 0),
}
TRAINED = ("gla", "gated_deltanet", "mamba2", "attention")
BIT_EQUAL_RUNS = 20
PEER_SECONDS = 60
# Of the largest value, bfloat16 inputs against float64: what the tests ask of the interpreter, with room for other inputs.
RIGHT = 2e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: ``kind`` of KINDS; of an op, a variant, or a mixer; at a shape; forward or with the gradient."""

    kind: str
    name: str = ""
    shape: str = ""
    part: str = ""

    @property
    def op(self) -> str | None:
        """Of ``CASES``, if it is one op's."""
        name = VARIANTS[self.name][0] if self.kind == "variant" else self.name
        return name if name in CASES else None


def ranked() -> list[Row]:
    """All rows, the first first."""
    by_op = functools.partial(itertools.product, ("time",), BY_RANK)
    rows = [Row("ceilings"), *(Row("check", name, "check", "gradient") for name in BY_RANK)]
    rows += [Row("time", name, HEADLINE, "gradient") for name in BY_RANK]
    rows += [Row("profile", name, HEADLINE, "gradient") for name in BY_RANK]
    rows += [Row("time", name, HEADLINE, "forward") for name in BY_RANK]
    rows += [Row("variant", name, HEADLINE, "gradient") for name in VARIANTS]
    rows += [Row("peer", name, HEADLINE, part) for part in PASSES for name in BY_RANK if CASES[name].peer is not None]
    rows += [Row("train", name, "130M") for name in TRAINED]
    rows += [Row(*row) for row in by_op(SMALL, PASSES)]
    rows += [Row("peer", name, shape, part) for name in BY_RANK if CASES[name].peer for shape in SMALL for part in PASSES]
    rows += [Row("decode", name, "130M") for name in TRAINED]
    rows += [Row("tests")]
    rows += [Row(*row) for row in by_op(LONG, PASSES)]
    return [row for row in rows if row.op is None or row.shape not in SHAPES or CASES[row.op].has(SHAPES[row.shape])]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", type=names_out_of("kind", KINDS), default=",".join(KINDS), help="which rows")
    parser.add_argument("--ops", type=names_out_of("op", BY_RANK), default=",".join(BY_RANK), help="of which ops")
    parser.add_argument("--minutes", type=positive, default=30, help="no further row is begun after so many")
    parser.add_argument("--carry", type=Path, default=ROOT / "runs" / "gpu", help="compiled programs and float64 numbers, kept")
    parser.add_argument("--compilers", type=positive, default=max(1, num_cores() - 4), help="processes that compile side by side")
    parser.add_argument("--prepare", action="store_true", help="only make the float64 numbers, on any machine")
    parser.add_argument("--rehearse", action="store_true", help="run everything once, tiny, in the kernels' interpreter")


@dataclasses.dataclass(frozen=True)
class Session:
    """What a row is measured with."""

    rehearse: bool
    carry: Path
    until: float  # of time.monotonic()

    @property
    def chip(self) -> tuple[float, float, float] | None:
        kind = jax.devices()[0].device_kind.lower()
        return next((peaks for name, peaks in kernels.CHIPS.items() if name.lower() in kind), None)

    @property
    def float64(self) -> Path:
        return self.carry / "float64"

    def shape(self, name: str) -> Shape:
        if self.rehearse:
            return REHEARSAL
        return float64.SHAPES["check"] if name == "check" else SHAPES[name]

    def size(self, name: str) -> str:
        return "tiny" if self.rehearse else name

    def interpreter(self) -> contextlib.AbstractContextManager:
        """In a rehearsal the kernels' of a GPU, where this JAX has one, else a TPU's."""
        if not self.rehearse:
            return contextlib.nullcontext()
        return ops.interpret("gpu" if jax.__version_info__ >= common.NEEDS_JAX else "tpu")


def run(options: argparse.Namespace) -> dict:
    device = jax.devices()[0]
    if not (options.rehearse or options.prepare) and device.platform != "gpu":
        raise UserError(f"--suite=gpu needs an NVIDIA GPU and found {device.device_kind}; --rehearse runs anywhere")
    session = Session(options.rehearse, options.carry, time.monotonic() + 60 * options.minutes)
    if options.prepare:
        make_float64(session, options.ops).wait()
        return {"rows": []}
    use_cache(session)
    results = {"rehearsal": options.rehearse, "rows": rows_so_far(options.out, device.device_kind)}
    done = {tuple(row[field] for field in ("kind", "name", "shape", "part")) for row in results["rows"]}
    rows = [row for row in ranked() if row.kind in options.kinds and (row.op is None or row.op in options.ops)]
    if options.rehearse:
        rows = once_each(rows)
    rows = [row for row in rows if dataclasses.astuple(row) not in done]
    about = {"commit": circumstances()["commit"], "device": device.device_kind}
    with compilers(session, rows, options.compilers), make_float64(session, options.ops):
        for fields in until_deadline([dataclasses.astuple(row) for row in rows], options.minutes):
            row = Row(*fields)
            begun = time.monotonic()
            try:
                found = KINDS[row.kind](row, session)
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, subprocess.SubprocessError) as error:
                found = {"lacking": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
            results["rows"].append(dataclasses.asdict(row) | about | found | {"seconds": time.monotonic() - begun})
            print_row(results["rows"][-1])
            write_results(options.out, results)
    results["verdicts"] = verdicts(results["rows"])
    for line in results["verdicts"]:
        print(f"  {line}")
    return results


def once_each(rows: list[Row]) -> list[Row]:
    """One row of a kind, op and pass: at the size of a rehearsal all shapes are one."""
    found = {}
    for row in rows:
        of = (row.name, row.part) if row.kind in ("check", "time") else ()
        found.setdefault((row.kind, *of), row)
    return list(found.values())


# ---- beside the rows: compilers and the float64 numbers


def use_cache(session: Session) -> None:
    """JAX's cache of compiled programs, in the folder that is carried: of all programs, whatever they took."""
    jax.config.update("jax_compilation_cache_dir", str(session.carry / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_enable_compilation_cache", True)


def programs_of(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(op, shape, pass) of what the rows run, in their order."""
    return list(dict.fromkeys((row.name, row.shape, row.part) for row in rows if row.kind in ("check", "time", "profile")))


@contextlib.contextmanager
def compilers(session: Session, rows: list[Row], count: int) -> Iterator[None]:
    """Processes that fill the cache beside the measurements, each with every ``count``-th program; ended at the end."""
    programs = [] if session.rehearse else programs_of(rows)
    count = min(count, len(programs))
    # None may take the device's memory; what one has compiled this process reads from the cache.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.02"}
    children = [
        subprocess.Popen(
            worker("compile", str(session.carry), json.dumps(programs[place::count])),
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for place in range(count)
    ]  # fmt: skip
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def worker(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.suites.gpu", *arguments]


def compile_programs(carry: str, programs: str) -> None:
    """A worker's task."""
    session = Session(False, Path(carry), 0.0)
    use_cache(session)
    for name, shape, part in json.loads(programs):
        with contextlib.suppress(Exception):  # the row that wants it says what was wrong
            program_of(session, name, shape, part)


def program_of(session: Session, name: str, shape: str, part: str):
    """Compiled: our kernel's program for a row."""
    arguments = jax.eval_shape(functools.partial(kernels.arguments_of, CASES[name], session.shape(shape), part))
    with session.interpreter():
        return kernels.lower(CASES[name], "pallas", arguments).compile()


def make_float64(session: Session, names: tuple[str, ...]) -> subprocess.Popen:
    """The process that makes those that are missing, one op after the other by rank."""
    shape = "rehearsal" if session.rehearse else "check"
    names = [name for name in BY_RANK if name in names]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.float64", str(session.float64), shape, *names], cwd=ROOT, stdout=subprocess.DEVNULL
    )


# ---- the kinds of rows


def ceilings(row: Row, session: Session) -> dict:
    """What a copy and a product of large matrices reach here: bytes/s and FLOP/s."""
    side = 256 if session.rehearse else 8192
    x = jnp.ones((side, side), jnp.bfloat16)
    y = jnp.ones((2 if session.rehearse else 64, side, side), jnp.bfloat16)
    product, copy = jax.jit(lambda x: x @ x).lower(x).compile(), jax.jit(lambda y: -y).lower(y).compile()
    calls = {"product": kernels.queued_by_jax(product, (x,)), "copy": kernels.queued_by_jax(copy, (y,))}
    if session.rehearse:
        return {name: call(1) for name, call in calls.items()}
    ms = kernels.in_turns(calls)
    return {"flops_per_second": 2e3 * side**3 / ms["product"], "bytes_per_second": 2e3 * y.nbytes / ms["copy"]}


def check(row: Row, session: Session) -> dict:
    """Errors of the output and every gradient, relative to the largest value, against float64; and whether runs agree to the bit."""
    path = float64.path_of(session.float64, row.name, session.shape("check"))
    while not path.exists():  # it is being made, by rank as this is
        if time.monotonic() > session.until:
            raise ValueError(f"{path} is missing: --prepare makes it beforehand")
        time.sleep(0.2)
    given, expected = float64.read(path)
    abstract = jax.eval_shape(functools.partial(kernels.arguments_of, CASES[row.name], session.shape("check"), "gradient"))
    inputs = {name: jnp.asarray(given[name], x.dtype) for name, x in abstract[0].items()}
    d_output = jnp.asarray(given["d_output"], abstract[1].dtype)
    program = program_of(session, row.name, "check", "gradient")
    output, (gradients,) = first = program(inputs, d_output)
    errors = {name: kernels.relative_error(found, expected[name]) for name, found in ({"output": output} | gradients).items()}

    @jax.jit
    def same(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
        return jnp.stack([jnp.array_equal(x, y, equal_nan=True) for x, y in pairs]).all()

    runs = 2 if session.rehearse else BIT_EQUAL_RUNS
    different = sum(not same(first, program(inputs, d_output)) for _ in range(runs - 1))
    return {"error": errors, "runs": runs, "different_runs": different}


def time_ours(row: Row, session: Session) -> dict:
    """As a row of --suite=kernels, of our kernel alone."""
    case, shape = CASES[row.name], session.shape(row.shape)
    program = program_of(session, row.name, row.shape, row.part)
    with session.interpreter():
        return kernels.measure(case, shape, row.part, {"pallas": program}, None, session.chip, rehearse=session.rehearse)


def profile(row: Row, session: Session) -> dict:
    """Milliseconds of a call by the name of what ran on the device."""
    arguments = kernels.arguments_of(CASES[row.name], session.shape(row.shape), row.part)
    program, calls = program_of(session, row.name, row.shape, row.part), 3
    jax.block_until_ready(program(*arguments))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(program(*arguments))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        spent = collections.Counter()
        for event in (event for line in lines if line.name.startswith("Stream") for event in line.events):
            spent[event.name] += event.duration_ns / 1e6 / calls
    return {"ms_by_kernel": dict(sorted(spent.items(), key=lambda item: -item[1]))}


def variant(row: Row, session: Session) -> dict:
    """One constant of a kernel changed."""
    _, module, constant, value = VARIANTS[row.name]
    module = importlib.import_module(f"seqmodels.ops.kernels.gpu.{module}")
    before = getattr(module, constant)
    try:
        setattr(module, constant, value)
        return {"op": row.op, constant: value} | time_ours(dataclasses.replace(row, kind="time", name=row.op), session)
    finally:
        setattr(module, constant, before)


def peer(row: Row, session: Session) -> dict:
    """The other library, in a process of its own that has a minute: its kernels are chosen by trying many."""
    if importlib.util.find_spec("torch") is None:
        return {"lacking": "no PyTorch here (pip install torch flash-linear-attention mamba-ssm)"}
    if session.rehearse:
        return {"lacking": "not rehearsed: it needs the device"}
    done = subprocess.run(
        worker("peer", row.name, row.shape, row.part), cwd=ROOT, capture_output=True, text=True, timeout=PEER_SECONDS
    )
    if done.returncode:
        return {"lacking": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def time_peer(name: str, shape: str, part: str) -> None:
    """A worker's task."""
    case = CASES[name]
    arguments = kernels.arguments_of(case, SHAPES[shape], part)
    call = kernels.Peer().call(case, *arguments)
    print(json.dumps({"ms": kernels.in_turns({"peer": call})["peer"]}))


def train(row: Row, session: Session, contexts: tuple[int, ...] = ()) -> dict:
    """A training step of a whole model, as in --suite=models."""
    config = models.model_config(row.name, session.size(row.shape))
    return dataclasses.asdict(models.cost.measure(config, models.VOCAB_SIZE, contexts=contexts, decode_tokens=64))


def decode(row: Row, session: Session) -> dict:
    """Seconds of a token of a whole model after some context."""
    return {"decode_seconds": train(row, session, contexts=(4,) if session.rehearse else (1024,))["decode_seconds"]}


def tests(row: Row, session: Session) -> dict:
    """The kernels' tests, compiled, as far as the time goes."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu_kernels", "tests/ops/kernels"]
    if session.rehearse:
        command.append("--collect-only")
    seconds = max(10.0, session.until - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        return {"passed": len(re.findall(r"(?m)^[.FsxE]*", said)), "said": f"not over after {seconds:.0f} s: {said[-300:]}"}
    return {"returncode": done.returncode, "said": done.stdout.strip()[-2000:]}


KINDS: dict[str, Callable[[Row, Session], dict]] = {
    "ceilings": ceilings, "check": check, "time": time_ours, "profile": profile, "variant": variant, "peer": peer,
    "train": train, "decode": decode, "tests": tests,
}  # fmt: skip


# ---- what was found


def print_row(row: dict) -> None:
    title = " ".join(filter(None, (row["kind"], row["name"], row["shape"], row["part"])))
    print(f"  {title}: {summary(row)} [{row['seconds']:.0f} s]", flush=True)


def summary(row: dict) -> str:
    """What a row's measurement came to, in a line."""
    if "lacking" in row:
        return row["lacking"]
    if "error" in row and row["kind"] == "check":
        worst = max(row["error"], key=row["error"].get)
        return f"{row['error'][worst]:.1e} ({worst}) off float64, {row['different_runs']} of {row['runs']} runs differ"
    if "contenders" in row:
        ours = row["contenders"]["pallas"]
        return ", ".join([f"{ours['ms']:.3f} ms", *kernels.of_bound(row)]) if "ms" in ours else "went through"
    if "ms_by_kernel" in row:
        longest = list(row["ms_by_kernel"].items())[:5]
        return ", ".join(f"{name} {ms:.3f}" for name, ms in longest) or "nothing of a GPU in the trace"
    if "ms" in row:
        return f"{row['ms']:.3f} ms"
    if "train_tokens_per_second" in row:
        return f"{row['train_tokens_per_second']:,.0f} tokens/s"
    if "decode_seconds" in row:
        return ", ".join(f"{1e3 * seconds:.3f} ms after {context}" for context, seconds in row["decode_seconds"].items())
    if "said" in row:
        return row["said"].splitlines()[-1] if row["said"] else ""
    return ", ".join(f"{name} {row[name]:.3g}" for name in ("flops_per_second", "bytes_per_second") if name in row)


def verdicts(rows: list[dict]) -> list[str]:
    """What is wrong, and how we stand beside the other libraries, the worst first."""
    wrong = []
    for row in rows:
        if row["kind"] == "check" and "error" in row:
            wrong += [
                f"WRONG: {row['name']}, {name}: {error:.1e} off" for name, error in row["error"].items() if not error <= RIGHT
            ]
            if row["different_runs"]:
                wrong.append(f"RACE: {row['name']}: {row['different_runs']} of {row['runs']} runs differ from the first")
    place = lambda row: (row["name"], row["shape"], row["part"])  # noqa: E731
    timed = [row for row in rows if row["kind"] == "time" and "contenders" in row and "pallas" in row["contenders"]]
    ours = {place(row): pallas["ms"] for row in timed if "ms" in (pallas := row["contenders"]["pallas"])}
    ratios = [(ours[place(row)] / row["ms"], place(row)) for row in rows
              if row["kind"] == "peer" and "ms" in row and place(row) in ours]  # fmt: skip
    return wrong + [
        f"{ratio:.2f} of the other library's time: {', '.join(where)}" for ratio, where in sorted(ratios, reverse=True)
    ]


def main() -> None:
    {"compile": compile_programs, "peer": time_peer}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    command_line.run(main)
