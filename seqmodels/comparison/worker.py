"""The process in which scripts/compare.py scores runs and measures costs, so that it never holds the device itself.

    python seqmodels/comparison/worker.py --score=runs/compare/gla/lr0.002/seed0 [--score=...]     validation losses into scores.npz
    python seqmodels/comparison/worker.py --cost=RUN_FOLDER --out=FILE --asked=JSON                 speed, memory, state into FILE

The run folders are those of a comparison.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    import sys
    from pathlib import Path

    # Runs from a clone, uninstalled, in any directory; this file's folder has a statistics.py that is not Python's.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from seqmodels.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from seqmodels import command_line
from seqmodels.comparison import cost, jobs, scores
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.run import load_run
from seqmodels.training import checkpoint
from seqmodels.training.run_folder import read_config


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--score", type=Path, action="append", default=[], help="the folder of a run to score")
    parser.add_argument("--validation_tokens", type=int, default=0, help="score only so many; 0: all")
    parser.add_argument("--frequent_pairs", type=Path, help="a file of the pairs of tokens that do not count as repeated")
    parser.add_argument("--cost", type=Path, help="the folder of a run whose model is measured")
    parser.add_argument("--out", type=command_line.output_file, help="where the costs go")
    parser.add_argument("--asked", type=json.loads, help="what is asked for, as comparison.jobs.asked_cost says it")
    command_line.add_compilation_cache_flag(parser)
    options = parser.parse_args()
    if not options.score and options.cost is None:
        raise UserError("give --score or --cost; see --help")
    command_line.use_compilation_cache(options.compilation_cache_dir)
    frequent = None if options.frequent_pairs is None else np.load(options.frequent_pairs)
    for folder in options.score:
        say(f"scoring {folder}")
        if not checkpoint.steps(folder / "checkpoints"):
            raise UserError(
                f"{folder} has the outcome of a run, but neither its scores nor a checkpoint to score: rename the folder, and "
                "the run is trained again"
            )
        scores.save(scores.score(load_run(folder), options.validation_tokens, frequent), folder)
    if options.cost is not None:
        say(f"measuring {options.cost}")
        asked = options.asked
        measured = cost.measure(
            read_config(options.cost), asked["vocab_size"],
            contexts=tuple(asked["contexts"]), decode_tokens=asked["decode_tokens"],
        )  # fmt: skip
        jobs.write_json(options.out, {"asked": asked} | dataclasses.asdict(measured))


if __name__ == "__main__":
    command_line.run(main)
