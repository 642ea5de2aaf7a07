"""What --suite=ops of benchmark.py found: verdicts on the stated goals, tables, a picture."""

import textwrap

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.op_cases import (
    CHUNKED,
    GOALS,
    GROWTH_BATCH_SIZE,
    LARGEST_EXPONENT,
    OPS,
    PASSES,
    STATED_GROWTH,
    STATED_LENGTH,
    STATED_SIZES,
    describe,
)

# ---- goals


def goal_verdicts(rows: list[dict], growth: list[dict], sizes: dict[str, int]) -> list[dict]:
    """The goals of the ops that were measured; ``verdict`` is "met", "missed", or "not judged" with the reason."""
    measured = {row["op"] for row in rows}
    comparisons = [comparison_verdict(goal, rows, sizes) for goal in GOALS if goal.op in measured]
    names = [name for name, op in OPS.items() if op.linear and name in measured]
    return comparisons + [growth_verdict(name, growth, sizes) for name in names]


def comparison_verdict(goal, rows, sizes) -> dict:
    gradients = {
        row["implementation"]: row["gradient"] for row in rows if row["op"] == goal.op and row["seq_len"] == STATED_LENGTH
    }
    stated = {name: STATED_SIZES[name] for name in ("batch_size", *OPS[goal.op].sizes)}
    what = "memory" if goal.measure == "temp_bytes" else "time"
    result = {
        "goal": f"{goal.op}: {goal.against} takes at least {goal.factor:g} times the {what} of {CHUNKED}"
        f" (gradient, {describe(stated)}, T {STATED_LENGTH})"
    }
    if not {CHUNKED, goal.against} <= gradients.keys() or not at_stated_sizes(stated, sizes):
        return result | {"verdict": "not judged: not measured"}
    ours, theirs = gradients[CHUNKED], gradients[goal.against]
    if goal.measure not in ours or goal.measure not in theirs:
        return result | {"verdict": "not judged: above the bound on memory"}
    result["measured"] = theirs[goal.measure] / ours[goal.measure]
    if what == "time":
        result["measured_cpu"] = theirs["cpu_ms"] / ours["cpu_ms"]
    return result | {"verdict": "met" if result["measured"] >= goal.factor else "missed"}


def growth_verdict(name: str, growth, sizes) -> dict:
    first, last = STATED_GROWTH
    stated = {each: STATED_SIZES[each] for each in OPS[name].sizes}
    result = {
        "goal": f"{name}: {CHUNKED} grows at most as T^{LARGEST_EXPONENT}"
        f" (gradient, {describe({'batch_size': GROWTH_BATCH_SIZE} | stated)}, T {first} to {last})"
    }
    found = {fit["op"]: fit for fit in growth}
    if name not in found or not at_stated_sizes(stated, sizes):
        return result | {"verdict": "not judged: not measured"}
    if (found[name]["lengths"][0], found[name]["lengths"][-1]) != STATED_GROWTH:
        return result | {"verdict": f"not judged: measured over {found[name]['lengths']}"}
    result |= {"measured": found[name]["exponent"], "measured_cpu": found[name]["exponent_cpu"]}
    return result | {"verdict": "met" if result["measured"] <= LARGEST_EXPONENT else "missed"}


def at_stated_sizes(stated, sizes) -> bool:
    return all(sizes[name] == size for name, size in stated.items())


# ---- tables


