"""What every entry point does alike: one-line errors, exit codes, the compilation cache."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import logging

from seqmodels.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a UserError instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 done, 1 a person's mistake (one line on stderr), 130 interrupted."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs a page of traceback for every error that it also raises
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
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as mistake:
        sys.exit(f"error: {mistake.strerror}: {mistake.filename}")
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sys.exit(f"error: {failure.strerror}: {failure.filename}")
    sys.exit(0)


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs between processes in `directory`; "" keeps none.

    A folder that the environment names ($JAX_COMPILATION_CACHE_DIR) wins. Programs of any compile time are kept:
    a small model's are small, and they are many.
    """
    if jax.config.jax_compilation_cache_dir is None and directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
