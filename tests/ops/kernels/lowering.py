"""Lowering for a GPU on a machine without one: what Mosaic refuses, it refuses here."""

import signal

import jax

from seqmodels import ops

SECONDS = 60  # of CPU time; measured 2 or less. Some programs send Mosaic's search for layouts round and round.


def lower(function, *arguments):
    """Lowers ``function`` for CUDA.

    Raises:
      TimeoutError: after ``SECONDS``.
    """

    def give_up(*_):
        raise TimeoutError(f"no lowering in {SECONDS} s")

    previous = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with ops.compile_for("gpu"):
            return jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
