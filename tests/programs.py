"""Programs for tests: small, run a few times, so that compiling them is nearly all the time that the tests take."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from seqmodels import xla_cpu


def compiler_options() -> dict[str, Any]:
    """XLA options that compile fastest on a CPU."""
    return xla_cpu.quick_compiler_options() if jax.default_backend() == "cpu" else {}


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


def matrix_products(jaxpr, times: int = 1) -> int:
    """Multiplications in all matrix products of a jaxpr, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        inner = times * equation.params.get("length", 1)
        for parameter in equation.params.values():
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                total += matrix_products(getattr(parameter, "jaxpr", parameter), inner)
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += times * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contract)
    return total
