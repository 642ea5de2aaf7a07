"""How much memory a run needs, from shapes alone, before anything is built.

Parameters, optimizer state and gradients are exact. What the forward pass keeps for the backward pass is what JAX's
linearisation of the loss keeps of one micro-batch: the compiler may keep less (it computes cheap numbers again) and needs
temporaries besides.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from seqmodels import model
from seqmodels.device_memory import available, gib
from seqmodels.errors import UserError
from seqmodels.evaluation.perplexity import state_bytes
from seqmodels.pattern import parse_pattern
from seqmodels.training import sharding, step

# Bytes kept per byte of the residual stream: beyond this many no layer has gone. A run that fits with so many is not traced.
MOST_PER_BYTE_OF_STREAM = 1000


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int  # kept for the backward pass

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(value)}" for name, value in dataclasses.asdict(self).items())
        return f"{gib(self.total)} ({parts})"


def per_device(shapes, mesh) -> int:
    """Bytes that a tree of ShapeDtypeStructs takes on one device, placed by the table of `training.sharding`."""
    places = sharding.tree_shardings(shapes, mesh)
    sizes = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, places)
    return sum(jax.tree.leaves(sizes))


def check(config, graphdef, shapes: dict, mesh) -> Memory:
    """What a training step needs at least.

    Args:
      config: a ``seqmodels.config.RunConfig``.
      shapes: of the train state.

    Raises:
      UserError: more than a device has, or the host if that is the device.
    """
    parameters, optimizer = per_device(shapes["params"], mesh), per_device(shapes["optimizer"], mesh)
    known = Memory(parameters, optimizer, gradients=parameters, activations=0)
    there = available(mesh.devices.flatten())
    if there is None:
        return known
    _refuse(known, there, config)
    rows = config.data.batch_size // config.optim.accumulation_steps
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"]
    layers = config.model.repeats * len(parse_pattern(config.model.pattern))
    itemsize = jnp.dtype(model.COMPUTE_DTYPES[config.model.compute_dtype]).itemsize
    stream = rows * config.data.seq_len * config.model.d_model * itemsize // parts
    # One stream at least is kept for each repeat, with remat too.
    known = dataclasses.replace(known, activations=config.model.repeats * stream)
    _refuse(known, there, config)
    # A recurrence may keep its state after every step.
    states = rows * config.data.seq_len * state_bytes(graphdef, shapes["params"], config.data.seq_len) // parts
    if known.total + layers * stream * MOST_PER_BYTE_OF_STREAM + states < there:
        return known
    known = dataclasses.replace(known, activations=kept_for_backward(config, graphdef, shapes["params"], rows) // parts)
    _refuse(known, there, config)
    return known


def kept_for_backward(config, graphdef, params, rows: int) -> int:
    """Bytes that the forward pass of so many rows keeps for the backward pass.

    Parameters and what is made of them alone are kept, too, some of them or in another dtype: they are left out by what twice as
    many rows keep beyond it.
    """

    def backward(params, batch):
        return jax.vjp(lambda params: step.loss_sum(graphdef, params, batch, None)[0], params)[1]

    def kept(rows):
        tokens = jax.ShapeDtypeStruct((rows, config.data.seq_len), jnp.int32)
        shapes = jax.eval_shape(backward, params, {"inputs": tokens, "targets": tokens})
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    return kept(2 * rows) - kept(rows)


def _refuse(needed: Memory, there: int, config) -> None:
    if needed.total > there:
        raise UserError(
            f"a training step needs {needed} on each device, which has {gib(there)}: lower model.d_model="
            f"{config.model.d_model}, model.repeats={config.model.repeats}, data.batch_size={config.data.batch_size} or "
            f"data.seq_len={config.data.seq_len}, raise optim.accumulation_steps, or use more devices"
        )
