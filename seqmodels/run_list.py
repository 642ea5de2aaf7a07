"""Many run folders at a glance, planned together or not: what each is, how far it came, what it reached."""

import contextlib
import csv
import dataclasses
import datetime
import io
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from seqmodels import failures, model, screen, suggest
from seqmodels.config import RunConfig
from seqmodels.errors import UserError
from seqmodels.escape import escape
from seqmodels.evaluation import perplexity
from seqmodels.formats import json_text, limits, metrics_rows
from seqmodels.training import history, run_folder

MOST_ROWS_BYTES = 1 << 28
FORMATS = ("table", "csv", "latex")


@dataclasses.dataclass(frozen=True)
class ListedRun:
    """A run folder as it is now; what is not known is None."""

    name: str  # its path, without what all listed runs have in common
    pattern: str | None = None
    repeats: int | None = None
    parameters: int | None = None
    step: int | None = None  # of the last row
    steps: int | None = None  # that the run shall have
    loss: float | None = None  # the last on the validation split, nats per token (of a task: per label)
    bits_per_byte: float | None = None
    accuracy: float | None = None
    tokens_per_second: float | None = None  # median over the training rows
    state_bytes: int | None = None  # of one sequence of data.seq_len
    status: str = "damaged"  # finished, training, diverged, stopped, new, imported; damaged, or unreadable now
    when: str = ""  # of the last row, UTC
    problem: str | None = None  # of a folder that is damaged or unreadable, or why the sizes are not known
    rows: tuple[Mapping, ...] = ()  # of metrics.jsonl


def find(folders: Iterable[Path]) -> list[Path]:
    """The run folders among these and below them, each once, in the order of their names.

    Raises:
        UserError: one does not exist, or there is no run in it.
    """
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(suggest.no_folder(folder))
        below = sorted(set(_below(folder)))
        if not below:
            raise UserError(f"{folder} holds no run (a run folder has a config.json)")
        found |= dict.fromkeys(below)
    return list(found)


def _below(folder: Path) -> Iterator[Path]:
    closed: list[Path] = []  # folders that cannot be looked into, of which `read` says why
    for path, folders, files in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        if "config.json" in files:
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from closed


def read(paths: Sequence[Path]) -> list[ListedRun]:
    """Each run folder; one that cannot be read says why."""
    common = Path(os.path.commonpath([path.absolute() for path in paths])) if len(paths) > 1 else None
    listed = []
    for path in paths:
        name = str(path if common is None else path.absolute().relative_to(common))
        try:
            listed.append(_read(path, name))
        except UserError as error:
            status = "damaged" if failures.obstacle(error) is None else "unreadable"
            listed.append(ListedRun(name, status=status, problem=str(error)))
        except OSError as error:
            reason = failures.obstacle(error) or error.strerror
            problem = f"{error.filename or path} cannot be read now: {reason}"
            listed.append(ListedRun(name, status="unreadable", problem=problem))
    return listed


def _read(path: Path, name: str) -> ListedRun:
    config = run_folder.read_config(path)
    rows = _rows(path / "metrics.jsonl")
    sizes, problem = _recorded_sizes(path), None
    if sizes is None:
        try:
            sizes = _counted_sizes(path, config)
        except UserError as error:  # of a run of which only the records are kept
            sizes, problem = {}, f"the sizes are not known: {error}"
    trained = [row for row in rows if row["split"] == "train"]
    scored = next((row for row in reversed(rows) if row["split"] == "validation"), {})
    step = max((row["step"] for row in rows), default=0)
    speeds = [row["tokens_per_second"] for row in trained if row.get("tokens_per_second")]
    written = path / ("metrics.jsonl" if rows else "config.json")
    return ListedRun(
        name,
        pattern=config.model.pattern,
        repeats=config.model.repeats,
        **sizes,
        step=step,
        steps=config.train.steps,
        loss=scored.get("loss"),
        bits_per_byte=scored.get("bits_per_byte"),
        accuracy=scored.get("accuracy"),
        tokens_per_second=statistics.median_high(speeds) if speeds else None,
        status=_status(path, step, config.train.steps),
        when=_when(written),
        problem=problem,
        rows=tuple(rows),
    )


def _when(path: Path) -> str:
    """When a file was written; "" where its file system's clock was out of the years that there are."""
    try:
        return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, FileNotFoundError):
        return ""


def _status(path: Path, step: int, steps: int) -> str:
    if run_folder.is_locked(path):
        return "training"
    if (path / "divergence").exists() and step < steps:
        return "diverged"
    if step >= steps:
        return "finished"
    if step:
        return "stopped"
    return "imported" if any((path / "checkpoints").glob("0")) else "new"


def _rows(path: Path) -> list[Mapping]:
    """The rows of a metrics.jsonl that are whole; a process may be writing it.

    Raises:
        UserError: it is no file of rows, or cannot be read.
    """
    try:
        lines = limits.read_bytes(path, MOST_ROWS_BYTES).decode("utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read now: {failures.obstacle(error) or error.strerror}") from error
    rows, damaged = [], 0
    for line in lines:
        row = metrics_rows.row(line)
        if row is not None:
            rows.append(row)
        else:
            damaged += line.endswith("\n")  # or it is being written
    if damaged and not rows:
        raise UserError(f"{path} has no whole row of metrics")
    return rows


