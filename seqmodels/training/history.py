"""The history of a run folder, one entry for each process that trained in it: model, data, device, and the forms of its ops."""

import json
import platform
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from seqmodels.circumstances import circumstances
from seqmodels.config import RunConfig
from seqmodels.data import Dataset, TaskDataset, atomic
from seqmodels.evaluation import perplexity
from seqmodels.pattern import parse_pattern
from seqmodels.training.state import Trainer

FILE_NAME = "history.jsonl"
"""One JSON object a line, the first process first."""

INDENT = 10  # of what a line says, after its name


def entry(config: RunConfig, dataset: Dataset | TaskDataset, trainer: Trainer, step: int, forms: Sequence[str]) -> dict:
    """The entry of a process that trains from `step` on: JSON values.

    Args:
        forms: what each op of the training step resolved to, and why not a faster form (`Trainer.forms`).
    """
    about = circumstances()
    devices = trainer.mesh.devices.flatten()
    tokens = (config.train.steps - step) * config.data.batch_size * config.data.seq_len
    return {
        "step": step,
        **about,
        "host": platform.node(),
        "devices": {"number": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform},
        "processes": jax.process_count(),
        "mesh": dict(trainer.mesh.shape),
        "model": {
            "pattern": config.model.pattern,
            "repeats": config.model.repeats,
            "layers": config.model.repeats * len(parse_pattern(config.model.pattern)),
            "parameters": trainer.num_parameters,
            "state_bytes": perplexity.state_bytes(trainer.graphdef, trainer.abstract_state()["params"], config.data.seq_len),
            "state_max_len": config.data.seq_len,
        },
        "data": _data(config, dataset) | {"tokens_to_read": tokens},
        "forms": list(forms),
    }


def _data(config: RunConfig, dataset: Dataset | TaskDataset) -> dict:
    if config.data.synthetic_task is not None:
        return {"task": config.data.task}
    rows = config.train.steps * config.data.batch_size
    return {
        "source": config.data.source,
        "tokenizer": dataset.tokenizer.name,
        **{name: dataset.record["train"][name] for name in ("documents", "bytes", "tokens")},
        "validation": {name: dataset.record["validation"][name] for name in ("documents", "bytes", "tokens")},
        "epochs": rows / dataset.rows_per_epoch,
    }


def lines(about: Mapping, workdir: Path, total_steps: int, columns: int | None = None) -> list[str]:
    """An entry as the terminal shows it: five lines, and one more for each further op.

    Args:
        columns: of the terminal, in which a longer line is broken; None: none is.
    """
    model, data, devices = about["model"], about["data"], about["devices"]
    if "task" in data:
        what = f"the task {data['task']}, drawn anew for each step; {data['tokens_to_read']:,} tokens to read"
    else:
        what = (
            f"{data['documents']:,} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens of {data['tokenizer']}; "
            f"{data['tokens_to_read']:,} tokens to read, {data['epochs']:.3g} epochs in all"
        )
    processes = f" in {about['processes']} processes" if about["processes"] > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in about["mesh"].items())
    done = f"{about['step']:,} of {total_steps:,} steps done" if about["step"] else f"{total_steps:,} steps"
    named = [
        ("model", f"{model['repeats']} x {model['pattern']!r}: {model['layers']} layers, {model['parameters']:,} parameters, "
                  f"a state of {model['state_bytes']:,} bytes at {model['state_max_len']} tokens"),
        ("data", what),
        ("device", f"{devices['number']} x {devices['kind']} ({devices['platform']}){processes}, mesh {mesh}"),
        ("folder", f"{workdir}, {done}"),
        *(("forms" if number == 0 else "", form) for number, form in enumerate(about["forms"] or ["no op with several forms"])),
    ]  # fmt: skip
    found = [f"{name:>8}  {text}" for name, text in named]
    if columns is None or columns < 2 * INDENT:
        return found
    wrapper = textwrap.TextWrapper(columns, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False)
    return [part for line in found for part in wrapper.wrap(line)]


def append(about: Mapping, workdir: Path) -> None:
    """Append an entry to `FILE_NAME`."""
    with open(atomic.own_file(workdir / FILE_NAME), "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")
