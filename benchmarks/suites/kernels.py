"""--suite=kernels: the recurrences at the sizes of large models, for a GPU or a TPU.

Our Pallas kernels, our chunked form and flash-linear-attention's kernels (pip install torch flash-linear-attention; where it
has none for an op the column is empty, and PyTorch's own attention stands for it there), forward and forward with backward,
bfloat16, beside the roofline: the time that the products alone take at the chip's peak, the bytes alone at its memory's speed, or
the exponentials alone, whichever is longest. How far our output is from theirs stands beside it.

Many calls are queued before one is waited for: what the host does in between does not count. Results are written after each
row to --out, and what stands there already, of the same commit and device, is not measured again: a run that --minutes has
ended goes on when it is started again.

--contenders=pallas,peer leaves the chunked form out, whose products XLA takes minutes to choose at these sizes.

--rehearse runs our contenders once at a tiny size, kernels in their interpreter, on any machine: it shows that the command works.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from benchmarks.kernel_cases import CASES, PASSES, REHEARSAL, SHAPES, Case, Shape
from benchmarks.timing import (
    names_out_of,
    positive,
    progress,
    rows_so_far,
    until_deadline,
    write_results,
)  # fmt: skip
from seqmodels import ops
from seqmodels.circumstances import circumstances, num_cores
from seqmodels.ops.kernels.gpu import common

OURS = ("pallas", "chunked")
PEER = "peer"
ROUNDS = 5
ROUND_SECONDS = 0.1  # of queued calls
ROWS_COMPILED_TOGETHER = 8

# FLOP/s of dense bfloat16 products, bytes/s of memory, exponentials/s that a bound is counted with. The H200's are what is stated for
# its goals; the H100 multiplies as fast. Other memories: 0.9 of the data sheet's, as the H200's is; the TPUs' products: the data
# sheet's.
# Exponentials: 16 a clock of 1.755 GHz on each of 132 multiprocessors; a TPU's vector unit makes them of other operations.
HOPPER_EXPONENTIALS = 16 * 132 * 1.755e9
CHIPS = {
    "H200": (790e12, 4.3e12, HOPPER_EXPONENTIALS),
    "H100": (790e12, 3.0e12, HOPPER_EXPONENTIALS),
    "TPU v5 lite": (197e12, 0.74e12, math.inf),
    "TPU v6 lite": (918e12, 1.48e12, math.inf),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=names_out_of("op", CASES), default=",".join(CASES), help="what to time")
    parser.add_argument("--shapes", type=names_out_of("shape", SHAPES), default=",".join(SHAPES), help="at which sizes")
    parser.add_argument(
        "--contenders", type=names_out_of("contender", (*OURS, PEER)), default=",".join((*OURS, PEER)), help="whom to time"
    )
    parser.add_argument("--minutes", type=positive, default=60, help="no further row is begun after so many")
    parser.add_argument("--rehearse", action="store_true", help="run everything once, tiny, in the kernels' interpreter")


def run(options: argparse.Namespace) -> dict:
    shapes = {"rehearsal": REHEARSAL} if options.rehearse else {name: SHAPES[name] for name in options.shapes}
    device = jax.devices()[0]
    chip = next((peaks for name, peaks in CHIPS.items() if name.lower() in device.device_kind.lower()), None)
    peer = find_peer(device) if PEER in options.contenders else None
    ours = [name for name in OURS if name in options.contenders]
    so_far = [row for row in rows_so_far(options.out, device.device_kind) if {*ours} <= row["contenders"].keys()]
    if peer is not None:
        so_far = [row for row in so_far if PEER in row["contenders"] or CASES[row["op"]].peer is None]
    results = {"rows": so_far, "rehearsal": options.rehearse}
    done = {(row["op"], row["shape"], row["pass"]) for row in results["rows"]}
    possible = [
        (name, shape, part) for shape in shapes for name in options.ops if CASES[name].has(shapes[shape]) for part in PASSES
    ]
    about = {"commit": circumstances()["commit"], "device": device.device_kind}
    # On a device its own kernels; else, in the interpreter, those of the GPU, where this JAX has one.
    interpreted = "gpu" if jax.__version_info__ >= common.NEEDS_JAX else "tpu"
    wanted = [row for row in possible if row not in done]
    programs = {}
    for name, shape, part in until_deadline(wanted, options.minutes):
        with ops.interpret(interpreted) if options.rehearse else contextlib.nullcontext():
            if (name, shape, part) not in programs:
                place = wanted.index((name, shape, part))
                together = wanted[place : place + ROWS_COMPILED_TOGETHER]
                progress(
                    f"compiling our programs for this and the next {len(together) - 1} rows; at large sizes this takes minutes"
                )
                programs = compile_rows(together, shapes, ours)
            made = programs.pop((name, shape, part))
            row = measure(CASES[name], shapes[shape], part, made, peer, chip, rehearse=options.rehearse)
        results["rows"].append({"op": name, "shape": shape, "pass": part} | about | row)
        print_row(results["rows"][-1], first=len(results["rows"]) == 1)
        write_results(options.out, results)
    results["goals"] = goal_verdicts(results["rows"])
    for goal in results["goals"]:
        print(f"  {goal['verdict']:>10s}: {goal['goal']}")
    return results


# ---- measuring


def compile_rows(
    rows: list[tuple[str, str, str]], shapes: dict[str, Shape], names: Collection[str] = OURS
) -> dict[tuple[str, str, str], dict]:
    """By row and name: each of our contenders' programs, or in one line why there is none. They compile side by side."""
    found = {row: {} for row in rows}
    lowered = {}
    for row in rows:
        case, shape, part = CASES[row[0]], shapes[row[1]], row[2]
        arguments = jax.eval_shape(functools.partial(arguments_of, case, shape, part))
        for name in names:
            try:
                lowered[row, name] = lower(case, name, arguments)
            except NotImplementedError as reason:
                found[row][name] = str(reason)
    with concurrent.futures.ThreadPoolExecutor(max_workers=num_cores()) as pool:
        for (row, name), program in zip(lowered, pool.map(compiled_or_reason, lowered.values())):
            found[row][name] = program
    return found


