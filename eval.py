"""Score a run on its validation tokens: perplexity, bits per byte, loss by position, speed and state size.

    python eval.py --workdir=runs/gla [--step=N] [--data=PATH|HUB_ID|toy]

Needs only the run folder. Draws loss_by_position.png into it; the last line of stdout is one JSON object.
"""

import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from seqmodels import command_line
from seqmodels.data import ValidationSet
from seqmodels.errors import UserError
from seqmodels.evaluation import plots
from seqmodels.evaluation.perplexity import Evaluation, by_context_length
from seqmodels.run import Run, load_run, read_config


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="the run folder")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--data", help="score this source's validation split: a path, a hub id, or toy")
    parser.add_argument("--max_tokens", type=int, help="score only so many tokens; default all")
    options = parser.parse_args()
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max_tokens={options.max_tokens} scores nothing; give 1 or more")

    command_line.use_compilation_cache(read_config(options.workdir).train.compilation_cache_dir)
    run = load_run(options.workdir, options.step)
    evaluation = evaluate_with_progress(run, run.validation(options.data), options.max_tokens)
    if not math.isfinite(evaluation.loss):
        raise UserError(f"the loss at step {run.step} is {evaluation.loss}: the model has diverged; try another --step")
    report(run, evaluation)
    curve = {run.config.model.pattern: evaluation.loss_by_position}
    plots.loss_by_position(curve, options.workdir / "loss_by_position.png")
    print(json.dumps(summary(run, evaluation)))


def evaluate_with_progress(run: Run, validation: ValidationSet, max_tokens: int | None) -> Evaluation:
    """`run.evaluate` under a bar, where stderr is a terminal."""
    columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    total = min(max_tokens or len(validation), len(validation))
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        return run.evaluate(
            validation, max_tokens=max_tokens, progress=lambda done: progress.update(task, completed=done)
        )


def summary(run: Run, evaluation: Evaluation) -> dict:
    """The JSON line: the fixed keys first."""
    return {
        "step": run.step,
        "validation_loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens_per_second": evaluation.tokens_per_second,
        "parameters": run.setup.num_parameters,
        "state_bytes": run.state_bytes(),
        "tokenizer": run.tokenizer.name,
        "validation_tokens": evaluation.tokens,
        "state_max_len": run.config.data.seq_len,
        "loss_by_position": loss_by_context_length(evaluation),
    }


def report(run: Run, evaluation: Evaluation) -> None:
    """The same for a person, on stderr."""
    lines = {
        "run": f"{run.workdir}, step {run.step:,}, {run.config.model.repeats} x {run.config.model.pattern!r}",
        "perplexity": f"{evaluation.perplexity:.3f} per token of {run.tokenizer.name}",
        "loss": f"{evaluation.loss:.4f} nats per token",
        "bits per byte": f"{evaluation.bits_per_byte:.4f}",
        "scored": f"{evaluation.tokens:,} tokens, {evaluation.tokens_per_second:,.0f} a second",
        "parameters": f"{run.setup.num_parameters:,}",
        "state": f"{run.state_bytes():,} bytes a sequence at {run.config.data.seq_len} tokens",
    }
    for name, text in lines.items():
        print(f"{name:>14}  {text}", file=sys.stderr)
    print(f"\nloss by tokens of context (nats)\n{plots.sparkline(evaluation.loss_by_position)}", file=sys.stderr)
    for tokens, loss in loss_by_context_length(evaluation).items():
        print(f"{tokens:>14}  {loss:.3f}", file=sys.stderr)


def loss_by_context_length(evaluation: Evaluation) -> dict[str, float]:
    """`by_context_length` with keys that JSON can have: "1", "2", "3-4", "5-8", ..."""
    means = by_context_length(evaluation.loss_by_position)
    return {f"{first}-{last}" if last > first else str(first): loss for (first, last), loss in means.items()}


if __name__ == "__main__":
    command_line.run(main)
