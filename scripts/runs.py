"""List runs, as a table for a terminal, a page or a paper, and draw their curves over each other.

    python scripts/runs.py runs
    python scripts/runs.py runs/gla runs/mamba --format=latex --plot=curves.svg

Each folder is a run folder or holds some, at any depth; nothing in them is changed. The table (Markdown, CSV or LaTeX) goes to
stdout; in a terminal that is narrower than it, it is broken to fit. A folder that cannot be read gets a line that says why.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

import jax

from seqmodels import command_line, run_list, screen
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import columns, escape, say
from seqmodels.evaluation import plots

SORTS = ("name", "loss", "parameters", "tokens_per_second", "when")


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="a run folder, or a folder of some")
    parser.add_argument(
        "--format",
        choices=run_list.FORMATS,
        default="table",
        help="table (Markdown, aligned; the default), csv or latex (booktabs)",
    )
    parser.add_argument(
        "--sort", choices=SORTS, default="name", help="by what, ascending (default name); what is not known is last"
    )
    parser.add_argument("--plot", type=command_line.output_file, help="draw the losses of all runs here: .png, .svg or .pdf")
    options = parser.parse_args()
    plots.check_suffix("plot", options.plot)
    jax.config.update("jax_platforms", "cpu")  # shapes are counted
    with screen.phase("reading the run folders"):
        runs = run_list.read(run_list.find(map(atomic.expanded, options.folders)))
    known = [run for run in runs if getattr(run, options.sort) not in (None, "")]
    known.sort(key=lambda run: getattr(run, options.sort))
    runs = known + [run for run in runs if run not in known]
    print(escape(run_list.text(runs, options.format, columns(sys.stdout)), "terminal"))
    if options.plot is not None:
        drawn = {run.name: run.rows for run in runs if run.rows}
        if not drawn:
            raise UserError(f"--plot={options.plot}: no run has a row of metrics yet")
        plots.learning_curves(drawn, options.plot)
        say(f"{options.plot}: {len(drawn)} runs")


if __name__ == "__main__":
    command_line.run(main)
