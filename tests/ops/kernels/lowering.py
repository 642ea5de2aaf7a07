"""Lowering for a GPU or a TPU on a machine without one: what Mosaic refuses, it refuses here."""

import signal

import jax
import jax.numpy as jnp

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


def lower_gradients_for_tpu(op, *, groups, heads, channels, width, dtype, of_heads=None, **options):
    """The program of an op's kernels, forwards and backwards, with q and k of ``groups``, v of ``heads``.

    Args:
      of_heads: by name, float32 inputs of each head: how many numbers, or None for one without an axis of its own.
    """

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((2, 256, *shape), dtype)

    inputs = {"q": shaped(groups, channels), "k": shaped(groups, channels), "v": shaped(heads, width)}
    for name, number in (of_heads or {}).items():
        inputs[name] = shaped(heads, *(() if number is None else (number,)), dtype=jnp.float32)

    def gradients(inputs):
        outputs, pull = jax.vjp(lambda x: op(**x, implementation="pallas", **options), inputs)
        return outputs, pull(outputs)

    with ops.compile_for("tpu"):
        return jax.export.export(jax.jit(gradients), platforms=["tpu"])(inputs)
