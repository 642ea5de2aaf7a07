"""The picture of what --suite=decode of benchmark.py found."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


def draw(results: dict, path: Path) -> None:
    """Latency and state against context, a panel for each batch size; a line that lies flat is a state of fixed size."""
    rows, sizes = results["rows"], results["sizes"]
    batch_sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(6.2 * (len(batch_sizes) + 1), 6.4), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes) + 1)
    names = list(dict.fromkeys(row["name"] for row in rows))
    styles = {name: dict(color=f"C{i % 10}", ls=("-", "--", ":")[i // 10], marker="o", ms=4) for i, name in enumerate(names)}
    for axes, batch_size in zip(panels, batch_sizes):
        for name in names:
            mine = [row for row in rows if (row["name"], row["batch_size"]) == (name, batch_size)]
            mine = [row for row in mine if "seconds_per_step" in row]
            axes.plot([row["context"] for row in mine], [row["seconds_per_step"] for row in mine], label=name, **styles[name])
        axes.set_title(f"one token, batch {batch_size}")
    for name in names:
        mine = [row for row in rows if (row["name"], row["batch_size"]) == (name, batch_sizes[0])]
        axes = panels[-1]
        axes.plot([row["context"] for row in mine], [row["counted_state_bytes"] for row in mine], label=name, **styles[name])
        axes.set_title(f"state, batch {batch_sizes[0]}")
    for axes, unit in zip(panels, ["s"] * len(batch_sizes) + ["B"]):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(EngFormatter(unit))  # after the scale, which brings its own
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1024:g}k" if steps >= 1024 else f"{steps:g}")
        axes.set_xlabel("tokens of context (1k = 1024)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"decoding, width {sizes['d_model']}, {sizes['repeats']} repeats")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
