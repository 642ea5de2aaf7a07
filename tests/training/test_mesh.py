"""Laws of training on a mesh, read from programs compiled for eight virtual devices, and their numbers against one device's."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from benchmarks.suites.meshes import MESHES
from seqmodels import mixers, model
from seqmodels.errors import UserError
from seqmodels.training import scale, sharding
from tests.configs import tiny
from tests.eight_devices import on_eight_devices

pytestmark = pytest.mark.tools

SPLIT = [mesh for mesh in MESHES if mesh != "one"]
# Attention has a vocabulary that divides over no mesh.
NAMES = ["attention:51", *(name for name in mixers.names() if name != "attention")]
# Times the FLOPs of data parallelism. Every device of ``tensor`` makes RWKV's five blends of the stream, whose low-rank products are
# a fifth of the layer's at this width; split, each of the five would be gathered.
MOST = {mesh: 1.1 for mesh in SPLIT}
MOST_OF_RWKV = MOST | {"data x fsdp x tensor": 1.3}
MOST_TEMPORARIES = 1.6  # times the bytes of data parallelism; most has RWKV-6 with ``tensor``, 1.54


@pytest.fixture(scope="module")
def rows(request):
    """By mixer and mesh, of the mixers that are asked for: one process for all."""
    items = [item for item in request.session.items if item.path == request.path and "rows" in item.fixturenames]
    asked = {item.callspec.params["mixer"] for item in items}
    found = on_eight_devices("tests.training.eight_devices", *sorted(asked))
    return {(row["mixer"], row["mesh"]): row for row in found}


@pytest.mark.parametrize("mixer", NAMES)
def test_a_mesh_computes_what_one_device_does(rows, mixer):
    for mesh in SPLIT:
        row = rows[mixer, mesh]
        assert max(row[name] for name in ("loss", "hidden", "gradient", "correct")) < 1e-5, (mesh, row["gradient_of"])


@pytest.mark.parametrize("mixer", NAMES)
def test_a_device_does_its_share(rows, mixer):
    """FLOPs and temporaries of data parallelism; no collective of all rows or in a loop, nothing gathered for want of a better way."""
    for mesh in SPLIT:
        row = rows[mixer, mesh]
        most = (MOST_OF_RWKV if mixer == "rwkv6" else MOST)[mesh]
        assert row["flops"] <= most * rows[mixer, "data"]["flops"], mesh
        assert row["temporary_bytes"] <= MOST_TEMPORARIES * rows[mixer, "data"]["temporary_bytes"], mesh
        assert (row["whole_batch"], row["in_loops"], row["rematerialisations"]) == ([], [], []), mesh


@pytest.mark.parametrize(("steps", "mixer"), [(4096, "hgrn"), (65536, "hgrn"), (65536, "mamba2")])
def test_eight_devices_train_on_a_long_text(steps, mixer):
    """With time split over them, each holds about an eighth, and what they exchange is no longer than the state."""
    (row,) = on_eight_devices("tests.training.sequence_program", str(steps), mixer)
    one, eight = row["1"], row["8"]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    # What a device's steps do to a state is computed apart, and its gradient too: Mamba-2 has 1.45 eighths, HGRN less.
    assert eight["temporary_bytes"] < 1.5 * one["temporary_bytes"] / 8
    assert eight["largest_collective"] < one["temporary_bytes"] / 8 / 4
    assert (eight["in_loops"], eight["rematerialisations"]) == ([], [])


def test_a_length_that_does_not_divide_is_refused():
    config = tiny(**{"data.seq_len": 36, "mesh.data": 1, "mesh.sequence": 8})
    with pytest.raises(UserError, match="data.seq_len=36 does not divide over the 8 devices of mesh.sequence"):
        scale.abstract_trainer(config, 48, config.mesh)


def test_kernels_compute_on_a_mesh_what_they_do_on_one_device():
    """Each device runs a kernel for its rows and channels; the gradient of what all share is summed over them."""
    plain, *others = on_eight_devices("tests.training.kernels_program")
    assert plain["choices"] == ["selective_scan: chunked (chunk 16)", "linear_recurrence: chunked"]
    for row in others:
        assert row["choices"] == ["selective_scan: pallas tpu/selective_scan", "linear_recurrence: pallas tpu/linear_recurrence"]
        np.testing.assert_allclose(row["loss"], plain["loss"], rtol=2e-5, err_msg=row["name"])
        most = 3e-5 * np.abs(plain["gradient"]).max()
        np.testing.assert_allclose(row["gradient"], plain["gradient"], rtol=0, atol=most, err_msg=row["name"])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX's arrangement of devices reads of a TPU."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("slices", [1, 2])
def test_the_last_axes_are_neighbours_and_data_alone_crosses_slices(slices):
    """Whatever the order in which the runtime lists the chips: here row by row of 4 x 4, and by their numbers modulo 5."""
    chips = [Chip(16 * s + i, (i % 4, i // 4, 0), s) for s in range(slices) for i in range(16)]
    mesh = sharding._arranged(sorted(chips, key=lambda chip: chip.id % 5), [4 * slices, 2, 2, 1])
    assert {chip.id for chip in mesh.flat} == set(range(16 * slices))
    for group in mesh.reshape(4 * slices, 4):
        assert len({chip.slice_index for chip in group}) == 1
    for near, far in mesh.reshape(-1, 2):  # of ``tensor``
        assert sum(abs(x - y) for x, y in zip(near.coords, far.coords)) == 1


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers/0_x/layer/query_kernel", (4, 32, 32), (None, "fsdp", "tensor")),
        ("optimizer/1/0/mu/layers/0_x/layer/output_kernel", (4, 32, 32), (None, "tensor", "fsdp")),
        ("embedding", (64, 32), ("tensor", "fsdp")),
        ("embedding", (51, 32), (None, ("tensor", "fsdp"))),  # a vocabulary that does not divide
        ("layers/0_x/layer/conv_kernel", (4, 4, 64), (None, None, ("tensor", "fsdp"))),
        ("layers/0_x/layer/query_kernel", (4, 16, 4, 4), (None, ("tensor", "fsdp"), None, None)),  # blocks on a diagonal
        ("layers/0_x/layer/A_log", (4, 64, 16), (None, ("tensor", "fsdp"), None)),
        ("layers/0_x/layer/A_log", (8, 8), (None, None)),  # one number a head, stacked over the layers
        ("layers/0_x/layer/mix_out", (4, 5, 8, 64), (None, None, None, "fsdp")),
        ("final_norm/scale", (32,), (None,)),
    ],
)
def test_rules(path, shape, expected):
    mesh = AbstractMesh((2, 2, 2, 1), sharding.AXES)
    assert sharding.partition_spec(path, shape, mesh) == PartitionSpec(*expected)


def test_what_every_device_has_whole_is_known():
    shapes = model.param_shapes(tiny(**{"model.pattern": "mamba"}).model, 48)
    mesh = AbstractMesh((1, 8, 1, 1), sharding.AXES)
    whole = sharding.replicated(shapes, mesh)
    assert whole["final_norm/scale"] == 4 * 32
    assert not [path for path in whole if path.endswith(("kernel", "A_log", "embedding"))]
    assert sharding.replicated(shapes, AbstractMesh((1, 1, 1, 1), sharding.AXES)) == {}
