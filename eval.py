"""Score a run on its validation tokens: perplexity, bits per byte, loss by position, speed and state size.

    python eval.py --workdir=runs/gla [--step=N] [--data=PATH|HUB_ID|toy]
    python eval.py --workdir=runs/gla --lengths=256,1024,4096

Of a run on a synthetic task: its loss and accuracy on the task's test. With --lengths, how both fare at other lengths than
that of the training: text in longer windows, the task's examples of these lengths.

Needs only the run folder, and executes nothing of it: what is kept is kept where the flags say. Draws loss_by_position.png (or
extrapolation.png) into it; the last line of stdout is one JSON object.
"""

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

import argparse
import json
import math
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from seqmodels import command_line, screen
from seqmodels.config import DEFAULT_CACHE_DIR
from seqmodels.data import HeldOut, ValidationSet, few_documents
from seqmodels.errors import UserError
from seqmodels.escape import escape
from seqmodels.evaluation import plots
from seqmodels.evaluation.accuracy import LabelEvaluation
from seqmodels.evaluation.perplexity import Evaluation, by_context_length
from seqmodels.ranges import Count, CountOrZero
from seqmodels.run import Run, load_run
from seqmodels.training import remote_folder


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_workdir("the run folder: a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    parser.add_value("--step", CountOrZero, help="which checkpoint; default the newest")
    parser.add_argument("--data", help="score this source's validation split: a path, a hub id, or toy")
    parser.add_value("--max_tokens", Count, help="score only so many tokens; default all")
    parser.add_value("--devices", Count, default=1, help="so many devices share each batch (default 1)")
    parser.add_argument("--lengths", type=lengths, help="score at these lengths instead, commas between them")
    parser.add_argument(
        "--cache_dir", default=DEFAULT_CACHE_DIR, help=f"where tokens of --data are kept (default {DEFAULT_CACHE_DIR})"
    )
    command_line.add_compilation_cache_flag(parser)
    options = parser.parse_args()

    command_line.use_compilation_cache(options.compilation_cache_dir)
    with screen.phase("reading the run"):
        run = load_run(options.workdir, options.step, cache_dir=options.cache_dir, devices=options.devices)
    validation = run.validation(options.data)
    documents = documents_scored(validation, options.max_tokens)
    if options.lengths is not None:
        with screen.phase("evaluating at each length"):
            by_length = run.evaluate_lengths(options.lengths, validation, max_tokens=options.max_tokens)
        for evaluation in by_length.values():
            check_finite(run, evaluation)
        report_lengths(run, by_length, documents)
        print(json.dumps(summary_of_lengths(run, by_length) | documents))  # ahead of what a folder may refuse to hold
        plots.extrapolation(by_length, run.config.data.seq_len, run.workdir / "extrapolation.png")
        remote_folder.keep(options.workdir, run.workdir / "extrapolation.png")
        return
    evaluation = evaluate_with_progress(run, validation, options.max_tokens)
    check_finite(run, evaluation)
    report(run, evaluation, documents)
    print(json.dumps(summary(run, evaluation) | documents))
    plots.loss_by_position(loss_curves(run, evaluation), run.workdir / "loss_by_position.png")
    remote_folder.keep(options.workdir, run.workdir / "loss_by_position.png")


def lengths(text: str) -> tuple[int, ...]:
    """A flag's whole numbers, commas between them, in ascending order."""
    numbers = text.split(",")
    if not all(number.isdecimal() and len(number) < 10 and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths like 256,1024")
    return tuple(sorted({int(number) for number in numbers}))


def documents_scored(validation: ValidationSet | HeldOut, max_tokens: int | None) -> dict[str, int]:
    """Of text, how many documents the score is of, under the JSON line's key."""
    return {"validation_documents": validation.documents_in(max_tokens)} if isinstance(validation, ValidationSet) else {}


def evaluate_with_progress(run: Run, validation: ValidationSet | HeldOut, max_tokens: int | None) -> Evaluation | LabelEvaluation:
    """`run.evaluate` under a bar, where stderr can show one."""
    if not screen.is_rewritable(sys.stderr):
        with screen.phase("evaluating"):
            return run.evaluate(validation, max_tokens=max_tokens)
    columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    total = min(max_tokens or len(validation), len(validation))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        return run.evaluate(validation, max_tokens=max_tokens, progress=lambda done: progress.update(task, completed=done))


def check_finite(run: Run, evaluation: Evaluation | LabelEvaluation) -> None:
    """Raises UserError where the model has no loss."""
    if not math.isfinite(evaluation.loss):
        raise UserError(f"the loss at step {run.step} is {evaluation.loss}: the model has diverged; try another --step")


def summary(run: Run, evaluation: Evaluation | LabelEvaluation) -> dict:
    """The JSON line: the fixed keys first."""
    line = {
        "step": run.step,
        "validation_loss": evaluation.loss,
        **evaluation.scores,
        "tokens_per_second": evaluation.tokens_per_second,
        "parameters": run.trainer.num_parameters,
        "state_bytes": run.state_bytes(),
        **about_the_data(run),
        "validation_tokens": evaluation.tokens,
        "state_max_len": run.config.data.seq_len,
    }
    if isinstance(evaluation, Evaluation):
        line["loss_by_position"] = loss_by_context_length(evaluation)
    return line


def summary_of_lengths(run: Run, by_length: dict[int, Evaluation]) -> dict:
    """The JSON line of --lengths."""
    return {
        "step": run.step,
        "parameters": run.trainer.num_parameters,
        **about_the_data(run),
        "trained_at": run.config.data.seq_len,
        "lengths": {
            str(length): {
                "validation_loss": evaluation.loss,
                **scores_of(evaluation),
                "validation_tokens": evaluation.tokens,
                "tokens_per_second": evaluation.tokens_per_second,
                "state_bytes": run.state_bytes(length),
                "loss_by_position": loss_by_context_length(evaluation),
            }
            for length, evaluation in by_length.items()
        },
    }


def about_the_data(run: Run) -> dict[str, str]:
    """What the tokens are."""
    return {"task": run.config.data.task} if run.tokenizer is None else {"tokenizer": run.tokenizer.name}


def scores_of(evaluation: Evaluation) -> dict[str, float]:
    """What says something about one length: perplexity and bits per byte of text, accuracy of labels."""
    return evaluation.scores if evaluation.accuracy is None else {"accuracy": evaluation.accuracy}


def report(run: Run, evaluation: Evaluation | LabelEvaluation, documents: dict[str, int]) -> None:
    """The same for a person, on stderr."""
    heading(run)
    warn_of_few(documents)
    if isinstance(evaluation, LabelEvaluation):
        say("accuracy", f"{evaluation.accuracy:.4f} of the labels of {run.config.data.task}")
        if len(evaluation.segments) > 1:
            for name, segment in evaluation.segments.items():
                say("", f"{segment.accuracy:.4f}  {name}")
        say("loss", f"{evaluation.loss:.4f} nats per label")
        say("scored", f"{evaluation.tokens:,} labels, {evaluation.tokens_per_second:,.0f} tokens a second")
    else:
        say("perplexity", f"{evaluation.perplexity:.3f} per token of {run.tokenizer.name}")
        say("loss", f"{evaluation.loss:.4f} nats per token")
        say("bits per byte", f"{evaluation.bits_per_byte:.4f}")
        say("scored", f"{evaluation.tokens:,} tokens, {evaluation.tokens_per_second:,.0f} a second")
    say("parameters", f"{run.trainer.num_parameters:,}")
    say("state", f"{run.state_bytes():,} bytes a sequence at {run.config.data.seq_len} tokens")
    if isinstance(evaluation, Evaluation):
        line = plots.sparkline(evaluation.loss_by_position)
        shown = f"\n{line}" if screen.can_show(line, sys.stderr) else ""
        print(escape(f"\nloss by tokens of context (nats){shown}", "terminal"), file=sys.stderr)
        for tokens, loss in loss_by_context_length(evaluation).items():
            say(tokens, f"{loss:.3f}")


def report_lengths(run: Run, by_length: dict[int, Evaluation], documents: dict[str, int]) -> None:
    """How it fares at each length, on stderr."""
    heading(run)
    warn_of_few(documents)
    say("trained at", f"{run.config.data.seq_len} tokens")
    for length, evaluation in by_length.items():
        scores = "  ".join(f"{name.replace('_', ' ')} {score:.4g}" for name, score in scores_of(evaluation).items())
        say(str(length), f"loss {evaluation.loss:.4f}  {scores}")


def warn_of_few(documents: dict[str, int]) -> None:
    for count in documents.values():
        warning = few_documents(count, "scored")
        if warning is not None:
            say("warning", warning)


def heading(run: Run) -> None:
    say("run", f"{run.workdir}, step {run.step:,}, {run.config.model.repeats} x {run.config.model.pattern!r}")


def say(name: str, text: str) -> None:
    print(escape(f"{name:>14}  {text}", "line"), file=sys.stderr)


def loss_curves(run: Run, evaluation: Evaluation | LabelEvaluation) -> dict:
    """The loss by position: of text one curve, of a task's test one for each segment."""
    if isinstance(evaluation, Evaluation):
        return {run.config.model.pattern: evaluation.loss_by_position}
    return {name: segment.loss_by_position for name, segment in evaluation.segments.items()}


def loss_by_context_length(evaluation: Evaluation) -> dict[str, float]:
    """`by_context_length` with keys that JSON can have: "1", "2", "3-4", "5-8", ..."""
    means = by_context_length(evaluation.loss_by_position)
    return {f"{first}-{last}" if last > first else str(first): loss for (first, last), loss in means.items()}


if __name__ == "__main__":
    command_line.run(main)
