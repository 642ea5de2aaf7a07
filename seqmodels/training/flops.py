"""Counting the floating point operations of matrix products in any traced function, and of a training step."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from seqmodels import model


def training_flops_per_token(graphdef: nnx.GraphDef, params, seq_len: int) -> float:
    """Floating point operations of the matrix products of one training step, per token.

    Counted over the traced forward pass at the config's length (attention's products included), times 3
    for forward and backward.

    Args:
      params: arrays or ShapeDtypeStructs.
    """
    tokens = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def forward(params, tokens):
        return model.merge(graphdef, params)(tokens)[0]

    return 3.0 * count_matmul_flops(forward, params, tokens) / seq_len


def count_matmul_flops(function, *args) -> float:
    """2 x multiply-adds of every ``dot_general`` in ``function(*args)``, loops multiplied out.

    Args:
      function: any traceable function.
      args: arrays or ShapeDtypeStructs; nothing is computed.

    The body of a ``while`` loop whose length is unknown counts once; of a ``cond`` the costliest branch.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracting, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(_count(body) for body in _bodies(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _bodies(params):
    for value in params.values():
        if hasattr(value, "jaxpr"):  # a closed jaxpr
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value
