"""Multi-query associative recall by many mixers: accuracy against pairs, and against the bytes of the state.

    python scripts/mqar_sweep.py [--out=benchmarks/results/mqar_sweep.json] [--runs=gla,mamba]

Each is configs/recall.py:mqar_sweep with two layers: attention that sees 4 tokens (in the place of the short convolution of
Arora et al. 2024, arXiv:2402.18668, figure 2) and the mixer; attention itself is two layers of full attention. One learning
rate, one seed. A run that has ended is not repeated. The results, and a picture in docs/, are written after each one.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory
    from seqmodels.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from probe_runs import ROOT, Probe, chosen, read, run_all

from seqmodels import command_line, mixers

OUT = ROOT / "benchmarks" / "results" / "mqar_sweep.json"
PICTURE = ROOT / "docs" / "mqar_sweep.png"
CONFIG = "configs/recall.py:mqar_sweep"
SELDOM = ("--config.train.eval_every_steps=500", "--config.train.checkpoint_every_steps=500")


def probe(mixer: str) -> Probe:
    """The run of a mixer."""
    if mixer == "attention":
        return Probe(CONFIG, SELDOM)
    pattern, window = f"--config.model.pattern=attention {mixer}", "--config.model.mixers.attention.window=4"
    return Probe(CONFIG, (pattern, "--config.model.repeats=1", window, *SELDOM))


def main() -> None:
    runs = {mixer: probe(mixer) for mixer in mixers.names()}
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "mqar_sweep", help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=OUT, help="results file (JSON), read and added to")
    parser.add_argument("--runs", help="which mixers, commas between them; default all")
    options = parser.parse_args()
    results = read(options.out)
    picture = PICTURE if options.out == OUT else options.out.with_suffix(".png")
    run_all(
        chosen(options.runs, runs), options.workdir, results, options.out, lambda results: draw(results["rows"], picture)
    )
    for name, row in sorted(results["rows"].items(), key=lambda item: -item[1]["accuracy"]):
        by_pairs = "  ".join(f"{accuracy:.3f}" for accuracy in row["accuracy_by_segment"].values())
        print(f"{name:>18}  {row['accuracy']:.3f}  ({by_pairs})  {row['state_bytes']:>9,} bytes of state")


def draw(rows: dict, path: Path) -> None:
    """Accuracy against pairs, one line for each mixer; accuracy of the most pairs against the state's bytes."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    by_pairs, by_bytes = figure.subplots(1, 2, sharey=True)
    for index, (name, row) in enumerate(sorted(rows.items(), key=lambda item: -item[1]["accuracy"])):
        pairs = [int(re.findall(r"\d+", segment)[-1]) for segment in row["accuracy_by_segment"]]
        accuracies = list(row["accuracy_by_segment"].values())
        style = dict(color=f"C{index % 10}", marker="osD^v"[index // 10 % 5], ms=5)
        by_pairs.plot(pairs, accuracies, lw=1.5, label=name, **style)
        by_bytes.plot(row["state_bytes"], accuracies[-1], ls="", **style)
        by_bytes.annotate(name, (row["state_bytes"], accuracies[-1]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    for axes in (by_pairs, by_bytes):
        axes.set_xscale("log", base=2)
        axes.set_ylim(-0.02, 1.05)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_pairs.set_xlabel("pairs in 64 tokens")
    by_pairs.set_ylabel("accuracy")
    by_pairs.legend(frameon=False, fontsize=8)
    by_bytes.set_xlabel("bytes of state of a sequence of 64 tokens")
    by_bytes.set_title(f"{pairs[-1]} pairs", fontsize=10)
    by_bytes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line.run(main)
