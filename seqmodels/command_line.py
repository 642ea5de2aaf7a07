"""What every entry point does alike: one-line errors, exit codes, the compilation cache."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from seqmodels.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a UserError instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 done, 1 a person's mistake (one line on stderr), 130 interrupted."""
    try:
        main()
        sys.stdout.flush()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "seqmodels" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
