"""Which mixer is better, by how much, at what cost: trained at matched size, each at its own learning rate, several seeds.

    python scripts/compare.py --config=configs/compare/toy.py --workdir=runs/compare
    python scripts/compare.py --config=configs/compare/tinystories_small.py --workdir=runs/compare --mixers=attention,gla,mamba

--config is a comparison: a complete training config (`config.base`) and what to vary; configs/compare/base.py lists its fields,
--config.FIELD=VALUE overrides one (--config.base.train.steps=30 --config.seeds=2). --mixers=... is short for
--config.mixers=...; --jobs=N trains N at a time. Every run is one of train.py, in a folder of its own below --workdir; the
same command goes on after a kill, and does nothing twice. The report is report.html, report.md and results.json there, written anew
whenever a mixer's quality or cost has become known, and beside them what a paper takes: table.tex, table.csv, methods.tex,
references.bib, figures/*.pdf. A comparison of text has a control, the same model of MLPs alone. The last line of stdout is one JSON
object.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

import jax
import numpy as np

import train
from configs import base as training_base
from seqmodels import command_line, config_help, data, object_store, packages, ranges, screen
from seqmodels import config as config_lib
from seqmodels.circumstances import circumstances
from seqmodels.comparison import audit, jobs, metric, plan, recall, report, results
from seqmodels.comparison.report import content
from seqmodels.config import from_config_dict
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import columns, escape, say
from seqmodels.training import loop, run_folder


def main(argv: Sequence[str]) -> None:
    asked = command_line.asked_for_help(argv)
    if asked is not None:
        config_help.say_help(asked, __doc__, FLAGS, groups=("comparison", *config_help.GROUPS), group_page=help_of_fields)
        return
    jax.config.update("jax_platforms", "cpu")  # the device is for the runs; here shapes are counted
    config, values = command_line.config_and_flags(argv, {"workdir": None, "mixers": "", "jobs": "1"})
    num_jobs = ranges.parser(ranges.Jobs, "jobs")(values["jobs"])
    if values["mixers"]:
        if "mixers" not in config:
            raise UserError("--mixers is for a comparison's config (see configs/compare)")
        config.mixers = values["mixers"]
    workdir = object_store.local(values["workdir"])
    wanted, base = plan.read(config)
    if wanted.rate_steps > base["train"]["steps"]:
        say(
            f"config.rate_steps={wanted.rate_steps} is more than base.train.steps={base['train']['steps']}: the runs that choose the "
            "learning rate are longer than those that are reported"
        )
    with contextlib.ExitStack() as stack:
        with atomic.disk_errors_as_user_errors("--workdir", workdir):
            stack.enter_context(run_folder.created(workdir))
            if (workdir / "config.json").exists():
                raise UserError(f"{workdir} is a run folder: a comparison needs one of its own; choose another --workdir")
            run_folder.check_replaces_nothing(workdir, plan.OWN_NAMES, marks=["results.json"])
        stack.enter_context(loop.only_process_in(workdir))
        # What can be wrong is found before the data are read, which takes long.
        data_vocab_size = run_folder.expected_vocab_size(from_config_dict(base))
        planned = plan.Plan(config, workdir, data_vocab_size)
        # Here once, and not by several runs at once: the tokens are cached, the tokenizer's size decides the models'.
        dataset = data.prepare(from_config_dict(base).data, seed=base["seed"])
        if dataset.vocab_size != data_vocab_size:
            planned = plan.Plan(config, workdir, dataset.vocab_size)
        about = about_this_comparison(argv) | {"training_data": dataset.fingerprint}
        try:
            compare(planned, dataset, num_jobs, about)
        except loop.Stopped as stopped:
            say(f"{stopped}; to go on: {packages.shell_command(argv)}", whole=True)
            sys.exit(stopped.exit_code)


FLAGS = {
    "config": "a comparison: a Python file with get_config(), or FILE:NAME for get_config(NAME)",
    "workdir": "the folder of its runs and its report",
    "mixers": "short for --config.mixers",
    "jobs": "how many runs are trained at a time (default 1)",
}


def help_of_fields(asked: str) -> str:
    """The fields of the comparison, which configs/compare/base.py says, or a group of the training config."""
    if asked != "comparison":
        return config_help.page(asked, "config.base.")
    text = (ROOT / "configs" / "compare" / "base.py").read_text(encoding="utf-8")
    fields = re.findall(r"^    config\.(\w+) = (.*?)  # (.*)$", text, re.MULTILINE)
    return "\n".join(f"  --config.{name}={default}\n      {meaning}" for name, default, meaning in fields if name != "base")


def compare(planned: plan.Plan, dataset: data.Dataset | data.TaskDataset, num_jobs: int, about: dict) -> None:
    """Say what will be done, measure how the models start, run what is missing, and write the report."""
    vocab_size, workdir = dataset.vocab_size, planned.workdir
    for candidate in planned.candidates:
        difference = "" if candidate is planned.candidates[0] else f", {candidate.matched.of_reference:+.2%}"
        say(f"{candidate.label}: {candidate.matched.sizes}: {candidate.matched.counted:,.0f}{difference}")
    plan.check_folders(planned)
    executor = jobs.Executor(
        planned, jobs=num_jobs, train=train_command, worker=script(packages.PACKAGE / "comparison/worker.py"),
        vocab_size=vocab_size, frequent_pairs=write_frequent_pairs(dataset, workdir),
        on_news=lambda: write_report(planned, vocab_size, about, is_final=False),
    )  # fmt: skip
    for line in (*executor.announcement(), f"report: {workdir / 'report.html'}"):
        say(line)
    measure_starts(planned, dataset, about["training_data"])
    executor.run()
    found = write_report(planned, vocab_size, about)
    # Ahead of what a person reads, which is to stand last on a terminal.
    print(json.dumps({
        "report": str(planned.workdir / "report.html"),
        "mixers": {
            label: {
                name: row["quality"] and row["quality"][name]["mean"] for name in metric.of(found).summary
            } | {"learning_rate": row["best_rate"]}
            for label, row in found["mixers"].items()
        },
        "warnings": found["warnings"],
    }), flush=True)  # fmt: skip
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    print(escape(content.terminal(found, columns(sys.stderr)), "terminal"), file=sys.stderr)
    say(content.headline(found))
    say(f"report: {workdir / 'report.html'}")


def measure_starts(planned: plan.Plan, dataset: data.Dataset | data.TaskDataset, training_data: str) -> None:
    """How each untrained model starts, into its folder, once; and in which figures the mixers differ."""
    summaries = {}
    for candidate in planned.candidates:
        values = config_lib.to_dict(candidate.config)
        asked = {
            "model": values["model"],
            "seed": values["seed"],
            "vocab_size": dataset.vocab_size,
            "training_data": training_data,
        }
        asked = json.loads(json.dumps(asked))  # as it is read back
        known = jobs.start(candidate)
        if known is None or known["asked"] != asked:
            say(f"{candidate.label}: measuring how the untrained model starts")
            measured = audit.start_of_run(candidate.config, dataset.vocab_size, dataset.train_batch(0))
            known = {"asked": asked, "figures": dataclasses.asdict(measured), "summary": audit.summary(measured)}
            candidate.folder.mkdir(parents=True, exist_ok=True)
            jobs.write_json(candidate.folder / jobs.START, known)
        summaries[candidate.label] = known["summary"]
    print(escape(audit.table(summaries, columns(sys.stderr)), "terminal"), file=sys.stderr)
    controls = {candidate.label for candidate in planned.candidates if candidate.is_control}
    mixers = {label: summary for label, summary in summaries.items() if label not in controls}
    for difference in audit.differences(mixers, {}):
        say(f"warning: the mixers start unlike: {difference}")


def write_frequent_pairs(dataset: data.Dataset | data.TaskDataset, workdir: Path) -> Path | None:
    """The pairs of tokens that are frequent in the training split, as a file for those who score; None of a task."""
    if not isinstance(dataset, data.Dataset):
        return None
    path, found = workdir / "frequent_pairs.npy", recall.frequent_pairs(dataset.train.tokens)
    atomic.write_whole(path, lambda file: np.save(file, found))
    return path


def write_report(planned: plan.Plan, vocab_size: int, about: dict, *, is_final: bool = True) -> dict:
    """results.json and what is made of it; returns the results."""
    with screen.phase("writing the report"):
        found = results.gather(planned, vocab_size, about)
        jobs.write_json(planned.workdir / "results.json", found)
        report.write(found, planned.workdir, is_final=is_final)
    return found


def about_this_comparison(argv: Sequence[str]) -> dict:
    return circumstances() | {"command": packages.shell_command(argv)}


def script(path: Path) -> str:
    """How a program is called from the current folder."""
    return str(path.relative_to(ROOT)) if Path.cwd() == ROOT == packages.CLONE else str(path)


def train_command(run: plan.RunPlan) -> list[str]:
    """train.py and every field in which a run differs from configs/base.py: it needs no file of the comparison.

    Raises:
        UserError: a field has a value that no flag can give it.
    """
    defaults = config_lib.flatten(training_base.get_config().copy_and_resolve_references().to_dict())
    values = config_lib.flatten(config_lib.to_dict(run.config))
    flags = [f"--config.{name}={value}" for name, value in values.items() if value != defaults[name]]
    command = [script(ROOT / "train.py"), f"--config={script(ROOT / 'configs' / 'base.py')}", *flags]
    understood, _ = train.parse([*command, f"--workdir={run.folder}"])
    if understood != run.config:
        changed = ", ".join(config_lib.differences(run.config, understood))
        raise UserError(
            f"config.base has values that --config.FIELD=VALUE cannot give: {changed}; change them in configs/base.py"
        )
    return command


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    command_line.run(lambda: main(sys.argv))
