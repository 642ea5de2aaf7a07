"""--suite=parity: do we train as other libraries' models do?

Their model is built at a tiny size from a seed, and saved as their library saves it; we read the folder (``seqmodels.interop``).
Both are then trained on the same batches by the same AdamW (rate by step, decay mask, clipping, as ``training/optimizer.py`` has
them), each with its own forward and backward pass, in float32, and the losses are compared step by step: a difference in a
gradient, an initial state or the optimizer shows within a few steps. Text is the built-in stories, a token a byte.

Some models amplify rounding: as a control ours is trained three times more, from parameters that are half a unit in the last
place away. Where the two libraries part no faster than these runs of one program, the difference is rounding.

PyTorch's side computes on the CPU without compiled kernels. flash-linear-attention has only kernels for GPUs in its layers: there
its naive recurrences, its reference norm and PyTorch's SwiGLU take their places.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import Progress, names_out_of, positive
from configs import base
from seqmodels import model
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.data.text import toy
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint, table
from seqmodels.training.optimizer import make_optimizer
from seqmodels.training.state import Trainer

VOCAB_SIZE: Final = 256  # a token is a byte
STORIES: Final = 100
CONTROLS: Final = 3  # runs
TRANSFORMERS: Final = ("torch", "transformers")
FLA: Final = (*TRANSFORMERS, "fla", "triton")
# model -> the packages of its other side
MODELS: Final = dict.fromkeys(("llama", "mamba", "mamba2", "xlstm"), TRANSFORMERS) | dict.fromkeys(
    ("gla", "hgrn2", "retnet"), FLA
)
INSTALL: Final = {"fla": "flash-linear-attention"}


class Peer(Protocol):
    """The other library's side of one model."""

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""

    def step(self, batch: dict[str, np.ndarray], learning_rate: float) -> float:
        """One training step on ``inputs`` and ``targets`` [B, T]; the loss before it, nats per token."""

    def start(self, config: RunConfig, decayed: dict[str, np.ndarray]) -> None:
        """Called before the first step: the optimizer's constants, and by tensor where weight decay applies, bool."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=names_out_of("model", MODELS), default=",".join(MODELS), help="which to train")
    parser.add_argument("--steps", type=positive, default=40, help="training steps")
    parser.add_argument("--batch_size", type=positive, default=4, help="sequences per step")
    parser.add_argument("--seq_len", type=positive, default=32, help="tokens per sequence; xlstm: a multiple of 16")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the batches")


def run(options: argparse.Namespace) -> dict:
    needed = dict.fromkeys(package for name in options.models for package in MODELS[name])
    if lacking := [package for package in needed if importlib.util.find_spec(package) is None]:
        names = " ".join(INSTALL[name] if name in INSTALL else name for name in needed)
        raise UserError(f"--suite=parity needs {' and '.join(lacking)}: pip install {names}")
    if options.seq_len % 16 and "xlstm" in options.models:
        raise UserError(f"--seq_len={options.seq_len}: transformers' xLSTM trains in chunks of 16 tokens; take a multiple")
    from benchmarks.peers import trained_models

    clock = Progress(dict.fromkeys(options.models, 1.0))
    print(
        f"\n  {'model':10s} {'loss, first':>12s} {'last':>8s} {'largest difference, nats':>26s} {'at step':>8s}"
        f" {'of the control':>16s}  against"
    )
    rows = []
    for name in options.models:
        clock.start(name)
        peer = trained_models.build(name, VOCAB_SIZE, options.seed)
        row = {"name": name, "library": MODELS[name][-1] if MODELS[name] == TRANSFORMERS else "flash-linear-attention"}
        row |= compare(peer, options.steps, options.batch_size, options.seq_len, options.seed)
        rows.append(row)
        print(
            f"  {name:10s} {row['ours'][0]:12.4f} {row['ours'][-1]:8.4f} {row['largest_difference']:26.1e}"
            f" {row['at_step']:8d} {row['control']['largest_difference']:16.1e}  {row['library']}"
        )
    sizes = {each: getattr(options, each) for each in ("steps", "batch_size", "seq_len", "seed")}
    return {"sizes": sizes | {"vocab_size": VOCAB_SIZE}, "parity": rows}


def compare(peer: Peer, steps: int, batch_size: int, seq_len: int, seed: int) -> dict:
    """Train both sides, and the control; losses in nats per token by step, and the largest differences from ours."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save(Path(folder))
        foreign = checkpoint.read(folder)
    config = run_config(foreign, steps, batch_size, seq_len)
    trainer = Trainer(config, foreign.config.vocab_size, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, trainer.schedule, decayed(foreign))
    trained_on = list(itertools.islice(batches(batch_size, seq_len, foreign.config.vocab_size, seed), steps))
    peer.start(config, decayed_tensors(foreign))
    ours = losses(trainer, optimizer, foreign.params, trained_on)
    theirs = [peer.step(batch, float(trainer.schedule(step))) for step, batch in enumerate(trained_on)]
    control = [losses(trainer, optimizer, rounded_elsewhere(foreign.params, each), trained_on) for each in range(CONTROLS)]
    furthest = max((largest_difference(ours, each) for each in control), key=lambda found: found["largest_difference"])
    return {"ours": ours, "theirs": theirs, "control": {"losses": control} | furthest} | largest_difference(ours, theirs)