def _recorded_sizes(path: Path) -> dict[str, int] | None:
    """What the run itself wrote of its model, at its start or its end; None of runs older than that, and where it cannot be read."""
    for name, part in ((history.FILE_NAME, "model"), (run_folder.OUTCOME_NAME, "summary")):
        with contextlib.suppress(OSError, UserError, IndexError, KeyError, TypeError, ValueError):
            text = limits.read_text(path / name, MOST_ROWS_BYTES)
            if name == history.FILE_NAME:
                text = text.rpartition("\n")[0].splitlines()[-1]  # what follows is being written
            recorded = json_text.parse(text, path / name)[part]
            return {field: int(recorded[field]) for field in ("parameters", "state_bytes")}
    return None


def _counted_sizes(path: Path, config: RunConfig) -> dict[str, int]:
    """The same, counted over shapes.

    Raises:
        UserError: the tokenizer cannot be read, on whose size they depend.
    """
    data_vocab_size = run_folder.known_vocab_size(config, run_folder.read_tokenizer(path, config))
    vocab_size = model.vocabulary_size(config.model, data_vocab_size)
    shapes = model.param_shapes(config.model, vocab_size)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "state_bytes": perplexity.state_bytes(model.graphdef(config.model, vocab_size), shapes, config.data.seq_len),
    }


# ---- tables

# A heading, and what of a run stands below it.
COLUMNS = {
    "run": lambda run: run.name,
    "model": lambda run: "" if run.pattern is None else f"{run.repeats} x {run.pattern}",
    "parameters": lambda run: _number(run.parameters),
    "step": lambda run: "" if run.step is None else f"{run.step:,} / {run.steps:,}",
    "loss": lambda run: _number(run.loss, ".4f"),
    "bits/byte": lambda run: _number(run.bits_per_byte, ".4f"),
    "accuracy": lambda run: _number(run.accuracy, ".4f"),
    "tokens/s": lambda run: _number(run.tokens_per_second, ",.0f"),
    "state bytes": lambda run: _number(run.state_bytes),
    "status": lambda run: run.status if run.problem is None else f"{run.status}: {run.problem}",
    "last row (UTC)": lambda run: run.when,
}
TEXTS = ("run", "model", "status", "last row (UTC)")  # columns that are set to the left


def _number(value: float | None, form: str = ",") -> str:
    return "" if value is None else f"{value:{form}}"


def text(runs: Sequence[ListedRun], form: str, room: int | None = None) -> str:
    """The runs as a table.

    Args:
        form: `table` (Markdown that is aligned for a terminal), `csv` (figures in full) or `latex` (booktabs).
        room: columns of the terminal: a `table` that is wider is plain text (`screen.table`), with what is wrong below it.
    """
    if form == "csv":
        return _csv(runs)
    names = [name for name, cell in COLUMNS.items() if name in ("run", "status") or any(cell(run) for run in runs)]
    rows = [[COLUMNS[name](run) for name in names] for run in runs]
    if form == "latex":
        return _latex(names, rows)
    markdown = _markdown(names, rows)
    if room is None or max(map(screen.width, markdown.splitlines())) <= room:
        return markdown
    rows = [[escape(run.status if name == "status" else cell, "line") for name, cell in zip(names, row)]
            for run, row in zip(runs, rows)]  # fmt: skip
    problems = [escape(f"{run.name}: {run.problem}", "line") for run in runs if run.problem is not None]
    return "\n".join([screen.table(names, rows, left=TEXTS, room=room), *(["", *problems] if problems else [])])


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rows = [[escape(cell, "markdown") for cell in row] for row in rows]
    widths = [max(3, *(screen.width(row[column]) for row in (names, *rows))) for column in range(len(names))]

    def line(cells):
        placed = (screen.placed(cell, width, left=name in TEXTS) for name, cell, width in zip(names, cells, widths, strict=True))
        return f"| {' | '.join(placed)} |"

    rule = ["-" * width if name in TEXTS else "-" * (width - 1) + ":" for name, width in zip(names, widths, strict=True)]
    return "\n".join([line(names), line(rule), *map(line, rows)])


def _csv(runs: Sequence[ListedRun]) -> str:
    file = io.StringIO()
    fields = [field.name for field in dataclasses.fields(ListedRun) if field.name != "rows"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(fields)
    for run in runs:
        values = (getattr(run, field) for field in fields)
        writer.writerow("" if value is None else escape(value, "csv") if isinstance(value, str) else value for value in values)
    return file.getvalue().rstrip("\n")


def _latex(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join("l" if name in TEXTS else "r" for name in names)
    lines = [" & ".join(escape(cell, "latex") for cell in row) + r" \\" for row in (names, *rows)]
    return "\n".join([
        rf"\begin{{tabular}}{{{columns}}}  % \usepackage{{booktabs}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
        r"\end{tabular}",
    ])  # fmt: skip