def arguments_of(case: Case, shape: Shape, part: str) -> tuple:
    """The inputs, and for the gradient the output's cotangent."""
    inputs = case.inputs(shape, jax.random.key(0))
    if part == "forward":
        return (inputs,)
    output = output_of(case, inputs)
    return inputs, jax.random.normal(jax.random.key(1), output.shape, output.dtype)


def output_of(case: Case, inputs: dict) -> jax.ShapeDtypeStruct:
    """Shape and dtype."""
    return jax.eval_shape(lambda inputs: case.run(**inputs, implementation="chunked")[0], inputs)


def measure(case: Case, shape: Shape, part: str, programs: dict, peer, chip, *, rehearse: bool) -> dict:
    """Milliseconds of a call of each contender, or why there is none; the bound; how far we are from the peer.

    Args:
      programs: ours, of ``compile_rows``.
      peer: a ``Peer`` or None.
      chip: the peaks of ``CHIPS`` or None.
      rehearse: nothing is timed.
    """
    arguments = arguments_of(case, shape, part)
    found, calls, outputs = {}, {}, {}
    for name, program in programs.items():
        if isinstance(program, str):
            found[name] = {"lacking": program}
            continue
        found[name] = {"temp_bytes": program.memory_analysis().temp_size_in_bytes}
        calls[name] = queued_by_jax(program, arguments)
        outputs[name] = jax.tree.leaves(program(*arguments))
    error = {}
    if {*OURS} <= outputs.keys():
        pairs = zip(outputs["pallas"], outputs["chunked"])
        error["pallas to chunked"] = max(relative_error(x, reference) for x, reference in pairs)
    if peer is not None and case.peer is not None:
        try:
            calls[PEER], output = peer.call(case, *arguments), peer.output(case, arguments[0])
            found[PEER] = {}
            # The first leaf is the output; gradients come after it.
            error |= {f"{name} to the peer": relative_error(outputs[name][0], output) for name in OURS if name in outputs}
        except Exception as reason:  # anything that a library may raise: it is their column that stays empty
            calls.pop(PEER, None)
            found[PEER] = {"lacking": f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:200]}"}
    outputs.clear()
    if not rehearse:
        for name, milliseconds in in_turns(calls).items():
            found[name]["ms"] = milliseconds
    passed = bytes_of(arguments[0], output_of(case, arguments[0]), part)
    row = {"contenders": found, "error": error, "flops": case.flops(shape, part), "bytes": passed}
    row["exponentials"] = case.exponentials(shape, part)
    return row | ({} if chip is None else bound(row, chip))


