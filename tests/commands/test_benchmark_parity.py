"""The parity suite's own logic, with a peer that is not PyTorch: a Llama trained by AdamW written in numpy."""

import argparse
import functools
import importlib.util
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.suites import parity
from seqmodels import model
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint, table
from tests.goldens import load

pytestmark = pytest.mark.tools

SIZES = {"steps": 3, "batch_size": 2, "seq_len": 16, "seed": 0}
LLAMA, MAMBA2 = load("hf/llama").directory, load("hf/mamba2").directory


@functools.cache
def value_and_gradient(config):
    """Jitted (params, inputs, targets) -> mean loss and its gradient: the logits at once, where training has them in parts."""
    network = model.graphdef(config, config.vocab_size)

    def loss(params, inputs, targets):
        logits, _ = model.merge(network, params)(inputs)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))

    return jax.jit(jax.value_and_grad(loss))


class NumpyPeer:
    """A checkpoint trained by AdamW written in numpy; `beta1`: another one than the config's."""

    def __init__(self, beta1=None):
        self.foreign, self.beta1 = checkpoint.read(LLAMA), beta1

    def save(self, folder):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(LLAMA / name, folder / name)

    def start(self, config, decayed):
        self.optim, self.steps = config.optim, 0
        masks = {name: mask.astype(np.float32) for name, mask in decayed.items()}
        self.masks = jax.tree.leaves(table.read_tensors(self.foreign.kind, self.foreign.config, self.foreign.params, masks))
        self.params, self.treedef = jax.tree.flatten(self.foreign.params)
        self.m, self.v = ([np.zeros_like(leaf) for leaf in self.params] for _ in range(2))

    def step(self, batch, learning_rate):
        compute = value_and_gradient(self.foreign.config)
        loss, gradient = compute(jax.tree.unflatten(self.treedef, self.params), batch["inputs"], batch["targets"])
        gradient = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient))
        self.steps += 1
        b1, b2 = self.beta1 or self.optim.beta1, self.optim.beta2
        for i, g in enumerate(gradient):
            g = g * min(1.0, self.optim.clip_norm / norm)
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            m, v = self.m[i] / (1 - b1**self.steps), self.v[i] / (1 - b2**self.steps)
            update = m / (np.sqrt(v) + self.optim.eps) + self.optim.weight_decay * self.masks[i] * self.params[i]
            self.params[i] = self.params[i] - learning_rate * update
        return float(loss)


class TwoPeers(NumpyPeer):
    """With a second one beside it, on the same batches, whose AdamW forgets faster."""

    def start(self, config, decayed):
        super().start(config, decayed)
        self.other, self.losses = NumpyPeer(beta1=0.5), []
        self.other.start(config, decayed)

    def step(self, batch, learning_rate):
        self.losses.append(self.other.step(batch, learning_rate))
        return super().step(batch, learning_rate)


def test_one_model_trained_twice():
    peer = TwoPeers()
    row = parity.compare(peer, **SIZES)
    assert len(row["ours"]) == len(row["theirs"]) == SIZES["steps"]
    assert row["largest_difference"] < 1e-5
    assert row["control"]["largest_difference"] < 1e-5
    assert [len(losses) for losses in row["control"]["losses"]] == parity.CONTROLS * [SIZES["steps"]]
    assert row["ours"][-1] < row["ours"][0] - 0.05, "it learns, so that a difference in a step can show"
    wrong = parity.largest_difference(row["ours"], peer.losses)
    assert wrong["largest_difference"] > 1e-4 and wrong["at_step"] > 0, "another optimizer shows"


def test_the_control_starts_a_rounding_away():
    params = {"kernel": np.random.default_rng(0).normal(size=10_000).astype(np.float32)}
    apart = parity.rounded_elsewhere(params, seed=1)["kernel"] / np.float64(params["kernel"]) - 1
    assert 2.0**-25 < np.sqrt(np.mean(apart**2)) < 2.0**-23 and np.abs(apart).max() < 2.0**-20


def test_decay_in_their_layout():
    """Mamba-2's in_proj holds gate, inputs and dt: the rows of dt alone, one per head, are not decayed."""
    foreign = checkpoint.read(MAMBA2)
    decayed = parity.decayed_tensors(foreign)
    rows = decayed["backbone.layers.0.mixer.in_proj.weight"].all(axis=1)
    heads = foreign.theirs["num_heads"]
    assert rows[:-heads].all() and not decayed["backbone.layers.0.mixer.in_proj.weight"][-heads:].any()
    assert decayed["backbone.embeddings.weight"].all() and not decayed["backbone.norm_f.weight"].any()
    assert not decayed["backbone.layers.1.mixer.A_log"].any()


def test_batches_follow_the_seed():
    first, again, other = (next(parity.batches(3, 8, 97, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["inputs"], again["inputs"])
    assert not np.array_equal(first["inputs"], other["inputs"])
    assert first["inputs"].shape == first["targets"].shape == (3, 8)
    np.testing.assert_array_equal(first["inputs"][:, 1:], first["targets"][:, :-1])
    assert first["targets"].min() >= 0 and first["targets"].max() < 97


def test_the_largest_difference():
    assert parity.largest_difference([3.0, 2.0, 1.0], [3.0, 2.5, 1.25]) == {"largest_difference": 0.5, "at_step": 1}
    assert parity.largest_difference([3.0, np.nan], [3.0, np.nan])["largest_difference"] == np.inf


def test_missing_packages_are_named(monkeypatch):
    options = argparse.Namespace(models=("llama", "gla"), **SIZES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "fla") else object())
    with pytest.raises(UserError) as raised:
        parity.run(options)
    assert str(raised.value) == (
        "--suite=parity needs torch and fla: pip install torch transformers flash-linear-attention triton"
    )