def print_rows(name: str, rows: list[dict], lacking: dict[str, str], sizes: dict, memory_gib: float) -> None:
    """One op's table; a program above the bound on memory shows what it would have needed."""
    op = OPS[name]
    print(f"\n{name}: {op.title}; {describe({each: sizes[each] for each in ('batch_size', *op.sizes)})}")
    print(f"  {'':18s} {'forward':-^36s}  {'gradient (forward and backward)':-^36s} {'compile':>9s}")
    columns = f"{'ms':>9s} {'CPU ms':>9s} {'x chunked':>9s} {'MiB':>6s}"
    print(f"  {'T':>5s} {'':12s} {columns}  {columns} {'s':>9s}")
    for row in rows:
        cells = "  ".join(cell(row[which]) for which in PASSES)
        print(f"  {row['seq_len']:5d} {row['implementation']:12s} {cells} {row['gradient']['compile_wall_s']:9.1f}")
    if any(not row[which]["run"] for row in rows for which in PASSES):
        print(f"  not run: would need more than {memory_gib:g} GiB")
    for reason in lacking.values():
        print(textwrap.fill(reason, 115, initial_indent="  ", subsequent_indent="    "))


def cell(measured: dict) -> str:
    mib = f"{measured['temp_bytes'] / 2**20:6.0f}"
    if not measured["run"]:
        return f"{'not run':>29s} {mib}"
    of_chunked = measured["of_chunked"]
    ratio = f"{of_chunked['wall_ms']:9.2f}" if "wall_ms" in of_chunked else f"{'':9s}"
    return f"{measured['wall_ms']:9.2f} {measured['cpu_ms']:9.2f} {ratio} {mib}"


def print_growth(fits: list[dict]) -> None:
    print("\ngrowth of the gradient's time with the length: p in T^p, by least squares between logarithms")
    for fit in fits:
        lengths = ", ".join(str(length) for length in fit["lengths"])
        print(
            f"  {fit['op']:18s} {fit['implementation']:12s} {fit['exponent']:5.2f} (by CPU time"
            f" {fit['exponent_cpu']:5.2f})  B {fit['batch_size']}, T {lengths}"
        )


def print_goals(goals: list[dict]) -> None:
    print("\ngoals, by wall time")
    for goal in goals:
        figures = f": {goal['measured']:.2f}" if "measured" in goal else ""
        if "measured_cpu" in goal:
            figures += f" (by CPU time {goal['measured_cpu']:.2f})"
        print(f"  {goal['verdict'] + figures}\n      {goal['goal']}")


# ---- the picture


COLOURS = {"recurrent": "C7", "associative": "C1", "parallel": "C2", CHUNKED: "C0", "pallas": "C3"}


def picture(rows: list[dict], growth: list[dict], sizes: dict[str, int]) -> Figure:
    """A panel per op: time of the gradient against the length, a line per form; what was too large is named."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.3 * height + 0.5), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names):
        draw_op(axes, name, [row for row in rows if row["op"] == name], [fit for fit in growth if fit["op"] == name])
        axes.set_title(f"{OPS[name].title}\n{describe({each: sizes[each] for each in OPS[name].sizes})}", fontsize=10)
    figure.suptitle(f"Forward and backward pass, B {sizes['batch_size']}: time against length")
    return figure


def draw_op(axes, name, rows, growth) -> None:
    for form in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == form]
        ran = [row for row in mine if row["gradient"]["run"]]
        label = form
        if len(ran) < len(mine):
            label += f" (too large from T {min(row['seq_len'] for row in mine if not row['gradient']['run'])})"
        times = [row["gradient"]["wall_ms"] / 1e3 for row in ran]
        style = dict(lw=2.4, ms=6, zorder=3) if form == CHUNKED else dict(lw=1.4, ms=5)
        axes.plot([row["seq_len"] for row in ran], times, marker="o", color=COLOURS[form], label=label, **style)
    for fit in growth:
        label = f"{CHUNKED}, B {fit['batch_size']}: T^{fit['exponent']:.2f}"
        times = [wall / 1e3 for wall in fit["wall_ms"]]
        axes.plot(fit["lengths"], times, color=COLOURS[CHUNKED], ls="--", marker=".", lw=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1024:g}k" if steps >= 1024 else f"{steps:g}")
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.set_xlabel("T, steps (1k = 1024)")
    axes.set_ylabel("time")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