def bound(row: dict, chip: tuple[float, float, float]) -> dict:
    """The time that products, memory or exponentials alone take at a chip's peaks, whichever is longest, and which it is."""
    needed = {"products": row["flops"], "memory": row["bytes"], "exponentials": row["exponentials"]}
    seconds = {name: amount / peak for (name, amount), peak in zip(needed.items(), chip, strict=True)}
    longest = max(seconds, key=seconds.get)
    return {"bound_ms": 1e3 * seconds[longest], "bound_by": longest}


def of_bound(row: dict) -> list[str]:
    """How near our kernel comes to the bound, and which resource that is of; nothing where either was not measured."""
    ours = row["contenders"]["pallas"] if "pallas" in row["contenders"] else {}
    if "ms" not in ours or "bound_ms" not in row:
        return []
    return [f"{row['bound_ms'] / ours['ms']:.0%} of the bound ({row['bound_by']})"]


def lower(case: Case, implementation: str, arguments: tuple):
    """The forward pass of ``(inputs,)``, or both passes of ``(inputs, cotangent)``."""

    def forward(inputs):
        return case.run(**inputs, implementation=implementation)[0]

    def gradient(inputs, d_output):
        output, pull = jax.vjp(forward, inputs)
        return output, pull(d_output)

    return jax.jit(forward if len(arguments) == 1 else gradient).lower(*arguments)


