"""--suite=ops: every recurrence of seqmodels/ops in every form it has.

Time, compile time and peak memory of values and gradients at several lengths, as ratios to the chunked form; how the
time grows with the length; the stated goals with their verdicts; a picture of time against length.

A gradient is a forward and a backward pass: of all inputs, through a random cotangent of the outputs and of the final
state. Memory is that of a program's temporaries, as the compiler lays them out.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.op_cases import CHUNKED, GROWTH_BATCH_SIZE, OPS, PASSES, STATED_SIZES, Op
from benchmarks.op_report import goal_verdicts, picture, print_goals, print_growth, print_rows
from benchmarks.timing import Progress, lengths, lengths_or_none, names_out_of, positive, take_turns
from seqmodels import ops
from seqmodels.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=names_out_of("op", OPS), default=",".join(OPS), help="what to time")
    parser.add_argument(
        "--implementations",
        type=names_out_of("implementation", ops.IMPLEMENTATIONS),
        default="recurrent,associative,parallel,chunked",
        help=f"in which forms, of {', '.join(ops.IMPLEMENTATIONS)}; what an op lacks is listed with the reason",
    )
    parser.add_argument("--lengths", type=lengths, default="256,1024,4096", help="T, steps of a sequence")
    parser.add_argument(
        "--growth_lengths",
        type=lengths_or_none,
        default="1024,4096,16384,32768",
        help=f'lengths for the growth of the chunked gradient, at batch size {GROWTH_BATCH_SIZE}; "" for none',
    )
    parser.add_argument("--batch_size", type=positive, default=STATED_SIZES["batch_size"], help="B, sequences")
    parser.add_argument("--heads", type=positive, default=STATED_SIZES["heads"], help="H of what has heads")
    parser.add_argument("--key_dim", type=positive, default=STATED_SIZES["key_dim"], help="K, of keys in each head")
    parser.add_argument("--value_dim", type=positive, default=STATED_SIZES["value_dim"], help="V, of values")
    parser.add_argument("--channels", type=positive, default=STATED_SIZES["channels"], help="E of what has none")
    parser.add_argument("--states", type=positive, default=STATED_SIZES["states"], help="N of selective_scan")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=3.0, help="a contender whose turns took so long gets no third")
    parser.add_argument("--memory_gib", type=float, default=4.0, help="a program that needs more, outputs included, is not run")


def run(options: argparse.Namespace) -> dict:
    if options.out is not None and options.out.suffix == ".png":
        raise UserError(f"--out={options.out} is for the JSON; the picture is written beside it")
    sizes = {name: getattr(options, name) for name in STATED_SIZES}
    # Compiling costs as much at any length, running as the length says.
    parts = {f"{name}, T {steps}": 1 + steps / 2048 for name in options.ops for steps in options.lengths}
    if options.growth_lengths and CHUNKED in options.implementations:
        parts |= {f"{name}, growth": len(options.growth_lengths) / 2 for name in options.ops}
    clock = Progress(parts)
    print("\ntime of a call, memory of its temporaries, and its time as a multiple of the chunked form's")
    rows, lacking = [], {}
    for name in options.ops:
        lacking[name] = missing_forms(OPS[name], options.implementations, sizes)
        forms = [form for form in options.implementations if form not in lacking[name]]
        mine = []
        for steps in options.lengths:
            clock.start(f"{name}, T {steps}")
            mine += measure_forms(name, forms, steps, sizes, options)
        print_rows(name, mine, lacking[name], sizes, options.memory_gib)
        rows += mine
    growth = []
    if options.growth_lengths and CHUNKED in options.implementations:
        for name in options.ops:
            clock.start(f"{name}, growth")
            growth += measure_growth(name, sizes, options)
    growth_of_forms = fit_rows(rows)
    print_growth(growth + growth_of_forms)
    goals = goal_verdicts(rows, growth, sizes)
    print_goals(goals)
    if options.out is not None:
        path = options.out.with_suffix(".png")
        picture(rows, growth, sizes).savefig(path, dpi=120)
        print(f"\n{path} shows it")
    return {
        "sizes": sizes,
        "memory_bound_gib": options.memory_gib,
        "ops": rows,
        "lacking": lacking,
        "growth": growth,
        "growth_of_forms": growth_of_forms,
        "goals": goals,
    }


# ---- measuring


class Programs:
    """An op in one form at one shape, compiled: ``forward`` and ``gradient``."""

    def __init__(self, op: Op, implementation: str, sizes: dict, batch: int, steps: int):
        random = np.random.default_rng(0)
        inputs = [jnp.asarray(x, jnp.float32) for x in op.inputs(random, sizes, batch, steps)]

        def forward(*inputs):
            results = jax.tree.leaves(op.run(*inputs, implementation=implementation))
            return [x for x in results if jnp.issubdtype(x.dtype, jnp.inexact)]  # a cache has counters, too

        def gradient(inputs, cotangents):
            results, backward = jax.vjp(forward, *inputs)
            return results, backward(cotangents)

        self._functions = {"forward": lambda inputs, cotangents: forward(*inputs), "gradient": gradient}
        shapes = jax.eval_shape(forward, *inputs)  # raises NotImplementedError where there is no such form
        self._arguments = inputs, [jnp.asarray(random.normal(size=x.shape), jnp.float32) for x in shapes]

    def compile(self, which: str) -> tuple[Callable, dict]:
        """A call that waits for its result, and what is known of it before it ever ran."""
        cpu, wall = time.process_time(), time.perf_counter()
        program = jax.jit(self._functions[which]).lower(*self._arguments).compile()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        memory = program.memory_analysis()
        known = {
            "compile_wall_s": wall,
            "compile_cpu_s": cpu,
            "temp_bytes": memory.temp_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
        }
        return lambda: jax.block_until_ready(program(*self._arguments)), known


def missing_forms(op: Op, implementations, sizes) -> dict[str, str]:
    """Which of the forms the op does not have, and why."""
    missing = {}
    for implementation in implementations:
        try:
            Programs(op, implementation, sizes, batch=1, steps=2)
        except NotImplementedError as reason:
            missing[implementation] = str(reason)
    return missing


def fits(known: dict, memory_gib: float) -> bool:
    return known["temp_bytes"] + known["output_bytes"] <= memory_gib * 2**30


def measure_forms(name: str, forms, steps: int, sizes, options) -> list[dict]:
    """Every form at one length, in turns: a row each. A pass that was not run has no ``wall_ms``."""
    rows, contenders = [], {}
    for form in forms:
        programs = Programs(OPS[name], form, sizes, options.batch_size, steps)
        row = {"op": name, "implementation": form, "batch_size": options.batch_size, "seq_len": steps}
        for which in PASSES:
            call, row[which] = programs.compile(which)
            row[which]["run"] = fits(row[which], options.memory_gib)
            if row[which]["run"]:
                contenders[form, which] = call
        rows.append(row)
    times = take_turns(contenders, options.rounds, options.seconds)
    for row in rows:
        for which in PASSES:
            if row[which]["run"]:
                row[which] |= times[row["implementation"], which]
    chunked = [row for row in rows if row["implementation"] == CHUNKED]
    for row in rows:
        for which in PASSES:
            row[which]["of_chunked"] = ratios(row[which], chunked[0][which]) if chunked else {}
    return rows


def ratios(measured: dict, reference: dict) -> dict[str, float]:
    """How many times the reference's time and memory it took, as far as both are known."""
    keys = [key for key in ("wall_ms", "cpu_ms", "temp_bytes") if key in measured and key in reference]
    return {key: measured[key] / reference[key] for key in keys if reference[key]}


