"""Devices that are not there."""

import json

import pytest

from scripts import plan
from seqmodels.errors import UserError
from seqmodels.training import topologies


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        ("v5e", 1, ((1, 1), 1)),
        ("v5e", 8, ((2, 4), 1)),
        ("v6e", 256, ((16, 16), 1)),
        ("v5e", 1024, ((16, 16), 4)),
        ("v5p", 4, ((2, 2, 1), 1)),
        ("v5p", 4096, ((16, 16, 16), 1)),
    ],
)
def test_slices_are_as_square_as_can_be(kind, count, expected):
    assert topologies.slice_layout(kind, count) == expected


@pytest.mark.parametrize(("kind", "count"), [("v5e", 6), ("v5e", 257), ("v5p", 14)])
def test_no_such_slice_is_said(kind, count):
    with pytest.raises(UserError, match=f"no slices of {kind}"):
        topologies.slice_layout(kind, count)


def test_no_whole_hosts_is_said():
    with pytest.raises(UserError, match="no number of whole hosts"):
        topologies.devices("h200", 9)


def test_what_a_compiler_lacks():
    assert "only for v5e" in topologies.unsupported_reason("a100", "cuda")


@pytest.mark.parametrize("devices", ["v5e:4", "h200:4"])
def test_a_step_compiles_for_devices_that_are_not_there(devices, capsys):
    """Under fsdp each device gathers the parameters, and the compiled program is for the device that was asked for."""
    kind = devices.partition(":")[0]
    lacking = topologies.unsupported_reason(kind, "tpu" if kind == "v5e" else "cuda")
    if lacking:
        pytest.skip(lacking)
    plan.main([
        "plan.py", "--config=configs/tinystories.py:attention", "--config.data.tokenizer=bytes", "--config.model.repeats=1",
        "--config.model.d_model=64", "--config.data.seq_len=16", "--config.data.batch_size=4", "--config.mesh.fsdp=4",
        f"--devices={devices}", "--compile",
    ])  # fmt: skip
    found = json.loads(capsys.readouterr().out)["compiled"]
    assert ("TPU v5 lite" if kind == "v5e" else "H200") in found["device"]
    assert found["bytes_received"]["all-gather"] > 0 and found["temporary_bytes"] > 0
