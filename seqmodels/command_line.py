"""What every entry point does alike: one-line errors, exit codes, the compilation cache, memory that is kept."""

import argparse
import ctypes
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
    keep_freed_memory()
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


# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for the next step to use; True where that is possible (glibc).

    XLA on a CPU allocates a step's temporaries anew each step. glibc gives blocks of that size back to the
    system, which then clears every page again as it is touched: a quarter of the time of a training step (B 16,
    T 256, D 128, 4 repeats of attention and MLP: 250 of 1000 ms of CPU time, 120,000 page faults a step, against
    none). The price is that memory once used stays with the process. All threads share one arena, because the
    size of the others is limited; call this before JAX starts its threads, that is before the first array.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(libc.mallopt(parameter, value) for parameter, value in settings)


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs between processes in `directory`; "" keeps none.

    A folder that the environment names ($JAX_COMPILATION_CACHE_DIR) wins. Programs of any compile time are kept:
    a small model's are small, and they are many.
    """
    if jax.config.jax_compilation_cache_dir is None and directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
