"""Train one model: everything it does goes into a run folder, and a run that was stopped goes on from there.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention
    python train.py --config=configs/tinystories.py:gla --workdir=runs/gla --config.train.steps=1000

--config is a Python file with get_config(), or get_config(name) for FILE:NAME; --config.any.field=value
overrides a field (configs/base.py lists them all). The same command continues a run that was stopped.
Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 a mistake (one line
says which), 143 and 130 stopped by SIGTERM or Ctrl-C after saving.
"""

if __name__ == "__main__":  # ahead of the other imports: it may start the process again, and they take seconds
    from seqmodels.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from seqmodels import command_line
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.errors import UserError
from seqmodels.training import loop


def main(argv: Sequence[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    config, workdir = parse(argv)
    command_line.use_compilation_cache(config.train.compilation_cache_dir)
    try:
        summary = loop.train(config, workdir)
    except loop.Stopped as stopped:
        print(f"{stopped}; to go on: {shlex.join(['python', *argv])}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    print(json.dumps(summary))


def parse(argv: Sequence[str]) -> tuple[RunConfig, Path]:
    """The config and the run folder that a command line asks for.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a flag that is missing, a config file
            that cannot be read.
    """
    values = flags.FlagValues()  # not the process-wide ones: absl allows to define those only once
    config_flags.DEFINE_config_file(
        "config", help_string="the config", lock_config=True, flag_values=values, sys_argv=list(argv)
    )
    flags.DEFINE_string("workdir", None, "the run folder", flag_values=values)
    try:
        positional = values(list(argv))[1:]
        for name in ("config", "workdir"):
            if not values[name].value:
                raise UserError(f"--{name} is missing; --help shows an example")
        config = from_config_dict(values["config"].value)
    except UserError:
        raise
    except (KeyError, AttributeError) as error:
        raise UserError(_unknown_field(error, argv)) from error
    except (flags.Error, OSError, SyntaxError) as error:
        first = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__
        if "Error whilst parsing config file" in str(error):
            raise first from None  # what get_config raised: a UserError, or a bug with its own traceback
        line = str(first if isinstance(error, OSError) else error).splitlines()[-1].strip()
        raise UserError(f"--config: {line}" if isinstance(error, (OSError, SyntaxError)) else line) from error
    if positional:
        raise UserError(f"{positional[0]!r} is not a flag; --help shows an example")
    return config, Path(values["workdir"].value).expanduser()


def _unknown_field(error: Exception, argv: Sequence[str]) -> str:
    """ml_collections names the last part of a field and its nearest; this names the whole flag."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    message = str(error.args[0])
    found = re.match(r"'(\w+)'(?:\nDid you mean \"(\w+)\")?", message)
    if found is None:
        return " ".join(message.split())
    name, nearest = found.groups()
    flag = next((flag.partition("=")[0] for flag in argv if name in re.split(r"[.=]", flag)), name)
    hint = f"did you mean {nearest!r}?" if nearest else "configs/base.py lists the fields there are"
    return f"{flag}: there is no field {name!r}; {hint}"


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv))