def compiled_or_reason(lowered):
    """The program, or in one line why there is none or why it would not fit."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return f"does not compile: {str(error).splitlines()[0][:200]}"
    memory = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    stats = jax.devices()[0].memory_stats()
    if stats is not None and needed > stats["bytes_limit"]:
        return f"needs {needed / 2**30:.0f} GiB"
    return program


def bytes_of(inputs: dict, output: jax.Array | jax.ShapeDtypeStruct, part: str) -> int:
    """What must pass through main memory: inputs and output; with the backward pass again, and the gradients of both."""
    read = sum(x.nbytes for x in inputs.values())
    written = output.size * output.dtype.itemsize
    return read + written if part == "forward" else 3 * read + 2 * written


def queued_by_jax(program, arguments) -> Callable[[int], None]:
    def call(times: int) -> None:
        result = None
        for _ in range(times):
            result = program(*arguments)
        jax.block_until_ready(result)

    return call


def in_turns(calls: dict[str, Callable[[int], None]]) -> dict[str, float]:
    """Milliseconds of a call of each, the least of some rounds of many queued ones."""
    times = {}
    for name, call in calls.items():
        call(2)
        begun = time.perf_counter()
        call(2)
        times[name] = max(1, min(200, int(ROUND_SECONDS / max(1e-5, (time.perf_counter() - begun) / 2))))
    best = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begun = time.perf_counter()
            call(times[name])
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begun) / times[name])
    return best


def relative_error(x, reference) -> float:
    """The largest difference, relative to the largest value."""
    x, reference = (jnp.asarray(each, jnp.float32) for each in (x, reference))
    return float(jnp.max(jnp.abs(x - reference)) / jnp.max(jnp.abs(reference)))


def find_peer(device: jax.Device) -> "Peer | None":
    """flash-linear-attention where it runs."""
    if device.platform == "gpu" and importlib.util.find_spec("fla"):
        return Peer()
    progress("no column of flash-linear-attention: that needs an NVIDIA GPU (pip install torch flash-linear-attention)")
    return None


class Peer:
    """flash-linear-attention, on the same device and the same numbers."""

    def __init__(self):
        import torch

        self.torch = torch

    def _inputs(self, case: Case, inputs: dict) -> dict:
        return {name: self.torch.from_dlpack(x) for name, x in case.peer_inputs(inputs).items()}

    def call(self, case: Case, inputs: dict, d_output: jax.Array | None = None) -> Callable[[int], None]:
        """Queues so many calls, with the gradient if there is a cotangent, and waits. It has been called once."""
        given = {name: x.clone().requires_grad_(d_output is not None) for name, x in self._inputs(case, inputs).items()}
        d_output = None if d_output is None else self.torch.from_dlpack(d_output)

        def queue(times: int) -> None:
            for _ in range(times):
                output = case.peer(**given)
                if d_output is not None:
                    self.torch.autograd.grad(output, list(given.values()), d_output.to(output.dtype))
            if self.torch.cuda.is_available():
                self.torch.cuda.synchronize()

        queue(1)
        return queue

    def output(self, case: Case, inputs: dict):
        with self.torch.no_grad():
            return jnp.from_dlpack(case.peer(**self._inputs(case, inputs)).contiguous())


# ---- what was found


def print_row(row: dict, *, first: bool) -> None:
    if first:
        print(f"\n  {'op':24s} {'shape':22s} {'pass':>9s} {'bound':>8s} {'pallas':>8s} {'chunked':>8s} {'peer':>8s}  ms")
    cells = [f"{row['bound_ms']:8.3f}" if "bound_ms" in row else f"{'':8s}"]
    for name in (*OURS, PEER):
        contender = row["contenders"].get(name)
        cells.append(f"{contender['ms']:8.3f}" if contender and "ms" in contender else f"{'-':>8s}")
    ours, peer = (row["contenders"][name] if name in row["contenders"] else {} for name in ("pallas", PEER))
    said = of_bound(row)
    if "ms" in peer and "ms" in ours:
        said.append(f"{peer['ms'] / ours['ms']:.2f}x the peer's speed")
    said += [f"{what} {error:.1e}" for what, error in row["error"].items()]
    said += [f"{name}: {found['lacking']}" for name, found in (("pallas", ours), (PEER, peer)) if "lacking" in found]
    print(f"  {row['op']:24s} {row['shape']:22s} {row['pass']:>9s} {' '.join(cells)}  {', '.join(said)}", flush=True)


def goal_verdicts(rows: list[dict]) -> list[dict]:
    """The stated goals, of the rows there are figures for."""

    def time_of(row, name):
        contender = row["contenders"].get(name)
        return contender.get("ms") if contender else None

    verdicts = []

    def add(goal: str, row: dict, measured: float, holds: bool) -> None:
        where = f"{row['op']}, {row['shape']}, {row['pass']}"
        verdict = "met" if holds else "missed"
        verdicts.append({"goal": f"{goal} ({where}: {measured:.2f})", "verdict": verdict, "measured": measured})

    for row in rows:
        ours, theirs, shape = time_of(row, "pallas"), time_of(row, PEER), SHAPES.get(row["shape"])
        if ours is None or shape is None:
            continue
        if theirs is not None and CASES[row["op"]].recurrence:
            most = 0.5 if shape.small else 1.0
            add(f"at most {most:g} of the peer's time", row, ours / theirs, ours <= most * theirs)
        if "bound_ms" in row and shape.steps >= 8192:
            add("at least half of the bound", row, row["bound_ms"] / ours, row["bound_ms"] >= 0.5 * ours)
    attention = {row["pass"]: time_of(row, "pallas") for row in rows
                 if row["op"] == "softmax attention" and row["shape"] == "B8 T1024 H8 D64"}  # fmt: skip
    for row in rows:
        ours, cudnn = time_of(row, "pallas"), attention.get(row["pass"])
        if row["shape"] == "B8 T1024 H8 D64" and CASES[row["op"]].recurrence and ours and cudnn:
            add("no slower than cuDNN's attention", row, ours / cudnn, ours <= cudnn)
    return verdicts
