"""What a training step needs on a mesh of devices that need not be there: memory, bytes sent, time, from shapes alone.

Parameters, optimizer state and gradients per device are exact: the table of `training.sharding` places them. Activations are
what JAX's linearisation keeps of the rows of one device, as if no layer were split over ``tensor``. The compiler's temporaries
are not in it.

Bytes sent are counted as the results of collectives on one device and step:

    all-gather       each parameter split over fsdp, whole again, in the forward and in the backward pass
    reduce-scatter   its gradient, summed over fsdp: the device's part is left
    all-reduce       gradients summed over data (and over fsdp where that does not split them); over tensor, the residual stream
                     after every layer, in both passes
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Final

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from seqmodels import model, ops
from seqmodels.config import MeshConfig, RunConfig
from seqmodels.errors import UserError
from seqmodels.pattern import parse_pattern
from seqmodels.training import memory, sharding
from seqmodels.training.log import PEAK_FLOPS
from seqmodels.training.memory import Memory
from seqmodels.training.state import Trainer

# By the name in --devices: the name in PEAK_FLOPS, and bytes of memory of one device, from the vendors' data sheets.
CHIPS: Final = {
    "v4": ("TPU v4", 32e9), "v5e": ("TPU v5e", 16e9), "v5p": ("TPU v5", 95e9), "v6e": ("TPU v6", 32e9),
    "a100": ("A100", 80e9), "h100": ("H100", 80e9), "h200": ("H200", 141e9), "b200": ("B200", 180e9),
}  # fmt: skip
MOST_TENSOR: Final = 8  # devices that split layers: they exchange activations, and so stand in one host or its neighbours
USABLE: Final = 0.9  # of a device's memory: the rest is the compiler's and the runtime's


@dataclasses.dataclass(frozen=True)
class Devices:
    """So many devices of a kind."""

    kind: str
    count: int

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return "tpu" if CHIPS[self.kind][0].startswith("TPU") else "cuda"

    @property
    def memory(self) -> int:
        """Bytes of one device."""
        return int(CHIPS[self.kind][1])

    @property
    def flops_per_second(self) -> float:
        """Of one device, dense bfloat16."""
        return PEAK_FLOPS[CHIPS[self.kind][0]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on one mesh, each figure of one device."""

    mesh: dict[str, int]
    memory: Memory
    sent: dict[str, int]  # bytes by kind of collective
    fits: bool


def parse_devices(text: str) -> Devices:
    """``v5e:256``.

    Raises:
        UserError: another form, or a kind that is not in CHIPS.
    """
    kind, _, count = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[0-9]{1,7}", count) or not 1 <= int(count) <= 10**6:
        raise UserError(f"--devices={text} must be KIND:NUMBER such as v5e:256; kinds are {', '.join(CHIPS)}")
    return Devices(kind, int(count))


def plans(config: RunConfig, data_vocab_size: int | None, devices: Devices) -> list[Plan]:
    """The plan of every mesh over which the config's batch divides, those that fit first, of these the one that sends least.

    Args:
        data_vocab_size: how many tokens the data have, or None, as for a `Trainer`.

    Raises:
        UserError: the batch divides over no mesh.
    """
    rows = config.data.batch_size // config.optim.accumulation_steps
    one = trainer_on(config, data_vocab_size, MeshConfig(data=1, fsdp=1, tensor=1, sequence=1), 1)
    shapes = one.abstract_state()
    per_row = memory.kept_for_backward(config, one.graphdef, shapes["params"], 1)
    found = []
    for sizes in _meshes(devices.count):
        mesh, parts = sharding.make_mesh(sizes, devices.count), sizes.data * sizes.fsdp
        if rows % parts == 0:
            parameters, optimizer = (memory.per_device(shapes[name], mesh) for name in ("params", "optimizer"))
            needed = Memory(parameters, optimizer, gradients=parameters, activations=per_row * rows // parts)
            fits = needed.total <= USABLE * devices.memory
            found.append(Plan(dict(mesh.shape), needed, sent(config, shapes["params"], mesh), fits))
    if not found:
        raise UserError(
            f"data.batch_size={config.data.batch_size} in {config.optim.accumulation_steps} accumulation step(s) divides over no mesh "
            f"of {devices.count} devices with mesh.tensor up to {MOST_TENSOR}: take a multiple of {devices.count}"
        )
    return sorted(found, key=lambda plan: (not plan.fits, sum(plan.sent.values())))


def abstract_trainer(config: RunConfig, data_vocab_size: int | None, sizes: MeshConfig) -> Trainer:
    """A `Trainer` whose mesh has no devices: its steps can be lowered and not run."""
    return trainer_on(config, data_vocab_size, sizes, sizes.data * sizes.fsdp * sizes.tensor * sizes.sequence)


def trainer_on(config: RunConfig, data_vocab_size: int | None, sizes: MeshConfig, devices: list[jax.Device] | int) -> Trainer:
    """The `Trainer` of a config on another mesh."""
    return Trainer(dataclasses.replace(config, mesh=sizes), data_vocab_size, devices=devices)


def lower(trainer: Trainer, platform: str) -> jax.stages.Lowered:
    """The training step of the config's batch of text, lowered for the trainer's mesh on ``cpu``, ``tpu`` or ``cuda``, in that
    device's kernels and chunk sizes."""
    data = trainer.config.data
    tokens = jax.ShapeDtypeStruct((data.batch_size, data.seq_len), jnp.int32, sharding=trainer.batch_sharding)
    with ops.compile_for("gpu" if platform == "cuda" else platform):
        return trainer.trace({"inputs": tokens, "targets": tokens}).lower(lowering_platforms=(platform,))


def sent(config: RunConfig, params, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes of the results of collectives on one device in one step, by kind; kinds without any left out.

    Args:
        params: ShapeDtypeStructs.
    """
    itemsize = jnp.dtype(model.COMPUTE_DTYPES[config.model.compute_dtype]).itemsize
    micro_batches = config.optim.accumulation_steps
    gathered = scattered = reduced = 0
    places = jax.tree.leaves(sharding.tree_shardings(params, mesh))
    mesh = mesh.shape
    for leaf, place in zip(jax.tree.leaves(params), places, strict=True):
        part = math.prod(place.shard_shape(leaf.shape))
        if mesh["fsdp"] > 1 and "fsdp" in jax.tree.leaves(tuple(place.spec)):
            gathered += 2 * part * mesh["fsdp"] * itemsize * micro_batches
            scattered += part * leaf.dtype.itemsize * micro_batches
            reduced += part * leaf.dtype.itemsize if mesh["data"] > 1 else 0
        elif mesh["data"] * mesh["fsdp"] > 1:
            reduced += part * leaf.dtype.itemsize
    if mesh["tensor"] > 1:
        layers = config.model.repeats * len(parse_pattern(config.model.pattern))
        rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"])
        reduced += 2 * layers * rows * config.data.seq_len * config.model.d_model * itemsize
    kinds = {"all-gather": gathered, "reduce-scatter": scattered, "all-reduce": reduced}
    return {kind: size for kind, size in kinds.items() if size}


def _meshes(count: int) -> Iterator[MeshConfig]:
    """Every data x fsdp x tensor of so many devices, fsdp and tensor a power of two."""
    for tensor in (2**power for power in range(MOST_TENSOR.bit_length())):
        for fsdp in (2**power for power in range(count.bit_length())):
            if count % (tensor * fsdp) == 0:
                yield MeshConfig(data=count // (tensor * fsdp), fsdp=fsdp, tensor=tensor, sequence=1)
