"""Write a run's model as transformers or flash-linear-attention saves it.

    python scripts/export_hf.py --workdir=runs/y --out=DIR

DIR gets config.json, model.safetensors and the tokenizer. What such a checkpoint has no place for is an error that names it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

from seqmodels import command_line, screen
from seqmodels.data import atomic
from seqmodels.escape import say
from seqmodels.interop import checkpoint
from seqmodels.ranges import CountOrZero
from seqmodels.run import Run, load_run


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_workdir("the run folder: a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    parser.add_value("--step", CountOrZero, help="which checkpoint; default the newest")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--dtype", choices=checkpoint.EXPORT_DTYPES, default="float32", help="of the tensors (default float32, which is exact)"
    )
    options = parser.parse_args()

    out = atomic.expanded(options.out)
    checkpoint.check_new(out, "--out")
    with screen.phase("reading the run"):
        run = load_run(options.workdir, options.step)
    with screen.phase("exporting it"):
        kind = checkpoint.export_folder(
            run.config.model, run.params, run.trainer.vocab_size, run.tokenizer, out, dtype=options.dtype,
            history=history(run),
        )  # fmt: skip
    say(
        f"{options.out}: {kind.architecture} of {kind.library}, {run.trainer.num_parameters:,} parameters, step {run.step}",
        sys.stdout,
    )


def history(run: Run) -> dict[str, object]:
    """What the model card says of how the model came about."""
    data, train = run.config.data, run.config.train
    if run.step == 0:
        return {"Trained": "not here: it was imported"}
    said = {"Data": data.source if data.synthetic_task is None else f"the task {data.task}", "Steps": run.step}
    if train.init_from is not None:
        said["Began with"] = train.init_from
    said["Tokens"] = f"{run.step * data.batch_size * data.seq_len:,}, in windows of {data.seq_len}"
    return said | {"Learning rate": f"{run.config.optim.learning_rate:g} at its peak", "Dropout": run.config.model.dropout}


if __name__ == "__main__":
    command_line.run(main)