def losses(
    trainer: Trainer, optimizer: optax.GradientTransformation, params, trained_on: list[dict[str, np.ndarray]]
) -> list[float]:
    """Of every step from ``params``, before the step, nats per token."""
    params = jax.tree.map(jnp.array, params)
    state = {"params": params, "optimizer": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    found = []
    for batch in trained_on:
        state, metrics = trainer.train_step(state, trainer.put(batch))
        found.append(float(metrics["loss"]))
    return found


def rounded_elsewhere(params, seed: int):
    """Every number times 1 + 2^-24 u with u standard normal, rounded to float32: what another order of summing does."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (np.float64(leaf) * (1 + 2.0**-24 * random.standard_normal(leaf.shape))).astype(np.float32), params
    )


def run_config(foreign: checkpoint.Foreign, steps: int, batch_size: int, seq_len: int) -> RunConfig:
    """configs/base.py with the checkpoint's model, on one device, and a short warm-up."""
    config = base.get_config()
    config.data.batch_size, config.data.seq_len = batch_size, seq_len
    config.optim.learning_rate, config.optim.warmup_steps, config.train.steps = 3e-3, min(5, steps), steps
    config.mesh.data = 1
    return dataclasses.replace(from_config_dict(config), model=foreign.config)


def decayed(foreign: checkpoint.Foreign) -> dict:
    """True for each of our parameters that weight decay applies to."""
    return model.weight_decay_mask(foreign.config, foreign.config.vocab_size)


def decayed_tensors(foreign: checkpoint.Foreign) -> dict[str, np.ndarray]:
    """Where our weight decay applies, bool, in the names and layouts of their tensors (which may hold several of ours)."""
    ones = jax.tree.map(lambda leaf, applies: np.full(leaf.shape, applies, np.float32), foreign.params, decayed(foreign))
    with np.errstate(divide="ignore"):  # a layout may take a logarithm
        tensors = table.write_tensors(foreign.kind, foreign.config, ones)
    return {name: tensor > 0.5 for name, tensor in tensors.items()}


def batches(batch_size: int, seq_len: int, vocab_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Windows of the built-in stories at random places, without end: inputs, targets [B, T] int32, bytes modulo the vocabulary."""
    text = "\n".join(toy.stories("train", STORIES)).encode()
    tokens = np.frombuffer(text, np.uint8).astype(np.int32) % vocab_size
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(len(tokens) - seq_len, size=batch_size)
        windows = tokens[starts[:, None] + np.arange(seq_len + 1)]
        yield {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def largest_difference(ours: list[float], theirs: list[float]) -> dict:
    """Of the losses, and at which step, from 0; infinite where a loss is not finite, which shows no agreement."""
    one, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = np.where(np.isfinite(one) & np.isfinite(other), np.abs(one - other), np.inf)
    return {"largest_difference": float(difference.max()), "at_step": int(difference.argmax())}
