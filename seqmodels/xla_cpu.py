"""Keeps XLA's CPU compiler from an optimisation that computes wrong numbers.

jaxlib 0.10.2 to 0.11.2 on x86-64 hand elementwise operations, reductions and products, fused, to a library (YNNPACK). Where
axes of one length lie side by side the fused program can mix them up: a Mamba-2 layer on 64 sequences of 64 steps, jitted
without a gradient, returned numbers that had nothing to do with its inputs (NaN in some processes), and a model whose training
accuracy was 0.98 was evaluated to 0.01. (jax-ml/jax issue 39257 is of the same fusions crashing.) Products alone go on using the
library, which costs no speed on the whole: a training step of four mixers took 0.95 to 1.04 times as long.
"""

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import jaxlib

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
RIGHT = f"{FLAG}=individual_dot,individual_convolution"
AFFECTED = (0, 10, 2), (0, 12)  # from, and before: an unknown flag ends a process, so others are left alone


def ask_for_right_fusions() -> None:
    """Set XLA_FLAGS, unless it chooses fusions already; JAX reads it when it first looks for devices."""
    flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    if FLAG not in flags and _is_affected():
        os.environ["XLA_FLAGS"] = f"{flags} {RIGHT}".strip()


def avoid_wrong_fusions() -> None:
    """`ask_for_right_fusions`, and a warning where JAX computes on a CPU and was started before, without the flag."""
    ask_for_right_fusions()
    if _is_affected() and jax.default_backend() == "cpu" and fuses_reductions():
        warnings.warn(
            f"jaxlib {jaxlib.version.__version__} can compute wrong numbers on a CPU, and JAX was started before seqmodels could "
            f"keep it from that: start the process with XLA_FLAGS={RIGHT}",
            stacklevel=3,
        )


@functools.cache
def fuses_reductions() -> bool:
    """Whether this process's CPU compiler hands reductions to the library: one compilation of some milliseconds."""
    squares = jax.jit(lambda x: jnp.sum(x * x, axis=-1))
    return "__ynn_fusion" in squares.lower(jax.ShapeDtypeStruct((64, 64, 128), jnp.float32)).compile().as_text()


def _is_affected() -> bool:
    return AFFECTED[0] <= jaxlib.version.__version_info__ < AFFECTED[1]
