"""Programs for tests: small, run a few times, so that compiling them is nearly all the time that the tests take."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.cache
def compiler_options() -> dict[str, Any]:
    """XLA options that compile fastest on a CPU: unoptimised code computes the same mathematics.

    Without its new fusion emitters XLA compiles such programs up to four times faster. Options that this version does not know
    are left out.
    """
    accepted = {}
    if jax.default_backend() != "cpu":
        return accepted
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


def fast_jit(function: Callable, **options) -> Callable:
    """`jax.jit` with `compiler_options`."""
    return jax.jit(function, compiler_options=compiler_options(), **options)


def build(make: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> nnx.Module:
    """`make(nnx.Rngs(params=seed))` by one compiled program: array by array, initialisation takes three times as long."""
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
    return nnx.merge(nnx.graphdef(abstract), initialiser(make)(seed))


def initialiser(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[int], dict]:
    """seed -> the parameters of `build`, as a nested dict; compiled once."""
    compiled = fast_jit(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param)))
    return lambda seed: compiled(jax.random.key(seed))
