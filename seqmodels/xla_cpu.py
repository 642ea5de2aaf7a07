"""Options of XLA's CPU compiler: without an optimisation that computes wrong numbers, or for quick compilation.

jaxlib 0.10.2 to 0.12.0 on x86-64 hand elementwise operations, reductions and products, fused, to a library (YNNPACK). A matrix
product with an operand that is one value everywhere, fused with a reduction, reads memory that nothing has written:
``jnp.sum((a @ jnp.ones((64, 128)) + x) ** 2, axis=-1)``, jitted, is infinite or of 1e25. A Mamba-2 layer does that with its first
state, which is zero: on 64 sequences of 64 steps, without a gradient, it returned numbers that had nothing to do with its inputs,
and a model whose training accuracy was 0.98 was evaluated to 0.01. (jax-ml/jax issue 39257 is of the same fusions crashing.)
``jax.lax.optimization_barrier`` around the operand or the product changes nothing, so a compiler option turns it off. Products
alone go on using the library, which costs no speed on the whole: a training step of four mixers took 0.95 to 1.04 times as long.

Importing ``seqmodels`` asks for it (``ask_for_right_fusions``), which takes effect unless JAX has looked for devices before; if
it has, the first op that is traced for a CPU warns (``warn_of_wrong_fusions``).
"""

import functools
import importlib.util
import os
import warnings

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
RIGHT = f"{FLAG}=individual_dot,individual_convolution"
AFFECTED = (0, 10, 2), (0, 13)  # the range in requirements.txt: an unknown flag ends a process, so others are left alone


def ask_for_right_fusions() -> None:
    """Set XLA_FLAGS, unless it chooses fusions already; JAX reads it when it first looks for devices. Imports no JAX."""
    flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    if FLAG not in flags and _is_affected():
        os.environ["XLA_FLAGS"] = f"{flags} {RIGHT}".strip()


def compiler_options() -> dict[str, str]:
    """For ``jax.jit(..., compiler_options=...)`` of one program for a CPU: right fusions, whenever JAX was started.

    Options are of a whole program: JAX refuses them on a ``jit`` inside another. Empty for a jaxlib that needs none.
    """
    types = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    return {FLAG.lstrip("-"): types} if _is_affected() else {}


@functools.cache
def quick_compiler_options() -> dict[str, int | bool]:
    """For a program for a CPU that runs once: what compiles fastest. Unoptimised code computes the same mathematics.

    Without its new fusion emitters XLA compiles such programs up to four times faster. Options that this version does not know
    are left out.
    """
    import jax
    import jax.numpy as jnp

    accepted = {}
    for option in (
        {"xla_backend_optimization_level": 0},
        {"xla_cpu_use_fusion_emitters": False},
        {"xla_cpu_parallel_codegen_split_count": 1},
    ):
        try:
            jax.jit(lambda: jnp.zeros(()), compiler_options=option)()
        except jax.errors.JaxRuntimeError:
            continue
        accepted |= option
    return accepted


@functools.cache
def warn_of_wrong_fusions() -> None:
    """A warning, once, where JAX computes on a CPU and was started before seqmodels was imported, without the flag."""
    import jax
    import jaxlib

    if _is_affected() and jax.default_backend() == "cpu" and fuses_reductions():
        warnings.warn(
            f"jaxlib {jaxlib.version.__version__} can compute wrong numbers on a CPU, and JAX was started before seqmodels could "
            "keep it from that: restart the process and import seqmodels before JAX is first used (or set "
            f"XLA_FLAGS={RIGHT}), or pass compiler_options=seqmodels.xla_cpu.compiler_options() to jax.jit",
            stacklevel=3,
        )


@functools.cache
def fuses_reductions() -> bool:
    """Whether this process's CPU compiler hands reductions to the library: one compilation of some milliseconds."""
    import jax
    import jax.numpy as jnp

    squares = jax.jit(lambda x: jnp.sum(x * x, axis=-1))
    return "__ynn_fusion" in squares.lower(jax.ShapeDtypeStruct((64, 64, 128), jnp.float32)).compile().as_text()


def _is_affected() -> bool:
    if importlib.util.find_spec("jaxlib") is None:  # seqmodels/packages.py says so
        return False
    from jaxlib import version

    return AFFECTED[0] <= version.__version_info__ < AFFECTED[1]
