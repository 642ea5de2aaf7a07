"""Laws of training on a mesh, read from programs compiled for eight virtual devices, and their numbers against one device's."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.suites.meshes import MESHES

MIXERS = ("attention", "hgrn")
SPLIT = [mesh for mesh in MESHES if mesh != "one"]


def on_eight_devices(*arguments: str) -> list[dict]:
    """The lines of ``tests.training.eight_devices``."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.eight_devices", *arguments],
        cwd=pathlib.Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows():
    return {(row["mixer"], row["mesh"]): row for row in on_eight_devices(*MIXERS)}


@pytest.mark.parametrize("mesh", SPLIT)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mesh_computes_what_one_device_does(rows, mixer, mesh):
    row = rows[mixer, mesh]
    assert max(row[name] for name in ("loss", "hidden", "gradient")) < 1e-5, row["gradient_of"]


@pytest.mark.parametrize("mesh", SPLIT)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_device_does_its_share(rows, mixer, mesh):
    """The FLOPs of data parallelism, and no array of all rows is sent."""
    row = rows[mixer, mesh]
    assert row["flops"] <= 1.1 * rows[mixer, "data"]["flops"]
    assert row["whole_batch"] == []