def measure_growth(name: str, sizes, options) -> list[dict]:
    """The chunked gradient at one length after the other, until one takes too long; then all of them in turns."""
    contenders = {}
    for steps in options.growth_lengths:
        programs = Programs(OPS[name], CHUNKED, sizes, GROWTH_BATCH_SIZE, steps)
        call, known = programs.compile("gradient")
        if not fits(known, options.memory_gib):
            break
        contenders[steps] = call
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > options.seconds:
            break
    times = take_turns(contenders, options.rounds, options.seconds)
    return fit(name, CHUNKED, GROWTH_BATCH_SIZE, times)


def fit_rows(rows) -> list[dict]:
    """The growth of every form's gradient over the lengths at which it ran."""
    series = {}
    for row in rows:
        if row["gradient"]["run"]:
            key = row["op"], row["implementation"], row["batch_size"]
            series.setdefault(key, {})[row["seq_len"]] = row["gradient"]
    return [result for key, times in series.items() for result in fit(*key, times)]


def fit(name: str, implementation: str, batch_size: int, times: dict[int, dict]) -> list[dict]:
    """The exponent p of time ~ T^p, by least squares between logarithms; nothing from a single length."""
    if len(times) < 2:
        return []
    result = {"op": name, "implementation": implementation, "batch_size": batch_size, "lengths": list(times)}
    for key in ("wall_ms", "cpu_ms"):
        result[key] = [measured[key] for measured in times.values()]
        result["exponent" if key == "wall_ms" else "exponent_cpu"] = exponent(result["lengths"], result[key])
    return [result]


def exponent(lengths, times) -> float:
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])
