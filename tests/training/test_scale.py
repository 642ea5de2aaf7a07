"""What a run would need on devices that are not there."""

import dataclasses
import json

import jax
import pytest

from scripts import plan
from seqmodels.config import MeshConfig
from seqmodels.errors import UserError
from seqmodels.training import memory, scale
from seqmodels.training.state import Trainer
from tests.configs import tiny

pytestmark = pytest.mark.tools

PIECES = 64


def config(**overrides):
    return tiny(**{"model.pattern": "attention", "model.repeats": 2, "data.seq_len": 8, "data.batch_size": 8} | overrides)


def test_memory_is_what_the_arrays_take():
    found = {tuple(each.mesh.values()): each for each in scale.plans(config(), PIECES, scale.Devices("v5e", 8))}
    whole = jax.tree.leaves(Trainer(config(), PIECES, jax.devices()[:1]).abstract_state()["params"])
    assert found[8, 1, 1, 1].memory.parameters == sum(leaf.size * 4 for leaf in whole)
    kernels = sum(leaf.size * 4 for leaf in whole if leaf.ndim >= 2 and min(leaf.shape[-2:]) > 2)
    split = found[1, 8, 1, 1]
    assert split.memory.parameters == found[8, 1, 1, 1].memory.parameters - kernels * 7 // 8
    assert split.memory.activations == found[8, 1, 1, 1].memory.activations > 0
    trainer = scale.abstract_trainer(config(), PIECES, MeshConfig(data=8, fsdp=1, tensor=1, sequence=1))
    assert split.memory.activations == memory.kept_for_backward(config(), trainer.graphdef, trainer.abstract_state()["params"], 1)


def test_what_is_sent():
    """Data parallelism reduces every gradient once; FSDP gathers each split parameter twice and keeps a part of its gradient."""
    found = {tuple(each.mesh.values()): each for each in scale.plans(config(), PIECES, scale.Devices("h200", 8))}
    assert found[8, 1, 1, 1].sent == {"all-reduce": found[8, 1, 1, 1].memory.parameters}
    split, whole = found[1, 8, 1, 1].sent, found[8, 1, 1, 1].memory.parameters
    in_parts = whole - split["all-reduce"]  # norms are whole on every device
    assert split["all-gather"] == 2 * in_parts and split["reduce-scatter"] == in_parts // 8
    both = found[2, 4, 1, 1].sent
    assert both["all-reduce"] == split["all-reduce"] + in_parts // 4 and both["all-gather"] == split["all-gather"]


def test_what_does_not_fit_is_said_and_comes_last():
    large = config(**{"model.d_model": 8192, "model.repeats": 40, "model.pattern": "attention mlp", "data.seq_len": 8})
    found = scale.plans(large, PIECES, scale.Devices("v5e", 8))
    assert not any(each.fits for each in found)
    more = dataclasses.replace(large, data=dataclasses.replace(large.data, batch_size=64))
    found = scale.plans(more, PIECES, scale.Devices("v5p", 64))
    assert found[0].fits and not found[-1].fits
    assert [each.fits for each in found if each.mesh["data"] == 64] == [False]


def test_a_step_lowers_for_4096_devices():
    many = config(**{"data.batch_size": 1024})
    trainer = scale.abstract_trainer(many, PIECES, MeshConfig(data=4, fsdp=256, tensor=4, sequence=1))
    text = scale.lower(trainer, "tpu").as_text()
    assert "mhlo.num_partitions = 4096" in text or '"data"=4, "fsdp"=256, "tensor"=4' in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=v5e"], "KIND:NUMBER"),
        (["--devices=abacus:8"], "kinds are v4"),
        (["--devices=v5e:7", "--config.data.batch_size=5"], "divides over no mesh of 7 devices"),
        (["--devices=v5e:8", "--config.mesh.fsdp=3"], "no mesh of so many devices"),
        ([], "--devices is missing"),
    ],
)
def test_a_mistake_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        plan.main(["plan.py", "--config=configs/tinystories.py:attention", "--config.data.tokenizer=bytes", *flags])


def test_the_command(capsys):
    plan.main([
        "plan.py", "--config=configs/tinystories.py:attention", "--config.data.tokenizer=bytes", "--config.model.repeats=1",
        "--devices=v5e:4", "--tokens=1e9", "--price=2", "--utilisation=0.5",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["tokens_per_second"] == pytest.approx(0.5 * 4 * 197e12 / summary["flops_per_token"])
    assert summary["price"] == pytest.approx(2 * 4 * summary["hours"]) and summary["fits"]
    assert summary["hours"] == pytest.approx(1e9 / summary["tokens_per_second"] / 3600)
    assert "4 x v5e" in err
