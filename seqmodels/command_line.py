"""What every entry point does alike: one-line errors, exit codes, the compilation cache."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from seqmodels.errors import UserError
from seqmodels.escape import escape


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a UserError instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def config_and_flags(
    argv: Sequence[str], defaults: Mapping[str, str | int | None]
) -> tuple[ConfigDict, dict[str, str | int | None]]:
    """What ``--config=FILE [--config.any.field=value ...]`` asks for, and the values of further flags.

    Args:
        argv: the command line, the program's name first.
        defaults: each further flag with its value when it is not given; None for one that must be.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a flag that is missing, a config file
            that cannot be read.
    """
    values = flags.FlagValues()  # not the process-wide ones: absl allows to define those only once
    config_flags.DEFINE_config_file(
        "config", help_string="the config", lock_config=True, flag_values=values, sys_argv=list(argv)
    )
    for name, default in defaults.items():
        define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_string
        define(name, default, "", flag_values=values)
    try:
        positional = values(list(argv))[1:]
        for name in ("config", *(name for name, default in defaults.items() if default is None)):
            if not values[name].value:
                raise UserError(f"--{name} is missing; --help shows an example")
        config = values["config"].value
        config.keys()  # raises what went wrong when the file was read
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
    return config, {name: values[name].value for name in defaults}


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


def run(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 done, 1 a person's mistake (one line on stderr), 130 interrupted."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs a page of traceback for every error that it also raises
    try:
        main()
        sys.stdout.flush()
    except UserError as mistake:
        sys.exit(f"error: {escape(str(mistake), 'line')}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as mistake:
        sys.exit(escape(f"error: {mistake.strerror}: {mistake.filename}", "line"))
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sys.exit(escape(f"error: {failure.strerror}: {failure.filename}", "line"))
    sys.exit(0)


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs between processes in `directory`; "" keeps none.

    A folder that the environment names ($JAX_COMPILATION_CACHE_DIR) wins. Programs of any compile time are kept:
    a small model's are small, and they are many.
    """
    if jax.config.jax_compilation_cache_dir is None and directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
