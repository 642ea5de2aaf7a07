"""Counting the floating point operations of matrix products in any traced function, and of a training step."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqmodels import model, ops


def training_flops_per_token(graphdef: nnx.GraphDef, params, seq_len: int) -> float:
    """Floating point operations of the matrix products of one training step, per token.

    Counted over the traced forward pass at the config's length (attention's products included), times 3
    for forward and backward. In the forms of a CPU on every device: work is what the mathematics asks for, not what
    a kernel does beside it.

    Args:
      params: arrays or ShapeDtypeStructs.
    """
    tokens = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)

    def forward(params, tokens):
        return model.merge(graphdef, params)(tokens)[0]

    with ops.compile_for("cpu"):
        return 3.0 * count_matmul_flops(forward, params, tokens) / seq_len


class Kernel(NamedTuple):
    """A Pallas kernel in a traced function."""

    name: str
    backward: bool  # whether it belongs to a gradient
    flops: float  # of one call


def count_matmul_flops(function, *args) -> float:
    """2 x multiply-adds of every ``dot_general`` in ``function(*args)``, loops multiplied out.

    Args:
      function: any traceable function.
      args: arrays or ShapeDtypeStructs; nothing is computed.

    The body of a ``while`` loop whose length is unknown counts once; of a ``cond`` the costliest branch. A Pallas kernel's
    body counts as often as its grid has places, also where it does nothing at a place.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def kernels(jaxpr, backward: bool = False) -> Iterator[Kernel]:
    """The Pallas kernels of a jaxpr, in the order of the program."""
    for equation in jaxpr.eqns:
        inside = backward or "transpose(" in str(equation.source_info.name_stack)
        if equation.primitive.name in _KERNELS:
            yield Kernel(_name(equation.params), inside, _count_equation(equation))
        else:
            for body in _bodies(equation.params):
                yield from kernels(body, inside)


def _count(jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)
    if name == "wgmma_ref":
        return _count_wgmma(equation)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    times = _KERNELS[name](params) if name in _KERNELS else params["length"] if name == "scan" else 1
    return times * sum(_count(body) for body in _bodies(params))


def _count_wgmma(equation) -> float:
    """Of Hopper's accumulator[M, N] += a[M, K] b[K, N], with a and b in shared memory, of which an index may take a part."""
    accumulator, a, _, *indices = equation.invars
    trees = [equation.params[f"{operand}_transforms_tree"] for operand in ("acc", "a", "b")]
    skipped = 0 if trees[0] is None else trees[0].num_leaves
    size = math.prod(a.aval.shape)
    if trees[1] is not None:
        for part in trees[1].unflatten(indices[skipped : skipped + trees[1].num_leaves]):
            if hasattr(part, "get_indexer_shape"):
                size = math.prod(part.get_indexer_shape())
    return 2.0 * accumulator.aval.shape[-1] * size


# The primitives that are kernels: on a TPU, and on a GPU (Mosaic). How many places their grid has.
_KERNELS = {
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
    "mpmd_map": lambda params: math.prod(math.prod(mesh.grid) for mesh in params["meshes"]),
}


def _name(params) -> str:
    return params["name"] if "name" in params else params["name_and_src_info"].name


def _bodies(params):
    for value in params.values():
        for each in value if isinstance(value, tuple) else (value,):
            if hasattr(each, "jaxpr"):  # a closed jaxpr
                yield each.jaxpr
            elif hasattr(each, "eqns"):
                yield each
