"""Train one model: everything it does goes into a run folder, and a run that was stopped goes on from there.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention
    python train.py --config=configs/tinystories.py:gla --workdir=runs/gla --config.train.steps=1000

--config is a Python file with get_config(), or get_config(name) for FILE:NAME; --config.any.field=value
overrides a field (configs/base.py lists them all). The same command continues a run that was stopped.
Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 a mistake (one line
says which) or numbers that are not finite (then stdout has {"step": N, "diverged": true}), 143 and 130 stopped by
SIGTERM or Ctrl-C after saving. --resume_learning_rate=RATE goes on from the newest checkpoint, of a run that diverged
for example, with this lower peak; the run folder keeps it.
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

from seqmodels import command_line, packages, ranges
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.escape import say
from seqmodels.training import loop


def main(argv: Sequence[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    config, workdir, resume_learning_rate = _parse(argv)
    command_line.use_compilation_cache(config.train.compilation_cache_dir)
    try:
        summary = loop.train(config, workdir, resume_learning_rate=resume_learning_rate)
    except loop.Diverged as diverged:
        print(json.dumps({"step": diverged.step, "diverged": True}))
        raise
    except loop.Stopped as stopped:
        say(f"{stopped}; to go on: {packages.as_typed(argv)}")
        sys.exit(stopped.exit_code)
    print(json.dumps(summary))


def parse(argv: Sequence[str]) -> tuple[RunConfig, Path]:
    """The config and the run folder that a command line asks for.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a flag that is missing, a config file
            that cannot be read.
    """
    config, workdir, _ = _parse(argv)
    return config, workdir


def _parse(argv: Sequence[str]) -> tuple[RunConfig, Path, float | None]:
    config, values = command_line.config_and_flags(argv, {"workdir": None, "resume_learning_rate": ""})
    rate = values["resume_learning_rate"]
    rate = ranges.parser(ranges.Positive, "resume_learning_rate")(rate) if rate else None
    return from_config_dict(config), Path(values["workdir"]).expanduser(), rate


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv))
