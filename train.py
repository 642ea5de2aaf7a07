"""Train one model: everything it does goes into a run folder, and a run that was stopped goes on from there.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention
    python train.py --config=configs/tinystories.py:gla --workdir=runs/gla --config.train.steps=1000

--config is a Python file with get_config(), or get_config(name) for FILE:NAME; --config.any.field=value
overrides a field (configs/base.py lists them all). The same command continues a run that was stopped.
Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 a mistake (one line
says which) or numbers that are not finite (then stdout has {"step": N, "diverged": true}), 143, 130 and 129 stopped by
SIGTERM, Ctrl-C or a terminal that was closed, after saving. --resume_learning_rate=RATE goes on from the newest checkpoint,
of a run that diverged for example, with this lower peak; the run folder keeps it. Several processes are one run: start the same
command in each, under SLURM, Open MPI, a TPU slice or a Kubernetes job as it is, elsewhere with
--coordinator=HOST:PORT --num_processes=N --process_id=I (docs/scaling.md).
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    from seqmodels.huge_pages import restart_with_huge_pages
    from seqmodels.packages import check_packages

    check_packages()
    restart_with_huge_pages()

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmodels import command_line, config_help, object_store, packages, processes, ranges
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.escape import say
from seqmodels.training import loop


def main(argv: Sequence[str]) -> None:
    asked = command_line.asked_for_help(argv)
    if asked is not None:
        config_help.say_help(asked, __doc__, FLAGS)
        return
    config, workdir, flags = _parse(argv)
    processes.start(coordinator=flags["coordinator"], num_processes=flags["num_processes"], process_id=flags["process_id"])
    command_line.use_compilation_cache(config.train.compilation_cache_dir)
    is_first = processes.Group().is_first
    try:
        summary = loop.train(config, workdir, resume_learning_rate=flags["resume_learning_rate"])
    except loop.Diverged as diverged:
        if is_first:
            print(json.dumps({"step": diverged.step, "diverged": True}))
        raise
    except loop.Stopped as stopped:
        say(f"{stopped}; to go on: {packages.shell_command(argv)}", whole=True)
        sys.exit(stopped.exit_code)
    if is_first:
        print(json.dumps(summary))


def parse(argv: Sequence[str]) -> tuple[RunConfig, Path | str]:
    """The config and the run folder, a path or the URL of one, that a command line asks for.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a flag that is missing, a config file
            that cannot be read.
    """
    config, workdir, _ = _parse(argv)
    return config, workdir


FLAGS = {
    "config": "a Python file with get_config(), or FILE:NAME for get_config(NAME)",
    "workdir": "the run folder: a path, gs://BUCKET/PATH or s3://BUCKET/PATH",
    "resume_learning_rate": "go on from the newest checkpoint with this lower peak of the learning rate",
    "coordinator": "of several processes: HOST:PORT of the first",
    "num_processes": "of several processes: how many",
    "process_id": "of several processes: which this one is, from 0",
}
# What a flag may be that need not be given.
OPTIONAL = {
    "resume_learning_rate": ranges.Positive, "num_processes": ranges.Processes, "process_id": ranges.CountOrZero,
}  # fmt: skip


def _parse(argv: Sequence[str]) -> tuple[RunConfig, Path | str, dict[str, Any]]:
    config, values = command_line.config_and_flags(argv, {"workdir": None, "coordinator": "", **dict.fromkeys(OPTIONAL, "")})
    for name, hint in OPTIONAL.items():
        values[name] = ranges.parser(hint, name)(values[name]) if values[name] else None
    return from_config_dict(config), object_store.workdir(values["workdir"]), values


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv))
