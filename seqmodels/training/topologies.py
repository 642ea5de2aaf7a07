"""Devices that are not there, to compile for: libtpu's compiler knows TPUs, XLA's the one GPU that is described here.

The packages are those of requirements-aot.txt. Nothing can be run on these devices.
"""

import importlib.metadata
import math
import os
import sysconfig
from pathlib import Path
from typing import Final

import jax
from jax.experimental import topologies

from seqmodels.errors import UserError

# The most chips of one slice, and the axes of its torus; v4 is left out, whose cores libtpu lists one by one.
SLICES: Final = {"v5e": (256, 2), "v6e": (256, 2), "v5p": (8960, 3)}
GPUS: Final = ("h200",)
GPUS_OF_A_HOST: Final = 8
PACKAGES: Final = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")}

_H200 = Path(__file__).parent / "h200.textproto"
_PTXAS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"


def environment(platform: str) -> dict[str, str]:
    """What makes the compiler of ``tpu`` or ``cuda`` run without hardware: variables to be set before it is loaded."""
    if platform == "tpu":  # there is no metadata server to ask which TPU this is, and any of them will do
        return {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }  # fmt: skip
    return {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PATH": os.pathsep.join([str(_PTXAS), os.environ["PATH"]])}


def unsupported_reason(kind: str, platform: str) -> str:
    """Why this Python cannot compile for devices of a kind; empty where it can."""
    if kind not in (*SLICES, *GPUS):
        return f"there is no compiler ahead of time for {kind}, only for {', '.join((*SLICES, *GPUS))}"
    missing = []
    for package in PACKAGES[platform]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return f"compiling for {kind} needs {', '.join(missing)}, which `make aot-venv` installs into .venv-aot" if missing else ""


def devices(kind: str, count: int) -> list[jax.Device]:
    """So many devices of a kind in one or several slices or hosts; sets the compiler's `environment`.

    Raises:
        UserError: no slices have together so many chips.
    """
    if kind in GPUS:
        os.environ.update(environment("cuda"))
        hosts = -(-count // GPUS_OF_A_HOST)
        if count % hosts:
            raise UserError(f"{count} GPUs are no number of whole hosts of {GPUS_OF_A_HOST}")
        return topologies.get_topology_desc(
            platform="cuda", topology_name=kind, topology=f"1x{hosts}x{count // hosts}", target_config=_H200.read_text()
        ).devices
    os.environ.update(environment("tpu"))
    layout, slices = slice_layout(kind, count)
    arguments = {"chips_per_host_bounds": (*layout, 1)[:3]} if math.prod(layout) < 4 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, layout))}", num_slices=slices, **arguments
    ).devices


def slice_layout(kind: str, count: int) -> tuple[tuple[int, ...], int]:
    """The sides of one slice, as alike as can be and hosts of 2 x 2 chips in it, and how many slices there are.

    Raises:
        UserError: there are no such slices.
    """
    most, axes = SLICES[kind]
    slices = -(-count // most)
    chips, rest = divmod(count, slices)
    found = [sides for sides in _sides(chips, axes) if chips < 4 or all(side % 2 == 0 for side in sides[-2:])]
    if rest or not found:
        raise UserError(f"no slices of {kind}, of at most {most} chips each, have {count} chips: take a power of two")
    sides = min(found, key=lambda sides: (sides[-1] - sides[0], sides))
    return (tuple(reversed(sides)) if axes == 3 else sides), slices


def _sides(chips: int, axes: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors, none smaller than the one before it."""
    if axes == 1:
        return [(chips,)]
    return [
        (first, *others)
        for first in range(1, chips + 1) if chips % first == 0
        for others in _sides(chips // first, axes - 1) if others[0] >= first
    ]  # fmt: skip
